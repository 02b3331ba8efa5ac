"""Scores of the miniature: a small classifier, trained on real images of shapes, and metrics computed with it.

An image is "ok" if shape, foreground and background all match the caption. The classifier has a fifth shape class for
invalid images: blends (of images of different captions or of the same one), shuffled patches, and noise. A blurred
average over possible positions, the typical failure of a step that is too long, is therefore not counted as correct.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from selfe.data.shapes import COLOURS, COMBINATIONS, SHAPES, Combination, ShapesData
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


def trained_scorer(data: ShapesData, path: Path, steps: int = 2000) -> Scorer:
    """Load the classifier from `path`; train and save it first if the file does not exist."""
    torch.manual_seed(0)
    scorer = Scorer()
    scorer(torch.zeros(1, 3, data.size, data.size))
    if path.exists():
        scorer.load_state_dict(load_file(path))
        return scorer.eval().requires_grad_(False)

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
    return scorer.eval().requires_grad_(False)


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
def score(scorer: Scorer, images: Tensor, which: np.ndarray) -> dict[str, np.ndarray]:
    """Scores per image.

    Returns:
        right (n, 3) by attribute; features (n, 64); place (n, 2), the shape's centre in pixels; background (n, 3),
        deviation from the nominal colour; gamut (n,), the fraction of values outside of [-1, 1]; norm (n,).
    """
    features, logits, centre = scorer(images.clamp(-1, 1))  # clipped as in an image file
    right = torch.stack([x.argmax(dim=1) for x in logits], dim=1) == TARGETS[which]

    # the background covers more than half of every image, so its colour is the median
    ground = images.flatten(2).median(dim=2).values
    nominal = torch.tensor([COLOURS[COMBINATIONS[i].background] for i in which])

    return {
        "right": right.numpy(),
        "features": features.numpy(),
        "place": (centre * images.shape[-1]).numpy(),
        "background": (ground - nominal).numpy(),
        "gamut": (images.abs() > 1).float().mean(dim=(1, 2, 3)).numpy(),
        "norm": images.flatten(1).norm(dim=1).numpy(),
    }


def held_out(data: ShapesData) -> np.ndarray:
    """Indices of the combinations held out from training."""
    unseen: tuple[Combination, ...] = data.combinations["val"]
    return np.array([COMBINATIONS.index(c) for c in unseen])
