"""Deterministic ODE sampling of second order with Heun's method, two network calls per step but the last."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from selfe import flow
from selfe.protocols import GuidedDenoiser
from selfe.rng import SampleRNG
from selfe.types import Packed


class Heun:
    """The mean of the velocities at both ends of a step, for s = t; the last step is Euler's (EDM, arXiv 2206.00364).

    N steps are 2 N - 1 calls: data, the end of the last step, is not a noisy image.
    """

    s_ratio = 1.0  # the only one that it is valid for: with s < t, the velocity is not that of an ODE

    def output_settings(self) -> dict[str, Any]:
        return {}

    def calls(self, num_steps: int) -> list[int]:
        """The indices of the times of all calls of the denoiser."""
        return [index for k in range(num_steps) for index in ((k, k + 1) if k + 1 < num_steps else (k,))]

    def __call__(self, denoise: GuidedDenoiser, noise: Packed, t: Tensor, s: Tensor, rng: SampleRNG) -> Tensor:
        """noise (T, d), t (N + 1, B) from 1 to 0, s (N, B), equal to t -> x0 (T, d)."""
        x, num_steps = noise, len(s)
        for k in range(num_steps):
            step = flow.per_token(t[k] - t[k + 1], x)
            v = denoise(x, t[k], t[k])
            if k + 1 < num_steps:
                end = x.with_tokens(x.tokens - step * v)
                v = (v + denoise(end, t[k + 1], t[k + 1])) / 2
            x = x.with_tokens(x.tokens - step * v)
        return x.tokens
