"""Stochastic sampling: DDIM with eta, a mix of predicted and fresh noise at every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selfe import flow
from selfe.protocols import GuidedDenoiser
from selfe.rng import SampleRNG
from selfe.types import Packed, check_range


class Renoise:
    """DDIM with eta (S.3): 0 is deterministic and equals Euler, 1 is ancestral sampling, the paper's setting."""

    def __init__(self, eta: float = 1.0):
        """
        Args:
            eta: share of fresh noise in each step.
        """
        check_range("eta", eta, 0, 1)
        self.eta = eta

    @property
    def follows_flow_map(self) -> bool:
        return self.eta == 0

    def output_settings(self) -> dict[str, Any]:
        return {"eta": self.eta}

    def __call__(self, denoise: GuidedDenoiser, noise: Packed, t: Tensor, s: Tensor, rng: SampleRNG) -> Tensor:
        """noise (T, d), t (N + 1, B) from 1 to 0, s (N, B) -> x0 (T, d)."""
        x = noise
        for k in range(len(s)):
            # Predict data and noise from the velocity.
            v = denoise(x, t[k], s[k])
            x0_hat = flow.predict_x0(x.tokens, v, t[k], x)
            noise_hat = flow.predict_noise(x.tokens, v, t[k], x)

            # Variance at t_{k+1} is split between predicted and fresh noise; the last step adds no fresh noise.
            fresh = self.fresh_share(t[k], t[k + 1])
            kept = (t[k + 1].square() - fresh.square()).clamp_min(0).sqrt()
            tokens = flow.per_token(1 - t[k + 1], x) * x0_hat + flow.per_token(kept, x) * noise_hat
            if self.eta > 0 and k + 1 < len(s):
                tokens = tokens + flow.per_token(fresh, x) * rng.normal_like(f"fresh {k}", x)
            x = x.with_tokens(tokens)

        return x.tokens

    def fresh_share(self, t: Tensor, t_next: Tensor) -> Tensor:
        """Standard deviation (B,) of the fresh noise: eta (sigma'/sigma) sqrt(sigma^2 - (alpha/alpha')^2 sigma'^2)."""
        rest = (1 - t_next).clamp_min(
            torch.finfo(t.dtype).tiny
        )  # avoid division by zero if t_next rounds to 1 (then t = 1)
        inside = t.square() - ((1 - t) / rest).square() * t_next.square()
        return self.eta * t_next / t * inside.clamp_min(0).sqrt()
