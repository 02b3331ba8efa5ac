"""Stochastic sampling: predict data and noise, then go to the next time with a share of fresh noise (DDIM with eta)."""

from __future__ import annotations

import torch
from torch import Tensor

from selfe import flow
from selfe.draws import Draws
from selfe.types import Denoise, Packed


class Renoise:
    """eta = 0 is deterministic and equals Euler; eta = 1 is ancestral sampling, the paper's setting (S.3)."""

    def __init__(self, eta: float = 1.0):
        if not 0 <= eta <= 1:
            raise ValueError(f"eta lies in [0, 1], got {eta}")
        self.eta = eta

    def __call__(self, denoise: Denoise, noise: Packed, t: Tensor, s: Tensor, draws: Draws) -> Tensor:
        """noise (T, d), t (N + 1, B) from 1 to 0, s (N, B) -> x0 (T, d)."""
        x = noise
        for k in range(len(s)):
            v = denoise(x, t[k], s[k])
            x0_hat = flow.predict_x0(x.tokens, v, t[k], x)
            noise_hat = flow.predict_noise(x.tokens, v, t[k], x)
            fresh = self.fresh_share(t[k], t[k + 1])
            kept = (t[k + 1].square() - fresh.square()).clamp_min(0).sqrt()
            tokens = flow.per_token(1 - t[k + 1], x) * x0_hat + flow.per_token(kept, x) * noise_hat
            if self.eta > 0 and k + 1 < len(s):
                tokens = tokens + flow.per_token(fresh, x) * draws.normal_like(f"fresh {k}", x)
            x = x.with_tokens(tokens)
        return x.tokens

    def fresh_share(self, t: Tensor, t_next: Tensor) -> Tensor:
        """Standard deviation (B,) of the fresh noise: eta (sigma'/sigma) sqrt(sigma^2 - (alpha/alpha')^2 sigma'^2)."""
        rest = (1 - t_next).clamp_min(torch.finfo(t.dtype).tiny)  # t_next may round to 1, and t is 1 then
        inside = t.square() - ((1 - t) / rest).square() * t_next.square()
        return self.eta * t_next / t * inside.clamp_min(0).sqrt()
