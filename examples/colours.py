"""An extractor: colours on a coarse grid, and whether an image has the colours that its caption names. No weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from selfe.types import check_range

NAMES = {"red": (0.7, -0.7, -0.7), "green": (-0.7, 0.7, -0.7), "blue": (-0.7, -0.7, 0.7), "yellow": (0.7, 0.7, -0.7)}


class Colours:
    has_texts = False

    def __init__(self, grid: int = 4, tolerance: float = 0.4):
        """
        Args:
            grid: features are the mean colours of grid x grid fields.
            tolerance: distance in RGB within which a pixel has a named colour.
        """
        check_range("grid", grid, 1, 64)
        check_range("tolerance", tolerance, 0, 4)
        self.grid, self.tolerance = grid, tolerance

    def record(self) -> dict[str, Any]:
        return {"grid": self.grid, "tolerance": self.tolerance}

    def load(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, images: Sequence[Tensor], captions: Sequence[str]) -> dict[str, Tensor]:
        """B x (3, H, W) -> `features` (B, 3 grid^2); the score `colours` (B,): 1 if all named colours are there."""
        pairs = [(image.to(self.device), caption.split()) for image, caption in zip(images, captions, strict=True)]
        features = [F.adaptive_avg_pool2d(image, self.grid).flatten() for image, _ in pairs]
        right = [all(self.shows(image, word) for word in words if word in NAMES) for image, words in pairs]
        return {"features": torch.stack(features), "colours": torch.tensor(right).float()}

    def shows(self, image: Tensor, name: str) -> bool:
        """Whether a pixel has this colour."""
        distances = (image - torch.tensor(NAMES[name], device=image.device)[:, None, None]).norm(dim=0)
        return distances.min().item() <= self.tolerance
