"""Shapes for pictures of any aspect ratio: buckets of a pixel budget, and budgets that are mixed and change by step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class ResolutionPhase:
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

    def counts(self, samples: range) -> list[int]:
        """How many pictures of a global batch have each budget; right to one picture over any time."""
        ends = np.cumsum(self.shares or [1] * len(self.pixels))

        def before(number: int) -> np.ndarray:
            return number * ends // ends[-1]

        return np.diff(before(samples.stop) - before(samples.start), prepend=0).tolist()


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


@lru_cache(maxsize=4)  # asked for by every micro-batch of a step
def balance(costs: tuple[int, ...], ranks: int, micro: int, multiple: int) -> list[list[list[int]]]:
    """The positions of a global batch, dealt so that ranks have equal work: [rank][micro-batch] -> `micro` positions.

    Groups of `multiple` neighbouring positions stay together and in order. A rank's micro-batches are alike too, the
    fullest first, because ranks wait for each other in every one.
    """
    groups = np.asarray(costs).reshape(-1, multiple).sum(axis=1)
    dealt = []
    for mine in split(groups, ranks):
        batches = mine[split(groups[mine], len(costs) // ranks // micro)]
        batches = np.sort(batches[np.argsort(-groups[batches].sum(axis=1), kind="stable")], axis=1)
        dealt.append((batches[..., None] * multiple + np.arange(multiple)).reshape(len(batches), micro).tolist())
    return dealt


def split(groups: np.ndarray, parts: int) -> np.ndarray:
    """Costs (n,) -> numbers (parts, n / parts), equally many in each part and nearly equal cost."""
    return even_out(groups, fill(groups, len(groups) // parts))


def fill(groups: np.ndarray, room: int) -> np.ndarray:
    """Costs (n,) -> numbers (n / room, room): the most expensive first, always to the emptiest that has room."""
    loads, contents = np.zeros(len(groups) // room), [[] for _ in range(len(groups) // room)]
    for group in np.argsort(-groups, kind="stable"):
        emptiest = int(np.argmin(loads))
        contents[emptiest].append(group)
        loads[emptiest] += groups[group] if len(contents[emptiest]) < room else np.inf
    return np.array(contents)


def even_out(groups: np.ndarray, contents: np.ndarray) -> np.ndarray:
    """Groups exchanged between the fullest and another, the best exchange each time, as long as that helps."""
    contents, room = contents.copy(), contents.shape[1]
    loads = groups[contents].sum(axis=1)
    for _ in range(4 * len(contents)):
        fullest = int(np.argmax(loads))
        moved = groups[contents[fullest]][:, None] - groups[contents].reshape(1, -1)  # work that an exchange moves
        after = np.maximum(loads[fullest] - moved, np.repeat(loads, room) + moved)
        mine, other = np.unravel_index(np.argmin(after), after.shape)
        if after[mine, other] >= loads[fullest]:
            break
        theirs = np.unravel_index(other, contents.shape)
        loads[fullest] -= moved[mine, other]
        loads[theirs[0]] += moved[mine, other]
        contents[fullest, mine], contents[theirs] = contents[theirs], contents[fullest, mine]
    return contents
