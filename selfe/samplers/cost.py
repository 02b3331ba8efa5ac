"""Which settings a sampler is valid for, and how often it calls the network."""

from __future__ import annotations

from collections.abc import Sequence

from selfe.protocols import Sampler
from selfe.samplers.guidance import Interval, is_inside


def check_sampler(sampler: Sampler, s_ratios: float | Sequence[float]) -> None:
    """Raise ValueError if a sampler is not valid for one of these values of `s_ratio`."""
    valid = getattr(sampler, "s_ratio", None)
    for value in s_ratios if isinstance(s_ratios, Sequence) else (s_ratios,):
        if valid is not None and value != valid:
            name = type(sampler).__name__
            raise ValueError(f"s_ratio: {value:g}, but the sampler {name} is valid for {valid:g} only; set {valid:g}")


def calls_of(sampler: Sampler, num_steps: int) -> Sequence[int]:
    """The indices of the times at which a sampler calls the denoiser, one for each call."""
    return sampler.calls(num_steps) if hasattr(sampler, "calls") else range(num_steps)


def steps_within(sampler: Sampler, num_calls: int) -> int:
    """The largest number of steps that take at most `num_calls` calls of the denoiser; at least 1."""
    if not hasattr(sampler, "calls"):
        return num_calls
    return next((steps for steps in range(num_calls, 1, -1) if len(sampler.calls(steps)) <= num_calls), 1)


def num_evaluations(sampler: Sampler, num_steps: int, cfg_scale: float, interval: Interval | None) -> int:
    """Network evaluations for an image: one for each call of the denoiser, two with guidance."""
    calls = calls_of(sampler, num_steps)
    if cfg_scale == 1:
        return len(calls)
    return sum(2 if is_inside(1 - index / num_steps, interval) else 1 for index in calls)
