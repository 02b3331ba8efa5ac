"""Words to images: its models, and how their images are scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import scoring
from emoji import judge
from emoji.cells import DATA, asked, cells, prompts
from emoji.judge import SIDE
from emoji.report import RESULTS, report, write_page  # noqa: F401 - parts of the study
from models import Run

from selfe import config

NAME, CONFIGS = "emoji", "configs/emoji"
COUNT, QUICK_COUNT = 1024, 256  # images per sampling setting
SEEDS = 2  # of the main models
QUICK = (600, 32)  # steps, batch size
MAIN = ("flow_matching", "floor_late")
OTHERS = ("selfe", "selfe_floor")


def plan(seeds: int, quick: bool) -> list[Run]:
    """All runs, the most important first."""
    runs = [
        Run(name, seed, cells(name, seed == 1 and not quick), CONFIGS) for seed in range(1, seeds + 1) for name in MAIN
    ]
    return runs if quick else [*runs, *(Run(name, 1, cells(name, True), CONFIGS) for name in OTHERS)]


def evaluation(out: Path) -> dict[str, Any]:
    """The section `evaluation` of all models, which share a folder of features."""
    section = config.load(Path(__file__).with_name("evaluate.yaml"))["evaluation"]
    return section | {"feature_dir": str(out / "features")}


def prepare(out: Path, runs: list[Run], count: int) -> None:
    """Unpack the images if this was not done before, and evaluate real images of the same captions."""
    judge.unpack(DATA)
    real = judge.joined(asked(count).values())
    scoring.evaluate_real(scoring.real_folder(out, "real", count), real.pixels, prompts(count), evaluation(out))


def evaluate(run: Run, out: Path, count: int) -> None:
    """Generate and evaluate images for every sampling setting."""
    scoring.evaluate(run, out, prompts(count), SIDE, evaluation(out))
