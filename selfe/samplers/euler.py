"""Deterministic ODE sampling with Euler steps, one network call per step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from selfe import flow
from selfe.protocols import GuidedDenoiser
from selfe.rng import SampleRNG
from selfe.types import Packed


class Euler:
    """x <- x - (t_k - t_{k+1}) v (Eq. 22)."""

    follows_flow_map = True

    def output_settings(self) -> dict[str, Any]:
        return {}

    def __call__(self, denoise: GuidedDenoiser, noise: Packed, t: Tensor, s: Tensor, rng: SampleRNG) -> Tensor:
        """noise (T, d), t (N + 1, B) from 1 to 0, s (N, B) -> x0 (T, d)."""
        x = noise
        for k in range(len(s)):
            v = denoise(x, t[k], s[k])
            x = x.with_tokens(x.tokens - flow.per_token(t[k] - t[k + 1], x) * v)
        return x.tokens
