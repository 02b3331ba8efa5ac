"""Aspect-ratio buckets for a pixel budget, resolution phases over training steps, and load balancing over ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from selfe.balance import pack_greedy
from selfe.types import MOST_STEPS, check_range

MAX_PIXELS = 2**28  # of a bucket; 16384 x 16384
MAX_ASPECT = 100
MAX_SHARE = 10**6  # of a pixel budget or a manifest, in units of the smallest


@dataclass(frozen=True)
class ResolutionPhase:
    """Pixel budgets of every global batch from `step` on."""

    step: int  # first step of the phase
    pixels: tuple[int, ...]  # maximum height x width of an image, one per budget, increasing
    shares: tuple[int, ...] = ()  # integer ratio of samples per budget, e.g. [1, 1]; []: equal

    def __post_init__(self):
        check_range("step", self.step, 0, MOST_STEPS)
        check_range("pixels", self.pixels, 1, MAX_PIXELS)
        if not self.pixels:
            raise ValueError("pixels: the list is empty; a phase needs at least one pixel budget")
        if list(self.pixels) != sorted(set(self.pixels)):
            raise ValueError(f"pixels must increase, got {list(self.pixels)}")
        if self.shares and (len(self.shares) != len(self.pixels) or not all(1 <= n <= MAX_SHARE for n in self.shares)):
            raise ValueError(
                f"shares: give an integer from 1 to {MAX_SHARE} for each of {list(self.pixels)}, got {self.shares}"
            )

    def counts(self, samples: range) -> list[int]:
        """Number of samples per budget in a global batch; cumulative counts are within one sample of `shares`."""
        ends = np.cumsum(self.shares or [1] * len(self.pixels))

        def before(number: int) -> np.ndarray:
            return number * ends // ends[-1]

        return np.diff(before(samples.stop) - before(samples.start), prepend=0).tolist()


class Buckets:
    """The (height, width) shapes of one pixel budget.

    For every height the largest width within the budget, in both orientations, up to an aspect ratio of `max_aspect`.
    Height and width are multiples of `multiple` pixels.
    """

    def __init__(self, pixels: int, multiple: int, max_aspect: float):
        if multiple < 1:
            raise ValueError(f"multiple must be at least 1 pixel, got {multiple}")
        if pixels > MAX_PIXELS:
            raise ValueError(f"pixels must be at most {MAX_PIXELS}, got {pixels}")
        if pixels < multiple**2:
            raise ValueError(f"pixels {pixels} is less than {multiple} x {multiple}; set it to at least {multiple**2}")
        if not 1 <= max_aspect <= MAX_ASPECT:
            raise ValueError(f"max_aspect must be at least 1 and at most {MAX_ASPECT}, got {max_aspect}")

        # candidate shapes, plus the square
        shapes = set()
        for height in range(multiple, int(math.sqrt(pixels * max_aspect)) + 1, multiple):
            width = pixels // height // multiple * multiple
            if width and max(height, width) <= max_aspect * min(height, width):
                shapes |= {(height, width), (width, height)}
        side = math.isqrt(pixels) // multiple * multiple
        shapes |= {(side, side)}

        # keep only the largest shape of each aspect ratio
        best = {height / width: (height, width) for height, width in sorted(shapes)}
        self.shapes = np.array([best[aspect] for aspect in sorted(best)])  # (buckets, 2), from wide to tall

        # bucket boundaries: midpoints of neighbouring log aspect ratios
        aspects = np.log(self.shapes[:, 0] / self.shapes[:, 1])
        self.limits = (aspects[1:] + aspects[:-1]) / 2

    def nearest(self, sizes: np.ndarray) -> np.ndarray:
        """Sizes (n, 2) -> bucket shapes (n, 2) with the nearest log aspect ratio."""
        return self.shapes[np.searchsorted(self.limits, np.log(sizes[:, 0] / sizes[:, 1]))]


@lru_cache(maxsize=4)  # called for every micro-batch of a step
def balance(costs: tuple[int, ...], ranks: int, micro: int, multiple: int) -> list[list[list[int]]]:
    """Assign the positions of a global batch to ranks with balanced cost: [rank][micro-batch] -> `micro` positions.

    Groups of `multiple` neighbouring positions stay together and in order. Each rank's micro-batches are balanced as
    well and sorted by decreasing cost, because ranks synchronize on every micro-batch.
    """
    groups = np.asarray(costs).reshape(-1, multiple).sum(axis=1)
    dealt = []

    for of_rank in split(groups, ranks):
        batches = of_rank[split(groups[of_rank], len(costs) // ranks // micro)]
        batches = np.sort(batches[np.argsort(-groups[batches].sum(axis=1), kind="stable")], axis=1)
        dealt.append((batches[..., None] * multiple + np.arange(multiple)).reshape(len(batches), micro).tolist())
    return dealt


def split(groups: np.ndarray, parts: int) -> np.ndarray:
    """Costs (n,) -> group indices (parts, n / parts): equal counts and nearly equal cost per part."""
    return even_out(groups, np.array(pack_greedy(groups.tolist(), parts, room=len(groups) // parts)))


def even_out(groups: np.ndarray, contents: np.ndarray) -> np.ndarray:
    """Local search: swap groups between the part with the highest load and another while that lowers the maximum."""
    contents, room = contents.copy(), contents.shape[1]
    loads = groups[contents].sum(axis=1)

    for _ in range(4 * len(contents)):
        fullest = int(np.argmax(loads))
        moved = groups[contents[fullest]][:, None] - groups[contents].reshape(1, -1)  # cost that each swap moves
        after = np.maximum(loads[fullest] - moved, np.repeat(loads, room) + moved)
        slot, other = np.unravel_index(np.argmin(after), after.shape)
        if after[slot, other] >= loads[fullest]:
            break

        target = np.unravel_index(other, contents.shape)
        loads[fullest] -= moved[slot, other]
        loads[target[0]] += moved[slot, other]
        contents[fullest, slot], contents[target] = contents[target], contents[fullest, slot]

    return contents
