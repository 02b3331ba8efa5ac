"""Images of a study's models by a sampling job, their scores by `selfe evaluate`, and the rows of results.json."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import ROOT, Cell, Run
from torch import Tensor

from selfe import config
from selfe.evaluation import results
from selfe.evaluation.image_sets import read_job
from selfe.evaluation.results import Evaluation
from selfe.evaluation.statistics import Estimate, pooled
from selfe.io import image_encode

BATCH = 256
SEED = 1000  # of the noise: this and the seed of the training
JUDGE = "judge"  # name of the study's extractor
SAMPLER = {"module": "selfe.samplers.renoise.Renoise", "params": {"eta": 0.0}}


@dataclass(frozen=True)
class Prompts:
    """The captions of which images are evaluated, and a category of each. Captions may repeat."""

    captions: Sequence[str]
    categories: Sequence[str]

    def __len__(self) -> int:
        return len(self.captions)


# ---- generation and evaluation ----


def images_folder(out: Path, run: Run, count: int) -> Path:
    """The folder of the sampling job of a model."""
    return out / run.name / f"images_{count}"


def real_folder(out: Path, name: str, count: int) -> Path:
    """The folder of real images of the same captions."""
    return out / f"{name}_{count}"


def evaluate(run: Run, out: Path, prompts: Prompts, side: int, evaluation: Mapping[str, Any]) -> None:
    """Generate and evaluate images for every sampling setting of a model; resumes, and does nothing if all is done.

    Args:
        side: height and width of the images, pixels.
        evaluation: the section of that name.
    """
    folder = images_folder(out, run, len(prompts))
    evaluated = read(folder)
    if evaluated and all(find(evaluated, cell) is not None for cell in run.cells):
        return

    prompt_file = out / run.name / f"prompts_{len(prompts)}.jsonl"
    prompt_file.write_text("".join(json.dumps(line) + "\n" for line in prompt_lines(run, prompts)), encoding="utf-8")
    inferencer = {
        "ckpt_dir": str(out / run.name / "checkpoints"),
        "output_dir": str(folder),
        "batch_size": BATCH,
        "gallery": False,
        "defaults": {"prompt_file": str(prompt_file), "height": side, "width": side, "sampler": SAMPLER},
    }
    file = out / run.name / f"evaluate_{len(prompts)}.yaml"
    config.save({"base": "config.yaml", "inferencer": inferencer, "evaluation": evaluation}, file)
    start(file, "-", out / run.name / "evaluate.log")


def prompt_lines(run: Run, prompts: Prompts) -> list[dict]:
    """The lines of the prompt file. The noise of an image is the same for all models and settings of a seed."""
    num_steps: dict[tuple, list[int]] = {}
    for cell in run.cells:
        num_steps.setdefault((cell.guidance, cell.s_ratio, cell.eta), []).append(cell.steps)

    lines = []
    for (guidance, s_ratio, eta), steps in num_steps.items():
        settings = {"num_steps": steps, "cfg_scale": guidance, "s_ratio": s_ratio, "eta": eta, "seed": SEED + run.seed}
        for sample, (caption, category) in enumerate(zip(prompts.captions, prompts.categories, strict=True)):
            lines.append({"prompt": caption, "category": category, "first_sample": sample} | settings)
    return lines


def evaluate_real(folder: Path, images: Tensor, prompts: Prompts, evaluation: Mapping[str, Any]) -> None:
    """Evaluate real images (n, 3, H, W) as if a job had generated them, unless this was done before."""
    if read(folder):
        return
    lines = []
    facts = {"negative_prompt": "", "seed": 0, "height": images.shape[2], "width": images.shape[3]}
    facts |= {"num_steps": 0, "cfg_scale": 1.0, "s_ratio": 0.0, "eta": 0.0, "sampler": "none", "weights": "real"}
    for number, (image, caption, category) in enumerate(zip(images, prompts.captions, prompts.categories, strict=True)):
        record = {"file": f"{number:05d}.png", "prompt": caption, "sample": number} | facts
        image_encode.save(image_encode.to_image(image), folder / record["file"], "png", record)
        lines.append(json.dumps(record | {"category": category}) + "\n")
    image_encode.write(folder / "metadata.jsonl", "".join(lines).encode())

    settings = folder / "evaluate.yaml"
    config.save({"evaluation": evaluation}, settings)
    start(folder, str(settings), folder / "evaluate.log")


def start(job: Path, settings: str, log: Path) -> None:
    """`selfe evaluate` on one process, in a subprocess. Raises SystemExit if it fails."""
    paths = [str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "selfe.evaluate", str(job), settings]
    with log.open("a") as output:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    if done.returncode:
        raise SystemExit(f"{job}: evaluation failed; see {log}")


# ---- results ----


def read(folder: Path) -> Evaluation | None:
    """The evaluation of a job; None without one."""
    path = folder / results.FILE
    return Evaluation.read(path) if path.exists() else None


def is_of(settings: Mapping[str, Any], cell: Cell) -> bool:
    """Whether recorded settings are those of a cell."""
    wanted = {"num_steps": cell.steps, "cfg_scale": cell.guidance, "s_ratio": cell.s_ratio, "eta": cell.eta}
    return wanted.items() <= settings.items()


def find(evaluation: Evaluation, cell: Cell) -> int | None:
    """The place of a sampling setting in an evaluation."""
    places = (number for number, each in enumerate(evaluation.cells) if is_of(each["settings"], cell))
    return next(places, None)


def values(evaluation: Evaluation, number: int) -> dict[str, Estimate]:
    """The metrics of a sampling setting."""
    return {value.metric: Estimate(*value[3:]) for value in evaluation.values if value.cell == number}


def rows(out: Path, runs: Sequence[Run], count: int) -> list[dict[str, Any]]:
    """A row per model and sampling setting: METRIC, METRIC_low, METRIC_high over all seeds, METRIC_seeds by seed."""
    evaluations = {run: evaluation for run in runs if (evaluation := read(images_folder(out, run, count)))}
    by_seed: dict[tuple[str, Cell], list[dict[str, Estimate]]] = {}
    for run, evaluation in evaluations.items():
        for cell in run.cells:
            number = find(evaluation, cell)
            if number is not None:
                by_seed.setdefault((run.model, cell), []).append(values(evaluation, number))

    table = []
    for (model, cell), estimates in by_seed.items():
        row = {"model": model, "cell": cell.name, "steps": cell.steps, "guidance": cell.guidance, "eta": cell.eta}
        row |= {"s_ratio": cell.s_ratio, "seeds": len(estimates)}
        for metric in estimates[0]:
            row |= columns(metric, [each[metric] for each in estimates])
        table.append(row)
    return table


def columns(metric: str, estimates: Sequence[Estimate]) -> dict[str, Any]:
    """The columns of a metric, of one value per seed."""
    together = pooled(estimates)
    return {
        metric: together.value,
        f"{metric}_low": together.low,
        f"{metric}_high": together.high,
        f"{metric}_seeds": [each.value for each in estimates],
    }


def image_files(folder: Path, cells: Sequence[Cell]) -> dict[Cell, list[Path]]:
    """The images of sampling settings in the order of the prompts; those that the job lacks are left out."""
    files = {}
    for images in read_job(folder):
        for cell in cells:
            if is_of(images.settings, cell):
                files[cell] = [images.path(index) for index in range(len(images))]
    return files


def cpu_seconds(out: Path, runs: Sequence[Run]) -> dict[str, float]:
    """CPU-seconds of training by model, means over seeds."""
    seconds: dict[str, list[float]] = {}
    for run in runs:
        path = out / run.name / "cpu_seconds.json"
        if path.exists():
            seconds.setdefault(run.model, []).append(json.loads(path.read_text())["seconds"])
    return {model: sum(each) / len(each) for model, each in seconds.items()}
