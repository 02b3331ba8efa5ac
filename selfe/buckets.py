"""Shapes for pictures of any aspect ratio: buckets of a pixel budget, and budgets that are mixed and change by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Phase:
    """From a step on, several pixel budgets share every global batch."""

    step: int
    pixels: tuple[int, ...]  # height x width of a picture is at most this
    shares: tuple[int, ...] = ()  # whole numbers, such as 1 : 1; by default equal

    def __post_init__(self):
        if self.step < 0 or not self.pixels:
            raise ValueError(f"a phase needs a step of at least 0 and some pixels, got {self.step}, {self.pixels}")
        if list(self.pixels) != sorted(set(self.pixels)):
            raise ValueError(f"pixels must increase, got {list(self.pixels)}")
        if self.shares and (len(self.shares) != len(self.pixels) or min(self.shares) < 1):
            raise ValueError(f"shares: one positive whole number for each of {list(self.pixels)}, got {self.shares}")

    def counts(self, step: int, total: int) -> list[int]:
        """How many pictures of the step's global batch have each budget; right to one picture over any time."""
        ends = np.cumsum(self.shares or [1] * len(self.pixels))

        def before(samples: int) -> np.ndarray:
            return samples * ends // ends[-1]

        return np.diff(before((step + 1) * total) - before(step * total), prepend=0).tolist()


class Buckets:
    """The (height, width) shapes of one pixel budget, up to `max_aspect`: for every height the widest, and turned."""

    def __init__(self, pixels: int, multiple: int, max_aspect: float):
        if pixels < multiple**2:
            raise ValueError(f"pixels {pixels} is less than {multiple} x {multiple}; give at least {multiple**2}")
        if max_aspect < 1:
            raise ValueError(f"max_aspect must be at least 1, got {max_aspect}")
        found = set()
        for height in range(multiple, int(math.sqrt(pixels * max_aspect)) + 1, multiple):
            width = pixels // height // multiple * multiple
            if width and max(height, width) <= max_aspect * min(height, width):
                found |= {(height, width), (width, height)}
        side = math.isqrt(pixels) // multiple * multiple
        found |= {(side, side)}
        # of shapes with the same aspect ratio only the largest
        best = {height / width: (height, width) for height, width in sorted(found)}
        self.shapes = np.array([best[aspect] for aspect in sorted(best)])  # (buckets, 2), from wide to tall
        aspects = np.log(self.shapes[:, 0] / self.shapes[:, 1])
        self.limits = (aspects[1:] + aspects[:-1]) / 2

    def nearest(self, sizes: np.ndarray) -> np.ndarray:
        """Sizes (n, 2) -> shapes (n, 2) of the nearest aspect ratio, measured in logarithms."""
        return self.shapes[np.searchsorted(self.limits, np.log(sizes[:, 0] / sizes[:, 1]))]


def deal(costs: Sequence[int], ranks: int, micro: int, multiple: int) -> list[list[list[int]]]:
    """The positions of a global batch, dealt so that ranks have equal work: [rank][micro-batch] -> `micro` positions.

    Groups of `multiple` neighbouring positions stay together and in order. The most expensive group goes first, always
    to the emptiest micro-batch that has room. Ranks wait for each other in every micro-batch, so those of like cost run
    at the same time.
    """
    groups = np.asarray(costs).reshape(-1, multiple).sum(axis=1)
    room = micro // multiple
    loads, contents = np.zeros(len(groups) // room), [[] for _ in range(len(groups) // room)]
    for group in np.argsort(-groups, kind="stable"):
        emptiest = int(np.argmin(loads))
        contents[emptiest].append(int(group))
        loads[emptiest] += groups[group]
        if len(contents[emptiest]) == room:
            loads[emptiest] = np.inf
    loads = np.array([groups[content].sum() for content in contents])
    dealt, work = [[] for _ in range(ranks)], np.zeros(ranks)
    for together in np.argsort(-loads, kind="stable").reshape(-1, ranks):
        for micro_batch, rank in zip(together, np.argsort(work, kind="stable"), strict=True):
            dealt[rank].append(
                [group * multiple + i for group in sorted(contents[micro_batch]) for i in range(multiple)]
            )
            work[rank] += loads[micro_batch]
    return dealt
