"""Procedural pictures of one coloured shape on a plain ground, with captions that say all there is to know.

No files, no licence, no end: picture number i is a function of (seed, i) alone. Some combinations are kept out of
training, so that what a model makes of them shows whether it composes or remembers.
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
from selfe.types import Batch, Split

SHAPES = {"square": [(0.8, 0.8)], "cross": [(1.0, 0.33), (0.33, 1.0)], "plank": [(1.0, 0.4)], "pole": [(0.4, 1.0)]}
"""Each a union of rectangles, half width and half height in units of the radius."""
COLOURS = {"red": (0.7, -0.7, -0.7), "green": (-0.7, 0.7, -0.7), "blue": (-0.7, -0.7, 0.7), "yellow": (0.7, 0.7, -0.7)}
"""RGB in [-1, 1]."""
JITTER = 0.12  # every picture's colours move by up to so much per channel


@dataclass(frozen=True)
class Combination:
    """What a caption tells."""

    shape: str
    foreground: str
    background: str

    @property
    def prompt(self) -> str:
        return f"{self.foreground} {self.shape} on {self.background}"


COMBINATIONS = tuple(Combination(*c) for c in product(SHAPES, COLOURS, COLOURS) if c[1] != c[2])


@dataclass(frozen=True)
class Look:
    """What a caption does not tell, of B pictures."""

    centre: np.ndarray  # (B, 2) column and row in pixels
    radius: np.ndarray  # (B,) in pixels
    jitter: np.ndarray  # (B, 2, 3) added to the colours of shape and ground
    contrast: np.ndarray  # (B,) the whole picture is multiplied by it


class ShapesData:
    """A fresh picture for every sample of a run; validation draws the held-out combinations."""

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
            size: height and width in pixels.
            held_out: how many of the 48 combinations never occur in training.
            radius: smallest and largest, in units of `size`.
            contrast: smallest and largest factor on the picture, drawn log-uniformly: varies the pictures' norms.
        """
        if not 0 <= held_out < len(COMBINATIONS):
            raise ValueError(f"held_out must be at least 0 and below {len(COMBINATIONS)}, got {held_out}")
        for name, (low, high) in {"radius": radius, "contrast": contrast}.items():
            if not 0 < low <= high:
                raise ValueError(f"{name} is a range of positive numbers, got {low} to {high}")
        if radius[1] > 0.5:
            raise ValueError(f"radius: the largest shape must fit, so at most 0.5 of the size, got {radius[1]}")
        self.size = self.multiple = size
        self.radius, self.contrast = radius, contrast
        shuffled = [COMBINATIONS[i] for i in philox("held out").permutation(len(COMBINATIONS))]
        self.combinations = {"val": tuple(shuffled[:held_out]), "train": tuple(shuffled[held_out:])}
        if not held_out:
            self.combinations["val"] = self.combinations["train"]

    def resolution(self, step: int) -> tuple[int, ...]:
        """Pixels of an image."""
        return (self.size**2,)

    def costs(self, seed: int, step: int, samples: range, split: Split) -> tuple[int, ...]:
        """All pictures are alike."""
        return (1,) * len(samples)

    def batch(self, seed: int, step: int, samples: range, positions: Sequence[int], split: Split) -> Batch:
        """These positions of the step's global batch."""
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
        """Uniform numbers (B, 11) in [0, 1) -> looks."""
        radius = self.size * (self.radius[0] + (self.radius[1] - self.radius[0]) * uniform[:, 0])
        low, high = map(math.log, self.contrast)
        return Look(
            centre=radius[:, None] + (self.size - 2 * radius)[:, None] * uniform[:, 1:3],
            radius=radius,
            jitter=JITTER * (2 * uniform[:, 3:9].reshape(-1, 2, 3) - 1),
            contrast=np.exp(low + (high - low) * uniform[:, 9]),
        )

    def draw(self, combinations: list[Combination], look: Look) -> Tensor:
        """Pictures (B, 3, size, size), float32 in [-1, 1]."""
        grid = np.arange(self.size) + 0.5
        away = np.abs(grid - look.centre[:, :, None]) / look.radius[:, None, None]  # (B, 2, size)
        pixel = 1 / look.radius
        mask = np.zeros((len(combinations), self.size, self.size))
        for name, rectangles in SHAPES.items():
            rows = np.array([c.shape == name for c in combinations])
            for half in rectangles:
                # the part of a pixel that a rectangle covers, column by column and row by row
                inside = [np.clip((half[i] - away[rows, i]) / pixel[rows, None] + 0.5, 0, 1) for i in range(2)]
                mask[rows] = np.maximum(mask[rows], inside[1][:, :, None] * inside[0][:, None])
        colours = np.array([(COLOURS[c.foreground], COLOURS[c.background]) for c in combinations]) + look.jitter
        front, back = (colours[:, i, :, None, None] for i in range(2))
        pictures = back + mask[:, None] * (front - back)
        return torch.from_numpy((pictures * look.contrast[:, None, None, None]).astype(np.float32))
