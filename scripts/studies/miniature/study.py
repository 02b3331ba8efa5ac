"""The paper's ablation in miniature: its models, and how their images are scored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from miniature.cells import cells
from miniature.report import report  # noqa: F401 - a part of the study
from miniature.score import COMBINATIONS, score, trained_scorer
from models import Cell, Run, draw, load

from selfe.data.shapes import ShapesData
from selfe.flow import interpolate, predict_x0
from selfe.rng import SampleRNG
from selfe.system import System

NAME, CONFIGS = "miniature", "configs/mini"
COUNT, QUICK_COUNT = 1024, 512  # images per sampling setting
SEEDS = 3
QUICK = (1200, 48)  # steps, batch size; as in the ablations
MAIN = ("flow_matching", "selfe", "selfe_floor", "floor_late")
SHORT = (
    "short_flow_matching", "short_selfe", "short_floor", "wrong_sign", "no_self_evaluation", "lambda_1", "floor_aux",
    "aux_late", "no_normalisation", "aux_from_start", "selfe_late",
)  # fmt: skip
CONTRAST = ("contrast_flow_matching", "contrast_selfe", "contrast_floor")


def plan(seeds: int, quick: bool) -> list[Run]:
    """All runs, the most important first."""
    runs = [
        Run(name, seed, cells(name, seed == 1 and not quick), CONFIGS) for seed in range(1, seeds + 1) for name in MAIN
    ]
    if quick:
        return runs + [Run(name, 1, (Cell(2),), CONFIGS) for name in ("wrong_sign", "no_self_evaluation")]

    # ablations: one seed, fewer sampling settings
    few = []
    for name in CONTRAST + SHORT:
        chosen = tuple(cell for cell in cells(name, False) if cell.guidance < 3 and cell.steps < 32)
        few.append(Run(name, 1, chosen, CONFIGS))
    return [*runs, Run("flow_matching_long", 1, cells("flow_matching_long", False), CONFIGS), *few]


def contrast(name: str) -> tuple[float, float]:
    """Range of the contrast of the images that a config trains on."""
    return (0.15, 1.0) if name.startswith("contrast") else (1.0, 1.0)


def scorer_path(out: Path, name: str) -> Path:
    """File of the classifier for the images of a config."""
    return out / ("scorer_contrast" if name.startswith("contrast") else "scorer") / "scorer.safetensors"


def prepare(out: Path, runs: list[Run]) -> None:
    """Train the classifiers, which the evaluations of all models share."""
    for name in dict.fromkeys("contrast" if run.config.startswith("contrast") else "" for run in runs):
        trained_scorer(ShapesData(contrast=contrast(name)), scorer_path(out, name))


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
    prompts = [COMBINATIONS[i].prompt for i in which]

    for cell in todo:
        images = draw(system, net, cell, prompts, 1000 + run.seed, size)
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
