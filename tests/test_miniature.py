"""The proof in its smallest form: pictures of one pixel, with the whole product around them."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import torch

from selfe import checkpoint, dist
from selfe.backbones.mmdit import MMDiT
from selfe.draws import Draws, generator
from selfe.encoders.identity import Identity
from selfe.encoders.words import Words
from selfe.objectives.self_evaluation import SelfEvaluation
from selfe.samplers.euler import Euler
from selfe.system import System
from selfe.train import Trainer
from selfe.types import Batch

CAPTIONS = tuple("abcdef")
GRID = torch.tensor(list(product((-0.8, 0.0, 0.8), repeat=3)))
OWN = torch.from_numpy(generator("places").permutation(len(GRID))[: 2 * len(CAPTIONS)]).view(-1, 2)  # of each caption
NOISE = 0.05


class Pixels:
    """A caption stands for two colours out of 27; what lies between them belongs to other captions or to none."""

    has_val = False

    def batch(self, seed: int, step: int, total: int, positions: range, split: str) -> Batch:
        source = [generator(seed, step, position, "pixel") for position in positions]
        which = [(g.integers(len(CAPTIONS)), g.integers(2)) for g in source]
        jitter = torch.from_numpy(np.stack([g.standard_normal(3, "float32") for g in source]))
        colours = torch.stack([GRID[OWN[i, j]] for i, j in which]) + NOISE * jitter
        return Batch(tuple(colours[:, :, None, None]), tuple(CAPTIONS[i] for i, _ in which), tuple(positions), ())


def system(**objective) -> System:
    backbone = MMDiT(
        patch_dim=3, text_dim=16, pooled_dim=16, width=64, num_heads=2, num_double_blocks=1, num_single_blocks=1,
        rope_axes=(8, 12, 12),
    )  # fmt: skip
    return System(backbone, Words(16), Identity(1), SelfEvaluation(**objective))


def hits(folder: Path, seed: int, num_steps: int = 2, max_steps: int = 1200, **objective) -> float:
    """Train; the share of pictures, drawn in `num_steps`, that are nearest to a colour of their caption."""
    settings = {"aux_start_step": None, "lam_max": 10.0, "tau_steps": max_steps // 4} | objective
    with torch.device("meta"):
        trained, fresh = system(**settings), system(**settings)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        str(folder), max_steps, 64, 64, lr=2e-3, min_lr=1e-4, warmup_steps=40, decay_start=max_steps // 2,
        weight_decay=0.0, ema_decay=0.99, ema_warmup=True, precision="fp32", activation_checkpointing=False,
        num_workers=0, checkpoint_every=max_steps,
    )  # fmt: skip
    with dist.world() as world:
        trainer.fit(trained, Pixels(), seed, world)
    net = fresh.backbone.to_empty(device="cpu").requires_grad_(False)
    checkpoint.load_weights(checkpoint.find(folder / "checkpoints"), net, "ema")
    fresh.load_encoders(torch.device("cpu"))
    prompts = [caption for caption in CAPTIONS for _ in range(256)]
    drawn = fresh.generate(
        net,
        prompts,
        [(1, 1)] * len(prompts),
        Draws.of_pictures([(0, prompt, i) for i, prompt in enumerate(prompts)]),
        sampler=Euler(),
        num_steps=num_steps,
        cfg_scale=1.0,
        s_ratio=1.0 if settings.get("p_equal") == 1 else 0.0,
    )
    nearest = torch.cdist(torch.stack(drawn).flatten(1), GRID).argmin(dim=1)
    return (nearest[:, None] == OWN.repeat_interleave(256, dim=0)).any(dim=1).float().mean().item()


def test_self_evaluation_beats_flow_matching_at_two_steps(tmp_path):
    """The same seed, data, times and noise; only the share of samples with s < t differs.

    When this was written, seed 1 gave .70 against .59 (1200 steps) and .66 against .57 (600 steps) on 768 pictures:
    a standard error of .025 for the difference. Other seeds have not been measured.
    """
    flow_matching = hits(tmp_path / "flow_matching", seed=1, p_equal=1.0)
    self_evaluation = hits(tmp_path / "self_evaluation", seed=1, p_equal=0.5)
    assert flow_matching > 0.4  # it did learn; chance is 2 / 27
    assert self_evaluation > flow_matching + 0.05
