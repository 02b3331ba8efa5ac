"""The paper's ablation in miniature: its models, and how their images are scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import scoring
import torch
from miniature.cells import cells
from miniature.report import RESULTS, TERMS_OF, report, terms_path, write_page  # noqa: F401 - parts of the study
from miniature.score import COMBINATIONS, real, train_scorer
from models import Cell, Run
from scoring import Prompts

from selfe import config
from selfe.checkpoint import state, verify
from selfe.data.shapes import ShapesData
from selfe.device import choose_precision
from selfe.flow import interpolate, predict_x0
from selfe.io import image_encode
from selfe.rng import SampleRNG
from selfe.system import System
from selfe.types import DTYPES

SIDE = 8  # pixels
CONTRASTS = {"plain": (1.0, 1.0), "contrast": (0.15, 1.0)}  # range of the contrast of the images of a kind
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


def kind(name: str) -> str:
    """Of the images that a config trains on: plain, or of varied contrast."""
    return "contrast" if name.startswith("contrast") else "plain"


def prompts(count: int) -> Prompts:
    """The captions in turn, with whether they were trained as categories."""
    held_out = {combination.prompt for combination in ShapesData().combinations["val"]}
    captions = [COMBINATIONS[i % len(COMBINATIONS)].prompt for i in range(count)]
    return Prompts(captions, ["held_out" if caption in held_out else "trained" for caption in captions])


def evaluation(out: Path, name: str, count: int) -> dict[str, Any]:
    """The section `evaluation` of the models of a kind, which share a folder of features."""
    section = config.load(Path(__file__).with_name("evaluate.yaml"))["evaluation"]
    section["extractors"][scoring.JUDGE]["params"]["weights"] = str(scorer_path(out, name))
    reference = scoring.real_folder(out, f"reference_{name}", count)
    section |= {"reference": str(reference / "manifest.tsv"), "base_dir": str(reference)}
    return section | {"feature_dir": str(out / "features")}


def scorer_path(out: Path, name: str) -> Path:
    """File of the classifier for the images of a kind."""
    return out / f"scorer_{name}" / "scorer.safetensors"


def prepare(out: Path, runs: list[Run], count: int) -> None:
    """Train the classifiers, write the reference of FD and evaluate other real images: shared by all models."""
    for name in dict.fromkeys(kind(run.config) for run in runs):
        data = ShapesData(contrast=CONTRASTS[name])
        train_scorer(data, scorer_path(out, name))

        # four times as many as there are images of a model
        folder = scoring.real_folder(out, f"reference_{name}", count)
        write_reference(folder, real_images(data, 4 * count, "reference", name), prompts(4 * count))
        images = real_images(data, count, "real", name)
        scoring.evaluate_real(
            scoring.real_folder(out, f"real_{name}", count), images, prompts(count), evaluation(out, name, count)
        )


def real_images(data: ShapesData, count: int, *key: str) -> torch.Tensor:
    """Real images (count, 3, H, W) of the captions in turn."""
    images, _ = real(data, np.arange(count) % len(COMBINATIONS), *key)
    return images


def write_reference(folder: Path, images: torch.Tensor, captions: Prompts) -> None:
    """Write real images (n, 3, H, W) and their manifest, unless this was done before."""
    manifest = folder / "manifest.tsv"
    if manifest.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (image, caption) in enumerate(zip(images, captions.captions, strict=True)):
        image_encode.to_image(image).save(folder / f"{number:05d}.png")
        lines.append(f"{number:05d}.png\t{caption}\n")
    image_encode.write(manifest, "".join(lines).encode())


def evaluate(run: Run, out: Path, count: int) -> None:
    """Generate and evaluate images for every sampling setting; measure the terms of one model."""
    scoring.evaluate(run, out, prompts(count), SIDE, evaluation(out, kind(run.config), count))
    if run.name == TERMS_OF and not terms_path(out).exists():
        system, net = load(out / run.name)
        np.savez_compressed(terms_path(out), **terms(system, net, ShapesData()))


# ---- the terms of the objective ----


def load(folder: Path) -> tuple[System, torch.nn.Module]:
    """System of a finished run, and its denoiser with EMA weights in the precision that the machine is fast in."""
    settings = config.load(folder / "config.yaml")
    with torch.device("meta"):
        system = config.build(settings, "system")
    net = system.backbone.to_empty(device="cpu").requires_grad_(False)
    state.load_weights(verify.find(folder / "checkpoints"), net, "ema")
    system.load_encoders(torch.device("cpu"))
    return system, net.to(DTYPES[choose_precision("auto", torch.device("cpu"))])


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
