"""Deterministic ODE sampling of second order with the two-step Adams-Bashforth method, one network call per step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from selfe import flow
from selfe.protocols import GuidedDenoiser
from selfe.rng import SampleRNG
from selfe.types import Packed


class AdamsBashforth:
    """The velocity, extrapolated to the middle of a step from that of the step before, for s = t.

    The first step is Euler's. Steps may have different lengths.
    """

    s_ratio = 1.0  # the only one that it is valid for: with s < t, the velocity is not that of an ODE

    def output_settings(self) -> dict[str, Any]:
        return {}

    def __call__(self, denoise: GuidedDenoiser, noise: Packed, t: Tensor, s: Tensor, rng: SampleRNG) -> Tensor:
        """noise (T, d), t (N + 1, B) from 1 to 0, s (N, B), equal to t -> x0 (T, d)."""
        x, before = noise, None
        for k in range(len(s)):
            v = denoise(x, t[k], t[k])
            slope = v
            if before is not None:
                ratio = (t[k] - t[k + 1]) / (t[k - 1] - t[k])  # of this step to the one before
                slope = v + flow.per_token(ratio / 2, x) * (v - before)
            x = x.with_tokens(x.tokens - flow.per_token(t[k] - t[k + 1], x) * slope)
            before = v
        return x.tokens
