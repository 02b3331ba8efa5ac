"""Any-step objectives side by side on the miniature: equal steps, and equal cost."""

from __future__ import annotations

from pathlib import Path

from miniature import study as miniature
from miniature.study import prepare, prompts  # noqa: F401 - the judge and the images of the miniature
from models import Run
from objectives.cells import COST, cells
from objectives.report import EQUAL_COST, RESULTS, report, write_page  # noqa: F401 - parts of the study

NAME, CONFIGS = "objectives", "configs/mini"
COUNT, QUICK_COUNT = 1024, 512  # images per sampling setting
SEEDS = 3
QUICK = miniature.QUICK  # steps, batch size


def plan(seeds: int, quick: bool) -> list[Run]:
    """Every objective for equal steps; then for the cost of flow matching, the costlier ones in fewer steps."""
    runs = []
    for seed in range(1, seeds + 1):
        runs += [Run(name, seed, cells(name, not quick), CONFIGS) for name in COST]
        if not quick:
            dearer = {name: cost for name, cost in COST.items() if cost > 1}
            runs += [Run(n, seed, cells(n, False), CONFIGS, EQUAL_COST, 1 / cost) for n, cost in dearer.items()]
    return runs


def evaluate(run: Run, out: Path, count: int) -> None:
    """Generate and evaluate images for every sampling setting."""
    miniature.evaluate(run, out, count)
