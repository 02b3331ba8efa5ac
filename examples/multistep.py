"""A sampler: Adams-Bashforth of second order. One call of the denoiser per step, as Euler, and the velocity before."""

from typing import Any

from torch import Tensor

from selfe import flow
from selfe.protocols import GuidedDenoiser
from selfe.rng import SampleRNG
from selfe.types import Packed, check_range


class AdamsBashforth:
    def __init__(self, blend: float = 1.0):
        """
        Args:
            blend: weight of the second-order term; 0 is Euler.
        """
        check_range("blend", blend, 0, 1)
        self.blend = blend

    def output_settings(self) -> dict[str, Any]:
        return {"blend": self.blend}  # part of the identity of an image

    def __call__(self, denoise: GuidedDenoiser, noise: Packed, t: Tensor, s: Tensor, rng: SampleRNG) -> Tensor:
        """noise (T, d), t (N + 1, B) from 1 to 0, s (N, B) -> x0 (T, d)."""
        x, before = noise, None
        for k in range(len(s)):
            v = denoise(x, t[k], s[k])
            slope = v
            if before is not None:
                ratio = (t[k] - t[k + 1]) / (t[k - 1] - t[k])  # (B,), of this step to the one before
                slope = v + flow.per_token(self.blend * ratio / 2, x) * (v - before)
            x = x.with_tokens(x.tokens - flow.per_token(t[k] - t[k + 1], x) * slope)
            before = v
        return x.tokens
