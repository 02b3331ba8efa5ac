"""Extractors without weights, for tests of evaluation: as a part outside of selfe, named by its dotted path."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class Thumbnails:
    """Features of an image: a random projection of its thumbnail. A caption's text is the mean of its words' hashes."""

    has_texts = True

    def __init__(self, width: int = 12, seed: int = 0, fail_after: int | None = None):
        """
        Args:
            width: number of features.
            seed: of the projection.
            fail_after: the process is killed in the call after so many.
        """
        self.width, self.seed, self.calls, self.fail_after = width, seed, 0, fail_after

    def record(self) -> dict[str, Any]:
        return {"seed": self.seed, "width": self.width}

    def load(self, device: torch.device) -> None:
        self.device = device
        generator = torch.Generator().manual_seed(self.seed)
        self.projection = torch.randn(3 * 8 * 8, self.width, generator=generator).to(device) / 8

    def __call__(self, images: Sequence[Tensor], captions: Sequence[str]) -> dict[str, Tensor]:
        if self.calls == self.fail_after:
            os._exit(1)
        self.calls += 1
        small = torch.cat([F.interpolate(image[None].to(self.device), (8, 8), mode="area") for image in images])
        features = small.flatten(1) @ self.projection
        return {"features": features, "aligned": features, "bright": (small.mean(dim=(1, 2, 3)) > 0).float()}

    def texts(self, captions: Sequence[str]) -> Tensor:
        generators = (torch.Generator().manual_seed(sum(caption.encode())) for caption in captions)
        return torch.stack([torch.randn(self.width, generator=generator) for generator in generators])


class NoFeatures(Thumbnails):
    """An extractor that lacks the required output."""

    def __call__(self, images: Sequence[Tensor], captions: Sequence[str]) -> dict[str, Tensor]:
        return {"bright": torch.zeros(len(images))}


class Judge(Thumbnails):
    """An extractor that has scores only, and knows some captions."""

    has_texts = False
    scores_only = True

    def __init__(self, captions: list[str]):
        """
        Args:
            captions: those that it knows.
        """
        super().__init__()
        self.captions = captions

    def record(self) -> dict[str, Any]:
        return super().record() | {"scores": "judged"}

    def __call__(self, images: Sequence[Tensor], captions: Sequence[str]) -> dict[str, Tensor]:
        assert set(captions) <= set(self.captions)
        output = super().__call__(images, captions)
        return {"features": output["features"], "judged": output["bright"]}
