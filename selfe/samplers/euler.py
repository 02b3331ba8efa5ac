"""Deterministic sampling: the ODE, one straight step per network call."""

from __future__ import annotations

from torch import Tensor

from selfe import flow
from selfe.draws import Draws
from selfe.types import Denoise, Packed


class Euler:
    """x <- x - (t_k - t_{k+1}) v (Eq. 22)."""

    def __call__(self, denoise: Denoise, noise: Packed, t: Tensor, s: Tensor, draws: Draws) -> Tensor:
        """noise (T, d), t (N + 1, B) from 1 to 0, s (N, B) -> x0 (T, d)."""
        x = noise
        for k in range(len(s)):
            v = denoise(x, t[k], s[k])
            x = x.with_tokens(x.tokens - flow.per_token(t[k] - t[k + 1], x) * v)
        return x.tokens
