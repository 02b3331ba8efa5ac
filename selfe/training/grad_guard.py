"""Gradient guard: skips steps whose gradient norm is non-finite or a spike."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from torch import Tensor, nn

from selfe.distributed import fsdp
from selfe.errors import UserError
from selfe.types import MOST_STEPS, Batch, check_period, check_range


@dataclass(frozen=True)
class GradGuardConfig:
    """When a step is skipped: its loss or gradient norm is non-finite, or its gradient norm is a spike.

    A spike exceeds both median x `factor` and median x e^(`sigmas` sigma) of the last `window` accepted norms, where
    sigma is the robust standard deviation of their logarithms (1.4826 x the median absolute deviation).

    Norms are only compared within a phase: where the loss terms, the batch size or the resolution change by schedule,
    the statistics are reset, and no norm counts as a spike until `warmup` norms have been accepted. An unscheduled but
    lasting change is accepted as the new level after `adopt_after` skipped norms in a row that agree within `factor`,
    if the median loss has not doubled.
    """

    # a spike also exceeds the median by this number of robust standard deviations; null: skip only non-finite norms
    sigmas: float | None = 6.0
    factor: float = 5.0  # a spike exceeds the median of accepted norms by this factor
    window: int = 200  # number of accepted norms that are compared with
    warmup: int = 50  # accepted norms of a phase before a norm can be a spike
    adopt_after: int = 10  # skipped norms in a row, at one level, after which it is the new level
    max_skips: int = 20  # skipped steps in a row after which the run stops
    # steps between checks that replicas (trainer.shard_size) have equal weights; null: none
    compare_every: int | None = None

    def __post_init__(self):
        check_range("sigmas", self.sigmas, 1, 100)
        check_range("factor", self.factor, 1, 10**6)
        check_range("window", self.window, 1, 10**6)
        check_range("warmup", self.warmup, 1, self.window)
        check_range("adopt_after", self.adopt_after, 2, MOST_STEPS)
        check_range("max_skips", self.max_skips, 1, MOST_STEPS)
        check_period("compare_every", self.compare_every)


class GradGuard:
    """Decides at each step whether to apply the gradient. `memory` is saved in checkpoints, so resuming is exact."""

    def __init__(self, health: GradGuardConfig, memory: dict | None = None):
        memory = memory or {}
        self.health = health
        self.phase: str | None = memory.get("phase")
        self.norms = deque(memory.get("norms", ()), maxlen=health.window)  # of accepted steps of this phase
        self.losses = deque(memory.get("losses", ()), maxlen=health.window)
        self.rejected = list(memory.get("rejected", ()))  # [norm, loss] of the skipped steps in a row, all finite
        self.in_a_row = memory.get("in_a_row", 0)
        self.skipped = memory.get("skipped", 0)  # in the entire run

    @property
    def memory(self) -> dict:
        """State for a checkpoint, as JSON types; a copy, because checkpoints are written in the background."""
        return {
            "phase": self.phase,
            "norms": list(self.norms),
            "losses": list(self.losses),
            "rejected": list(self.rejected),
            "in_a_row": self.in_a_row,
            "skipped": self.skipped,
        }

    def enter(self, phase: str) -> str | None:
        """Reset the statistics if the phase has changed; returns the previous phase, None if nothing was reset."""
        if phase == self.phase:
            return None
        ended, self.phase = self.phase, phase
        self.norms.clear()
        self.losses.clear()
        self.rejected, self.in_a_row = [], 0
        return ended

    def limit(self) -> float:
        """The norm above which a step is a spike."""
        health = self.health
        if health.sigmas is None or len(self.norms) < health.warmup:
            return math.inf

        # median and robust standard deviation of the logarithms
        logs = [math.log(max(norm, 1e-30)) for norm in self.norms]
        middle = median(logs)
        sigma = 1.4826 * median(abs(value - middle) for value in logs)
        return math.exp(middle + max(health.sigmas * sigma, math.log(health.factor)))

    def accepts(self, norm: float, loss: float) -> bool:
        """Whether to apply the gradient of a step; updates the statistics."""
        finite = math.isfinite(norm) and math.isfinite(loss)
        good = finite and norm <= self.limit()

        if finite and not good:
            self.rejected.append([norm, loss])
            if good := self.is_new_level():
                # a lasting change: restart the statistics from the norms that agree
                self.norms.clear()
                self.norms.extend(norm for norm, _ in self.recent())
        elif finite:
            self.norms.append(norm)

        if good:
            self.losses.append(loss)
        if good or not finite:
            self.rejected = []
        self.in_a_row = 0 if good else self.in_a_row + 1
        self.skipped += not good
        return good

    def recent(self) -> list[list[float]]:
        """The last `adopt_after` skipped steps in a row."""
        return self.rejected[-self.health.adopt_after :]

    def is_new_level(self) -> bool:
        """Whether recent skipped norms agree and the loss has not risen. A risen loss means that training diverged."""
        if len(self.recent()) < self.health.adopt_after:
            return False
        norms, losses = zip(*self.recent(), strict=True)
        return max(norms) <= self.health.factor * min(norms) and median(losses) <= 2 * median(self.losses)

    def check(self, step: int, norm: float, cause: str | None) -> None:
        """Raise UserError when enough steps have been skipped; `cause` is the first non-finite tensor of this step."""
        if self.in_a_row >= self.health.max_skips:
            why = f"first non-finite: {cause}" if cause else f"gradient norm {norm:.4g}"
            raise UserError(
                f"step {step}: {self.in_a_row} steps in a row were skipped, {why}: training has diverged; "
                "lower trainer.lr and restart from an earlier checkpoint"
            )


def first_non_finite(net: nn.Module, ema: nn.Module, samples: Sequence[tuple[Batch, Tensor]]) -> tuple[int, str] | None:
    """The first tensor of this rank with a NaN or infinity: weights, then losses and gradients of a step.

    Encoded images and captions are not among them: `Loss.checks` reports those.

    Args:
        samples: micro-batches, each with a tensor (3, B) of loss, t and s.

    Returns:
        Its place in this order, to find the first of all ranks, and a description; None if all are finite.
    """
    tensors = [(0, f"weight {name}", p) for name, p in net.named_parameters()]
    tensors += [(0, f"EMA weight {name}", p) for name, p in ema.named_parameters()]
    for batch, values in samples:
        tensors += [(1, f"loss of {name}", loss) for name, loss in zip(batch.names, values[0], strict=True)]
    tensors += [(2, f"gradient of {name}", p.grad) for name, p in net.named_parameters() if p.grad is not None]

    for place, name, tensor in tensors:
        if not fsdp.local(tensor.detach()).isfinite().all():
            return place, name
    return None


def record(
    folder: Path, step: int, norm: float, limit: float, cause: str | None, micro_batches: list[list[dict]]
) -> Path:
    """Write a skipped step to a JSON file: its samples (for `selfe replay`), gradient norm, limit and first non-finite
    tensor. Returns its path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}.json"
    entry = {"step": step, "grad_norm": norm, "limit": limit, "non_finite": cause, "micro_batches": micro_batches}
    path.write_text(json.dumps(entry, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return path
