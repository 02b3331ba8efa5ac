"""Learning rate schedules: the way from `trainer.lr` to `trainer.min_lr`, after the warm-up."""

from __future__ import annotations

import math
from typing import Literal

from selfe.types import check_range


def progress(step: int, start: int, end: int) -> float:
    """0 up to `start`, 1 from `end` on, linear in between."""
    return min(max((step - start) / max(end - start, 1), 0.0), 1.0)


class Constant:
    """The learning rate stays at `lr`; `min_lr` is not used."""

    def __call__(self, step: int, start: int, end: int) -> float:
        return 0.0


class Linear:
    """A straight line from `lr` to `min_lr`, as in the paper (S.2)."""

    def __call__(self, step: int, start: int, end: int) -> float:
        return progress(step, start, end)


class Cosine:
    """Half a cosine from `lr` to `min_lr` (Loshchilov and Hutter, arXiv 1608.03983), without restarts."""

    def __call__(self, step: int, start: int, end: int) -> float:
        return (1 - math.cos(math.pi * progress(step, start, end))) / 2


class WSD:
    """Warm-up, stable, decay: `lr` until the last part of the run, then down to `min_lr` (arXiv 2405.18392).

    A checkpoint from before the decay can be continued with a larger `max_steps`, as if it had been chosen at first.
    """

    def __init__(self, decay_share: float = 0.2, curve: Literal["sqrt", "linear"] = "sqrt"):
        """
        Args:
            decay_share: share of max_steps in which the learning rate decays. trainer.decay_start has to be 0.
            curve: form of the decay; sqrt: lr falls as 1 - sqrt(x), where x grows from 0 to 1.
        """
        check_range("decay_share", decay_share, 0.001, 1)
        self.decay_share, self.curve = decay_share, curve

    def __call__(self, step: int, start: int, end: int) -> float:
        stable_until = round((1 - self.decay_share) * (end + 1))
        done = progress(step, max(start, stable_until), end)
        return math.sqrt(done) if self.curve == "sqrt" else done
