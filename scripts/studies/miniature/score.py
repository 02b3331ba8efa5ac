"""Scores of the miniature: a small classifier, trained on real images of shapes, and the scores of an image by it.

An image is "ok" if shape, foreground and background all match the caption. The classifier has a fifth shape class for
invalid images: blends (of images of different captions or of the same one), shuffled patches, and noise. A blurred
average over possible positions, the typical failure of a step that is too long, is therefore not counted as correct.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from selfe.data.shapes import COLOURS, COMBINATIONS, SHAPES, ShapesData
from selfe.errors import UserError
from selfe.log import Progress
from selfe.rng import philox

INVALID = len(SHAPES)
CLASSES = (len(SHAPES) + 1, len(COLOURS), len(COLOURS))
NAMES = tuple(map(list, (SHAPES, COLOURS, COLOURS)))
FEATURES = 64
TARGETS = torch.tensor(
    [[names.index(value) for names, value in zip(NAMES, vars(c).values(), strict=True)] for c in COMBINATIONS]
)


class Scorer(nn.Module):
    """Images (B, 3, H, W) -> features (B, 64), logits of shape, foreground and background, centre (B, 2)."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.GELU(),
            nn.Conv2d(32, 48, 3, padding=1), nn.GELU(),
            nn.Conv2d(48, 48, 3, stride=2, padding=1), nn.GELU(),
            nn.Flatten(), nn.LazyLinear(128), nn.GELU(), nn.Linear(128, FEATURES),
        )  # fmt: skip
        self.heads = nn.Linear(FEATURES, sum(CLASSES) + 2)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        features = self.trunk(images)
        *logits, centre = self.heads(F.gelu(features)).split([*CLASSES, 2], dim=1)
        return features, logits, centre


def real(data: ShapesData, which: np.ndarray, *key) -> tuple[Tensor, Tensor]:
    """Real images (n, 3, H, W) of these combinations, and centres (n, 2) of their shapes in units of the image size."""
    look = data.look(philox(*key).random((len(which), 11)))
    images = data.draw([COMBINATIONS[i] for i in which], look)
    return images, torch.from_numpy(look.centre / data.size).float()


def new_scorer(size: int) -> Scorer:
    """A classifier of images of size x size pixels, untrained."""
    scorer = Scorer()
    scorer(torch.zeros(1, 3, size, size))
    return scorer


def load_scorer(path: Path, size: int) -> Scorer:
    """The classifier of a file. Raises UserError if there is none."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; scripts/studies/run.py miniature trains it")
    scorer = new_scorer(size)
    scorer.load_state_dict(load_file(path))
    return scorer.eval().requires_grad_(False)


def train_scorer(data: ShapesData, path: Path, steps: int = 2000) -> None:
    """Train the classifier and save it to `path`, unless the file exists."""
    if path.exists():
        return
    torch.manual_seed(0)
    scorer = new_scorer(data.size)
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    progress = Progress("scorer", steps)
    for step in range(steps):
        # real images with noise, and invalid ones
        which = philox("scorer", step).integers(len(COMBINATIONS), size=192)
        images, centres = real(data, which, "scorer pictures", step)
        images = images + 0.05 * torch.randn_like(images)
        targets = TARGETS[which]
        bad = torch.cat([invalid(images), mush(data, which, step)])
        _, logits, centre = scorer(torch.cat([images, bad]))

        # the shape head sees all images; centre and colours are defined for real ones only
        shapes = torch.cat([targets[:, 0], torch.full((len(bad),), INVALID)])
        loss = F.cross_entropy(logits[0], shapes) + F.mse_loss(centre[: len(which)], centres)
        for head in (1, 2):
            loss = loss + F.cross_entropy(logits[head][: len(which)], targets[:, head])

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.advance(1, f"loss {loss.item():.4f}")
    progress.close()

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(scorer.state_dict(), path)


def invalid(images: Tensor) -> Tensor:
    """Invalid images, a third as many as given: blends of two, shuffled patches, strong noise."""
    blended, shuffled, noisy = images.roll(1, 0).chunk(3)

    # blends of two images, mostly of different captions
    blended = blended[: len(blended) // 2 * 2]
    share = 0.3 + 0.4 * torch.rand(len(blended), 1, 1, 1)
    blended = share * blended + (1 - share) * blended.flip(0)

    # 2 x 2 patches in random order
    patches = F.pixel_unshuffle(shuffled, 2)
    batch, channels, rows, columns = patches.shape
    order = torch.argsort(torch.rand(batch, rows * columns), dim=1)[:, None].expand(-1, channels, -1)
    patches = patches.flatten(2).gather(2, order).view(batch, channels, rows, columns)

    noisy = noisy + (0.4 + 0.4 * torch.rand(len(noisy), 1, 1, 1)) * torch.randn_like(noisy)
    bad = torch.cat([blended, F.pixel_shuffle(patches, 2), noisy])
    return bad[torch.randperm(len(bad))[: len(images) // 3]]


def mush(data: ShapesData, which: np.ndarray, *key, count: int = 4) -> Tensor:
    """Weighted means of `count` images of one caption each, a third as many as `which`."""
    which = which[: len(which) // 3]
    images, _ = real(data, np.repeat(which, count), "mush", *key)
    weights = torch.from_numpy(philox("weights", *key).dirichlet((2.0,) * count, size=len(which))).float()
    weights = (weights.clamp(max=0.5) + 0.05)[:, :, None, None, None]
    return (weights * images.unflatten(0, (-1, count))).sum(dim=1) / weights.sum(dim=1)


@torch.no_grad()
def score(scorer: Scorer, images: Tensor, which: Sequence[int]) -> dict[str, Tensor]:
    """Scores per image (n,) of images (n, 3, H, W) in [-1, 1] of these combinations.

    Returns:
        shape, foreground, background: whether they are right; ok: whether all three are; features (n, 64); centre_x,
        centre_y: the shape's centre, pixels; red, green, blue: deviation of the background from its nominal colour;
        gamut: fraction of values at the limits -1 and 1, to which image files cut values off; log_norm.
    """
    features, logits, centre = scorer(images)
    right = torch.stack([x.argmax(dim=1) for x in logits], dim=1) == TARGETS[torch.as_tensor(which)]
    scores = {"features": features, "ok": right.all(dim=1)}
    scores |= dict(zip(("shape", "foreground", "background"), right.unbind(dim=1), strict=True))
    scores |= dict(zip(("centre_x", "centre_y"), (centre * images.shape[-1]).unbind(dim=1), strict=True))

    # the background covers more than half of every image, so its colour is the median
    nominal = torch.tensor([COLOURS[COMBINATIONS[i].background] for i in which])
    deviation = images.flatten(2).median(dim=2).values - nominal
    scores |= dict(zip(("red", "green", "blue"), deviation.unbind(dim=1), strict=True))

    scores["gamut"] = (images.abs() >= 1).float().mean(dim=(1, 2, 3))
    scores["log_norm"] = images.flatten(1).norm(dim=1).log()
    return scores
