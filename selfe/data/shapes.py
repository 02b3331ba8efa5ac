"""Procedural images of one coloured shape on a plain background, with captions that name shape and colours.

Needs no files: image number i is a function of (seed, i). Some combinations are held out of training, so that samples
for them show whether the model composes attributes or memorizes training images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from selfe.rng import philox
from selfe.types import Batch, Split, check_range

SHAPES = {"square": [(0.8, 0.8)], "cross": [(1.0, 0.33), (0.33, 1.0)], "plank": [(1.0, 0.4)], "pole": [(0.4, 1.0)]}
"""Each shape is a union of rectangles (half width, half height), in units of the radius."""
COLOURS = {"red": (0.7, -0.7, -0.7), "green": (-0.7, 0.7, -0.7), "blue": (-0.7, -0.7, 0.7), "yellow": (0.7, 0.7, -0.7)}
"""RGB in [-1, 1]."""
JITTER = 0.12  # maximum colour offset per channel and image


@dataclass(frozen=True)
class Combination:
    """The attributes that a caption describes."""

    shape: str
    foreground: str
    background: str

    @property
    def prompt(self) -> str:
        return f"{self.foreground} {self.shape} on {self.background}"


COMBINATIONS = tuple(Combination(*c) for c in product(SHAPES, COLOURS, COLOURS) if c[1] != c[2])


@dataclass(frozen=True)
class Look:
    """The attributes of B images that captions do not describe."""

    centre: np.ndarray  # (B, 2) column and row, pixels
    radius: np.ndarray  # (B,) pixels
    jitter: np.ndarray  # (B, 2, 3) added to the colours of shape and background
    contrast: np.ndarray  # (B,) factor on all pixel values


class ShapesData:
    """A new image for every sample of a run; validation uses the held-out combinations."""

    has_val = True

    def __init__(
        self,
        size: int = 8,
        held_out: int = 6,
        radius: tuple[float, float] = (0.3, 0.37),
        contrast: tuple[float, float] = (1.0, 1.0),
    ):
        """
        Args:
            size: height and width, pixels.
            held_out: number of the 48 combinations that never occur in training.
            radius: smallest and largest radius, in units of `size`.
            contrast: smallest and largest factor on pixel values, drawn log-uniformly; varies the image norms.
        """
        check_range("size", size, 1, 4096)
        check_range("contrast", contrast, 1e-6, 1)
        if not 0 <= held_out < len(COMBINATIONS):
            raise ValueError(f"held_out must be at least 0 and below {len(COMBINATIONS)}, got {held_out}")
        for name, (low, high) in {"radius": radius, "contrast": contrast}.items():
            if not 0 < low <= high:
                raise ValueError(f"{name} must be a range of positive numbers, got {low} to {high}")
        if radius[1] > 0.5:
            raise ValueError(f"radius must be at most 0.5 for the largest shape to fit, got {radius[1]}")

        self.size = self.multiple = size
        self.radius, self.contrast = radius, contrast

        # the same held-out combinations in every run, independent of its seed
        shuffled = [COMBINATIONS[i] for i in philox("held out").permutation(len(COMBINATIONS))]
        self.combinations = {"val": tuple(shuffled[:held_out]), "train": tuple(shuffled[held_out:])}
        if not held_out:
            self.combinations["val"] = self.combinations["train"]

    def resolution(self, step: int) -> tuple[int, ...]:
        """Pixel budgets of the training images at a step."""
        return (self.size**2,)

    def costs(self, seed: int, step: int, samples: range, split: Split) -> tuple[int, ...]:
        """Patches of 2 x 2 pixels and a caption of four words, for every sample."""
        return ((self.size // 2) ** 2 + 4,) * len(samples)

    def batch(self, seed: int, step: int, samples: range, positions: Sequence[int], split: Split) -> Batch:
        """The given positions of the global batch of a step."""
        numbers = [samples[position] for position in positions]
        uniform = np.stack([philox(seed, split, number).random(12) for number in numbers])
        combinations = self.combinations[split]
        chosen = [combinations[int(u * len(combinations))] for u in uniform[:, 0]]
        return Batch(
            images=tuple(self.draw(chosen, self.look(uniform[:, 1:]))),
            prompts=tuple(combination.prompt for combination in chosen),
            positions=tuple(positions),
            names=tuple(f"shape {number} of {split}" for number in numbers),
        )

    def look(self, uniform: np.ndarray) -> Look:
        """Uniform random numbers (B, 11) in [0, 1) -> `Look` of B images."""
        radius = self.size * (self.radius[0] + (self.radius[1] - self.radius[0]) * uniform[:, 0])
        low, high = map(math.log, self.contrast)
        return Look(
            centre=radius[:, None] + (self.size - 2 * radius)[:, None] * uniform[:, 1:3],
            radius=radius,
            jitter=JITTER * (2 * uniform[:, 3:9].reshape(-1, 2, 3) - 1),
            contrast=np.exp(low + (high - low) * uniform[:, 9]),
        )

    def draw(self, combinations: list[Combination], look: Look) -> Tensor:
        """Render images (B, 3, size, size), float32 in [-1, 1]."""
        grid = np.arange(self.size) + 0.5
        away = np.abs(grid - look.centre[:, :, None]) / look.radius[:, None, None]  # (B, 2, size)
        pixel = 1 / look.radius

        # coverage mask of the shapes (B, size, size), antialiased
        mask = np.zeros((len(combinations), self.size, self.size))
        for name, rectangles in SHAPES.items():
            rows = np.array([c.shape == name for c in combinations])
            for half in rectangles:
                # fraction of each column and row of pixels that the rectangle covers
                inside = [np.clip((half[i] - away[rows, i]) / pixel[rows, None] + 0.5, 0, 1) for i in range(2)]
                mask[rows] = np.maximum(mask[rows], inside[1][:, :, None] * inside[0][:, None])

        # blend foreground over background
        colours = np.array([(COLOURS[c.foreground], COLOURS[c.background]) for c in combinations]) + look.jitter
        front, back = (colours[:, i, :, None, None] for i in range(2))
        images = back + mask[:, None] * (front - back)
        return torch.from_numpy((images * look.contrast[:, None, None, None]).astype(np.float32))
