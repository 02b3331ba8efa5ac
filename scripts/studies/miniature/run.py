"""The paper's ablation in miniature: train every variant, sample from each, score the images, write docs/miniature.*.

    .venv/bin/python scripts/studies/miniature/run.py            all variants, three seeds
    .venv/bin/python scripts/studies/miniature/run.py --quick    one seed, short runs, two negative controls

Two runs in parallel, one thread each. Results are kept in runs/miniature; run the same command again to resume.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from cells import Cell, cells
from page import pyplot
from report import report
from score import COMBINATIONS, score, trained_scorer

from selfe import config, log
from selfe.checkpoint import state, verify
from selfe.data.shapes import ShapesData
from selfe.device import choose_precision
from selfe.errors import UserError
from selfe.flow import interpolate, predict_x0
from selfe.rng import SampleRNG
from selfe.samplers.renoise import Renoise
from selfe.system import System
from selfe.types import DTYPES

ROOT = Path(__file__).parents[3]
BATCH = 256


@dataclass(frozen=True)
class Run:
    """One model: a config of configs/mini, a seed, and the sampling settings to evaluate."""

    config: str
    seed: int
    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        return f"{self.config}_{self.seed}"


QUICK = (1200, 48)  # steps, batch size; as in the ablations
MAIN = ("flow_matching", "selfe", "selfe_floor", "floor_late")
SHORT = (
    "short_flow_matching", "short_selfe", "short_floor", "wrong_sign", "no_self_evaluation", "lambda_1", "floor_aux",
    "aux_late", "no_normalisation", "aux_from_start", "selfe_late",
)  # fmt: skip
CONTRAST = ("contrast_flow_matching", "contrast_selfe", "contrast_floor")


def plan(seeds: int, quick: bool) -> list[Run]:
    """All runs, the most important first."""
    runs = [Run(name, seed, cells(name, seed == 1 and not quick)) for seed in range(1, seeds + 1) for name in MAIN]
    if quick:
        return runs + [Run(name, 1, (Cell(2),)) for name in ("wrong_sign", "no_self_evaluation")]

    # ablations: one seed, fewer sampling settings
    few = [
        Run(name, 1, tuple(c for c in cells(name, False) if c.guidance < 3 and c.steps < 32))
        for name in CONTRAST + SHORT
    ]
    return [*runs, Run("flow_matching_long", 1, cells("flow_matching_long", False)), *few]


def shortened(name: str, steps: int, batch: int) -> list[str]:
    """Overrides that shorten a run to `steps` steps of `batch` images, and scale its schedules in proportion."""
    settings = config.load(ROOT / f"configs/mini/{name}.yaml")
    trainer, objective = settings["trainer"], settings["system"]["objective"].get("params", {})

    scale = steps / trainer["max_steps"]
    lengths = {f"trainer.{key}": trainer[key] for key in ("max_steps", "decay_start")}
    lengths |= {
        f"system.objective.params.{key}": objective[key] for key in ("start_step", "tau_steps") if key in objective
    }
    sizes = [f"trainer.{key}={batch}" for key in ("total_batch_size", "micro_batch_size")]
    return sizes + [f"{key}={round(scale * value)}" for key, value in lengths.items()]


def contrast(name: str) -> tuple[float, float]:
    """Range of the contrast of the images that a config trains on."""
    return (0.15, 1.0) if name.startswith("contrast") else (1.0, 1.0)


def scorer_path(out: Path, name: str) -> Path:
    """File of the classifier for the images of a config."""
    return out / ("scorer_contrast" if name.startswith("contrast") else "scorer") / "scorer.safetensors"


def train(run: Run, out: Path, short: tuple[int, int] | None) -> None:
    """Run `selfe.train` in a subprocess, resuming an interrupted run; accumulates its CPU seconds in a file."""
    folder = out / run.name
    if (folder / "cpu_seconds.json").exists() and json.loads((folder / "cpu_seconds.json").read_text())["done"]:
        return

    folder.mkdir(parents=True, exist_ok=True)
    arguments = [f"configs/mini/{run.config}.yaml", f"seed={run.seed}", f"trainer.output_dir={folder}"]
    arguments += shortened(run.config, *short) if short else []

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with (folder / "train.log").open("a") as log:
        done = subprocess.run([sys.executable, "-m", "selfe.train", *arguments], cwd=ROOT, stdout=log, stderr=log)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)

    # CPU seconds, those of earlier interrupted attempts included
    path = folder / "cpu_seconds.json"
    seconds = json.loads(path.read_text())["seconds"] if path.exists() else 0
    seconds += after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    path.write_text(json.dumps({"seconds": round(seconds, 1), "done": done.returncode == 0}) + "\n")
    if done.returncode:
        raise SystemExit(f"{run.name}: training failed; see {folder / 'train.log'}")


def load(folder: Path) -> tuple[System, torch.nn.Module]:
    """System of a finished run, and its denoiser with EMA weights in the precision that the machine is fast in."""
    settings = config.load(folder / "config.yaml")
    with torch.device("meta"):
        system = config.build(settings, "system")
    net = system.backbone.to_empty(device="cpu").requires_grad_(False)
    state.load_weights(verify.find(folder / "checkpoints"), net, "ema")
    system.load_encoders(torch.device("cpu"))
    return system, net.to(DTYPES[choose_precision("auto", torch.device("cpu"))])


def draw(system: System, net: torch.nn.Module, cell: Cell, which: np.ndarray, seed: int, size: int) -> torch.Tensor:
    """Images (n, 3, size, size) of these combinations; same noise for all models and settings of a seed."""
    images = []
    for start in range(0, len(which), BATCH):
        numbers = range(start, min(start + BATCH, len(which)))
        prompts = [COMBINATIONS[which[i]].prompt for i in numbers]
        rng = SampleRNG.of_images([(seed, prompt, i) for prompt, i in zip(prompts, numbers, strict=True)])
        images += system.generate(
            net,
            prompts,
            [(size, size)] * len(numbers),
            rng,
            sampler=Renoise(cell.eta),
            num_steps=cell.steps,
            cfg_scale=cell.guidance,
            s_ratio=cell.s_ratio,
        )
    return torch.stack(images)


def evaluate(run: Run, out: Path, count: int, size: int = 8) -> None:
    """Generate and score images for every sampling setting without a result file."""
    folder = out / run.name / f"cells_{count}"
    folder.mkdir(exist_ok=True)
    todo = [cell for cell in run.cells if not (folder / f"{cell.name}.npz").exists()]
    maps = out / run.name / "terms.npz"
    if not todo and maps.exists():
        return

    system, net = load(out / run.name)
    data = ShapesData(size, contrast=contrast(run.config))
    scorer = trained_scorer(data, scorer_path(out, run.config))
    which = np.arange(count) % len(COMBINATIONS)

    for cell in todo:
        images = draw(system, net, cell, which, 1000 + run.seed, size)
        # scores of all images, and the first image of each combination for display
        scores = score(scorer, images, which) | {"images": images[: len(COMBINATIONS)].numpy()}
        partial = folder / f"{cell.name}.partial.npz"
        np.savez_compressed(partial, **scores)
        partial.rename(folder / f"{cell.name}.npz")

    if not maps.exists():
        np.savez_compressed(maps, **terms(system, net, data))


@torch.no_grad()
def terms(system: System, net: torch.nn.Module, data: ShapesData, places: int = 10) -> dict[str, np.ndarray]:
    """Mean squares of the data term and of the self-evaluation term over (t, s), per value and in units of velocity."""
    # one training batch, with the same noise at every (t, s)
    batch = data.batch(0, 0, range(64), range(64), "train")
    rng = SampleRNG.of_step(0, 0, batch.positions)
    conds = system.encode({"cond": list(batch.prompts), "null": [""] * len(batch.prompts)})
    x0 = system.autoencoder.encode(batch.images, rng)
    noise = rng.normal_like("noise", x0)

    axis = np.linspace(0.05, 0.95, places)
    means = {
        "axis": axis,
        "data": np.full((places, places), np.nan),
        "self_evaluation": np.full((places, places), np.nan),
    }
    for i, t in enumerate(axis):
        for j, s in enumerate(axis[: i + 1]):
            t_all, s_all = (torch.full((len(x0),), float(value)) for value in (t, s))
            x_t = x0.with_tokens(interpolate(x0.tokens, noise, t_all, x0))

            # delta is in units of x0: divided by t, in units of velocity
            v = net(x_t, t_all, s_all, conds["cond"])
            x0_hat = x0.with_tokens(predict_x0(x_t.tokens, v, t_all, x0))
            delta, _ = system.objective.self_evaluate(net, net, x0_hat, s_all, conds, rng, 0)
            means["data"][i, j] = (v - (noise - x0.tokens)).square().mean()
            means["self_evaluation"][i, j] = (delta / t).square().mean()
    return means


def work(run: Run, out: Path, count: int, short: tuple[int, int] | None) -> tuple[str, float]:
    """Train and evaluate one model; returns its name and the wall-clock seconds."""
    began = time.monotonic()
    torch.set_num_threads(1)
    train(run, out, short)
    evaluate(run, out, count)
    return run.name, time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, shorter runs, two negative controls")
    parser.add_argument("--seeds", type=int, help="default 3, quick 1")
    parser.add_argument("--count", type=int, help="images per sampling setting (default 1024, quick 512)")
    parser.add_argument("--docs", action="store_true", help="write docs/ even with --quick")
    parser.add_argument("--report-only", action="store_true", help="write the report from existing results only")
    given = parser.parse_args()
    try:
        pyplot()  # the plots come last: a missing package is reported before hours of training
    except UserError as error:
        parser.error(str(error))

    out = ROOT / "runs" / ("miniature_quick" if given.quick else "miniature")
    seeds, count = given.seeds or (1 if given.quick else 3), given.count or (512 if given.quick else 1024)
    os.environ["OMP_NUM_THREADS"] = "1"
    runs = plan(seeds, given.quick)

    if not given.report_only:
        # the classifiers first: the worker processes share them
        for name in dict.fromkeys("contrast" if run.config.startswith("contrast") else "" for run in runs):
            trained_scorer(ShapesData(contrast=contrast(name)), scorer_path(out, name))

        log.print_line(f"{len(runs)} models, two in parallel")
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            waiting = [pool.submit(work, run, out, count, QUICK if given.quick else None) for run in runs]
            for number, future in enumerate(as_completed(waiting), 1):
                try:
                    name, seconds = future.result()
                except SystemExit:
                    pool.shutdown(wait=False, cancel_futures=True)  # the other model finishes, no new one starts
                    raise
                log.print_line(f"{number}/{len(runs)} {name}: {seconds / 60:.1f} minutes")

    command = f"scripts/studies/miniature/run.py{' --quick' * given.quick} --seeds {seeds} --count {count}"
    report(out, runs, count, command, ROOT / "docs" if given.docs or not given.quick else None)


if __name__ == "__main__":
    main()
