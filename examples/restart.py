"""A sampler: Euler steps, of which the middle one is repeated from a noisier image (restart, arXiv 2306.14878)."""

from typing import Any

from torch import Tensor

from selfe import flow
from selfe.protocols import GuidedDenoiser
from selfe.rng import SampleRNG
from selfe.types import Packed, check_range


class Restart:
    """Fresh noise replaces errors of the earlier steps; each restart costs one call of the denoiser."""

    follows_flow_map = True  # between restarts, which lead to other points of the path, it moves along the map

    def __init__(self, restarts: int = 1):
        """
        Args:
            restarts: how often the middle step is repeated; 0 is Euler.
        """
        check_range("restarts", restarts, 0, 100)
        self.restarts = restarts

    def output_settings(self) -> dict[str, Any]:
        return {"restarts": self.restarts}  # part of the identity of an image

    def calls(self, num_steps: int) -> list[int]:
        """The index of the time of every call of the denoiser, from which network evaluations are counted."""
        return sorted([*range(num_steps), *[num_steps // 2] * self.restarts])

    def __call__(self, denoise: GuidedDenoiser, noise: Packed, t: Tensor, s: Tensor, rng: SampleRNG) -> Tensor:
        """noise (T, d), t (N + 1, B) from 1 to 0, s (N, B) -> x0 (T, d)."""
        x, before = noise, None
        for number, k in enumerate(self.calls(len(s))):
            if k == before:
                # from t_{k+1} back to t_k: less of the image, and as much noise as there is at t_k
                kept = (1 - t[k]) / (1 - t[k + 1])
                added = (t[k].square() - (kept * t[k + 1]).square()).clamp_min(0).sqrt()
                fresh = flow.per_token(added, x) * rng.normal_like(f"restart {number}", x)
                x = x.with_tokens(flow.per_token(kept, x) * x.tokens + fresh)
            x = x.with_tokens(x.tokens - flow.per_token(t[k] - t[k + 1], x) * denoise(x, t[k], s[k]))
            before = k
        return x.tokens
