"""Words to images: its models, and how their images are scored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from emoji import judge
from emoji.cells import DATA, asked, cells
from emoji.judge import SIDE
from emoji.report import report  # noqa: F401 - a part of the study
from models import Run, draw, load

NAME, CONFIGS = "emoji", "configs/emoji"
COUNT, QUICK_COUNT = 1024, 256  # images per sampling setting
SEEDS = 2  # of the main models
QUICK = (1000, 64)  # steps, batch size
MAIN = ("flow_matching", "selfe_floor")
OTHERS = ("selfe", "floor_late")


def plan(seeds: int, quick: bool) -> list[Run]:
    """All runs, the most important first."""
    runs = [
        Run(name, seed, cells(name, seed == 1 and not quick), CONFIGS) for seed in range(1, seeds + 1) for name in MAIN
    ]
    return runs if quick else [*runs, *(Run(name, 1, cells(name, True), CONFIGS) for name in OTHERS)]


def prepare(out: Path, runs: list[Run]) -> None:
    """Unpack the images if this was not done before."""
    judge.unpack(DATA)


def evaluate(run: Run, out: Path, count: int) -> None:
    """Generate and score images for every sampling setting without a result file."""
    folder = out / run.name / f"cells_{count}"
    folder.mkdir(exist_ok=True)
    todo = [cell for cell in run.cells if not (folder / f"{cell.name}.npz").exists()]
    if not todo:
        return

    system, net = load(out / run.name)
    scorer, wanted = judge.load(), judge.joined(asked(count).values())
    trained = judge.real_images(DATA, "train").pixels

    for cell in todo:
        images = draw(system, net, cell, wanted.captions, 1000 + run.seed, SIDE)
        scores = judge.score(scorer, images, wanted.concepts, wanted.styles)
        scores |= {"nearest": judge.nearest(images, trained)}
        scores = {name: value.numpy() for name, value in scores.items()}
        scores |= {"images": ((images.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()}
        partial = folder / f"{cell.name}.partial.npz"
        np.savez_compressed(partial, **scores)
        partial.rename(folder / f"{cell.name}.npz")
