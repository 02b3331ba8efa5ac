"""GenEval (arXiv 2310.11513): a folder per prompt for its scorer, whose result has a line per image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch

from selfe.benchmarks import scorer
from selfe.benchmarks.prompt_sets import Prompt, lines
from selfe.benchmarks.scorer import Sample
from selfe.errors import UserError
from selfe.evaluation import statistics
from selfe.evaluation.statistics import Estimate
from selfe.io import image_encode


class GenEval:
    """`evaluation/evaluate_images.py`: Mask2Former of mmdet finds the objects, CLIP names their colours."""

    title = "GenEval"
    repository = "https://github.com/djghosh13/geneval"
    prompt_set = "geneval"
    variables: ClassVar = {"MODELS": "the folder of evaluation/download_models.sh"}
    suffix = ".jsonl"
    setup = ""
    command = (
        '$PYTHON "$SCORER/evaluation/evaluate_images.py" "images/$1" --outfile "results/$1.partial.jsonl" '
        '--model-path "$MODELS"'
    )

    def write(self, folder: Path, samples: Sequence[Sample]) -> str:
        """00000/metadata.jsonl and 00000/samples/0000.png. See `Scorer`."""
        for sample in samples:
            if sample.path.suffix != ".png":
                raise UserError(f"{sample.path}: GenEval reads png files only; sample with inferencer.format=png")
            place = folder / sample.prompt.id
            if sample.number == 0:
                image_encode.write(place / "metadata.jsonl", (json.dumps(sample.prompt.facts) + "\n").encode())
            scorer.link(sample.path, place / f"samples/{sample.number:04d}.png")
        return ""

    def read(self, path: Path, prompts: Sequence[Prompt], count: int, replicates: int) -> dict[str, Estimate]:
        """Shares of correct images, of all and by task; `overall`, their mean over the tasks. See `Scorer`."""
        try:
            rows = lines(path)
            images = [(Path(row["filename"]).parts[-3], row["tag"], bool(row["correct"])) for row in rows]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise scorer.broken(path, f"not a result of GenEval ({error})") from error
        if len(images) != count:
            raise scorer.broken(path, f"has {len(images)} of {count} images")
        return shares(sorted(images), replicates)


def shares(images: Sequence[tuple[str, str, bool]], replicates: int) -> dict[str, Estimate]:
    """The numbers of GenEval's summary from (prompt, task, whether it is correct) of every image."""
    correct = torch.tensor([float(is_correct) for _, _, is_correct in images])
    by_task: dict[str, list[int]] = {}
    by_prompt: dict[str, list[int]] = {}
    for index, (prompt, task, _) in enumerate(images):
        by_task.setdefault(task, []).append(index)
        by_prompt.setdefault(prompt, []).append(index)

    def share(indices: Sequence[int]) -> Estimate:
        groups = [images[index][0] for index in indices]
        return scorer.bootstrap_of(groups, replicates).mean(correct[list(indices)])

    tasks = {task: share(indices) for task, indices in sorted(by_task.items())}
    any_correct = torch.stack([correct[indices].max() for indices in by_prompt.values()])
    return {
        "overall": statistics.mean_of(list(tasks.values())),
        "correct": share(range(len(images))),
        "correct_prompts": scorer.bootstrap_of(list(by_prompt), replicates).mean(any_correct),
        **{f"correct/{task}": estimate for task, estimate in tasks.items()},
    }
