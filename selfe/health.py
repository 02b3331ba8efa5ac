"""The gradient's health: a step whose gradient is not finite, or far above what is usual, is not taken."""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from selfe.types import UserError


@dataclass(frozen=True)
class Health:
    """When a step is skipped: its gradient norm is not finite, or a spike.

    A spike is above both median x `factor` and median x e^(`sigmas` sigma) of the last `window` norms that were taken;
    sigma is the deviation of their logarithms, estimated robustly as 1.4826 x the median absolute deviation. Nothing is
    a spike before `warmup` norms are known.
    """

    sigmas: float | None = 6.0  # null: only what is not finite is skipped
    factor: float = 5.0
    window: int = 200
    warmup: int = 50
    max_skips: int = 20  # in a row; then the run stops
    compare_every: int | None = None  # steps between checks that replicas (trainer.shard_size) hold the same weights

    def __post_init__(self):
        if self.factor < 1 or not 1 <= self.warmup <= self.window or self.max_skips < 1:
            raise ValueError("factor and max_skips must be at least 1, and warmup between 1 and window")


class Guard:
    """Judges one step after another. Its memory is part of a checkpoint: a resumed run judges alike."""

    def __init__(self, health: Health, memory: dict | None = None):
        self.health = health
        self.norms = deque((memory or {}).get("norms", ()), maxlen=health.window)
        self.in_a_row = (memory or {}).get("in_a_row", 0)
        self.skipped = (memory or {}).get("skipped", 0)  # in the whole run

    @property
    def memory(self) -> dict:
        return {"norms": list(self.norms), "in_a_row": self.in_a_row, "skipped": self.skipped}

    def limit(self) -> float:
        """The norm above which a step is a spike."""
        health = self.health
        if health.sigmas is None or len(self.norms) < health.warmup:
            return math.inf
        logs = [math.log(max(norm, 1e-30)) for norm in self.norms]
        middle = median(logs)
        sigma = 1.4826 * median(abs(value - middle) for value in logs)
        return math.exp(middle + max(health.sigmas * sigma, math.log(health.factor)))

    def accepts(self, norm: float) -> bool:
        """Whether to take the step; remembers the verdict."""
        good = math.isfinite(norm) and norm <= self.limit()
        if good:
            self.norms.append(norm)
        self.in_a_row = 0 if good else self.in_a_row + 1
        self.skipped += not good
        return good

    def check(self, step: int, norm: float) -> None:
        """Raise UserError when enough steps have been skipped."""
        if self.in_a_row >= self.health.max_skips:
            raise UserError(
                f"step {step}: {self.in_a_row} steps in a row were skipped, gradient norm {norm:.4g}: training has "
                "diverged; lower trainer.lr and start again from an earlier checkpoint"
            )


def record(folder: Path, step: int, norm: float, limit: float, micro_batches: list[list[dict]]) -> Path:
    """Write what `scripts/replay.py` needs to run a skipped batch again, and what a person wants to see of it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}.json"
    told = {"step": step, "grad_norm": norm, "limit": limit, "micro_batches": micro_batches}
    path.write_text(json.dumps(told, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return path
