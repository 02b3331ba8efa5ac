"""Samplers outside of selfe: two classes without parameters in one file, and one with a parameter."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from selfe import flow
from selfe.protocols import GuidedDenoiser
from selfe.rng import SampleRNG
from selfe.types import Packed


class Forward:
    """Euler's method."""

    def output_settings(self) -> dict[str, Any]:
        return {}

    def __call__(self, denoise: GuidedDenoiser, noise: Packed, t: Tensor, s: Tensor, rng: SampleRNG) -> Tensor:
        x = noise
        for k in range(len(s)):
            x = x.with_tokens(x.tokens - flow.per_token(t[k] - t[k + 1], x) * denoise(x, t[k], s[k]))
        return x.tokens


class Midpoint(Forward):
    """The velocity in the middle of a step."""

    def __call__(self, denoise: GuidedDenoiser, noise: Packed, t: Tensor, s: Tensor, rng: SampleRNG) -> Tensor:
        x = noise
        for k in range(len(s)):
            middle = (t[k] + t[k + 1]) / 2
            half = x.with_tokens(x.tokens - flow.per_token(t[k] - middle, x) * denoise(x, t[k], s[k]))
            x = x.with_tokens(x.tokens - flow.per_token(t[k] - t[k + 1], x) * denoise(half, middle, s[k]))
        return x.tokens


class Named(Forward):
    """A parameter that is text, which file and folder names cannot hold as it is."""

    def __init__(self, schedule: str = "linear"):
        self.table = schedule.split(", ")

    def output_settings(self) -> dict[str, Any]:
        return {"schedule": ", ".join(self.table)}


class Seeded(Forward):
    """A parameter with the name of a setting of every image."""

    def __init__(self, seed: int = 0):
        self.seed = seed

    def output_settings(self) -> dict[str, Any]:
        return {"seed": self.seed}
