"""The path between data and noise, time sampling, and broadcasts and reductions between samples and packed tokens.

Times are in [0, 1]: 0 is data, 1 is pure noise (arXiv 2512.22374, Eq. 1-2: alpha_t = 1 - t, sigma_t = t). The network's
output v is the velocity `noise - x0`. Per-sample tensors are (B,); token tensors are (T, d) in the layout of `like`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from selfe.device import to_device
from selfe.rng import SampleRNG
from selfe.types import Packed, check_range

WARP = (0.5, 1.15)  # mu at 512 and at 4096 image tokens (S.2)
TimeDistribution = Literal["logit-normal", "uniform"]
LossWeight = Literal["velocity", "x0", "noise"]


def per_token(values: Tensor, like: Packed) -> Tensor:
    """(B,) -> (T, 1), the value of each token's sample. Values per token (T,) stay what they are."""
    per_sample = values if len(values) == len(like.owner) else values[like.owner]
    return per_sample[:, None]


def sum_per_sample(tokens: Tensor, like: Packed) -> Tensor:
    """(T, d) -> (B,), the sum over each sample. Does not depend on the other samples of the batch."""
    return torch.segment_reduce(tokens.sum(dim=-1), "sum", lengths=like.counts, unsafe=True)


def mean_per_sample(tokens: Tensor, like: Packed) -> Tensor:
    """(T, d) -> (B,), the mean over each sample's tokens and channels."""
    return sum_per_sample(tokens, like) / (like.counts.to(tokens.dtype) * tokens.shape[1])


def norm_per_sample(tokens: Tensor, like: Packed) -> Tensor:
    """(T, d) -> (B,), the L2 norm of each sample."""
    return sum_per_sample(tokens.square(), like).sqrt()


def cosine(a: Tensor, b: Tensor, like: Packed) -> Tensor:
    """Cosine similarity of `a` and `b`, both (T, d), per sample -> (B,); 0 where a norm is 0."""
    lengths = norm_per_sample(a, like) * norm_per_sample(b, like)
    return sum_per_sample(a * b, like) / lengths.clamp_min(1e-20)


def rescale(tokens: Tensor, target: Tensor, like: Packed) -> Tensor:
    """`tokens` (T, d) rescaled per sample to the L2 norm of `target` (T, d) (Eq. 19)."""
    norm = norm_per_sample(tokens, like)
    ratio = norm_per_sample(target, like) / norm.clamp_min(1e-20)
    return tokens * per_token(ratio, like)


def interpolate(x0: Tensor, noise: Tensor, t: Tensor, like: Packed) -> Tensor:
    """x_t = (1 - t) x0 + t noise (Eq. 1)."""
    t = per_token(t, like)
    return (1 - t) * x0 + t * noise


def predict_x0(x_t: Tensor, v: Tensor, t: Tensor, like: Packed) -> Tensor:
    """The sample head G = x_t - t v (Eq. 6)."""
    return x_t - per_token(t, like) * v


def predict_noise(x_t: Tensor, v: Tensor, t: Tensor, like: Packed) -> Tensor:
    """The noise x_t + (1 - t) v, so that x_t interpolates between `predict_x0` and it."""
    return x_t + (1 - per_token(t, like)) * v


def shift(lens: Sequence[int], like: Tensor, ends: tuple[float, float] = WARP) -> Tensor:
    """mu(L) (B,), linear in the number of image tokens and extrapolated outside of 512 to 4096 (S.2).

    `ends`: mu at 512 and at 4096 tokens.
    """
    small, large = ends
    slope = (large - small) / (4096 - 512)
    return to_device(torch.tensor([small + slope * (n - 512) for n in lens], dtype=like.dtype), like.device)


def warp(t: Tensor, mu: Tensor) -> Tensor:
    """e^mu / (e^mu + 1/t - 1) (S.2), in a form that is exact at t = 0 and t = 1; shapes broadcast."""
    pushed = mu.exp() * t
    return pushed / (pushed + (1 - t))


@dataclass(frozen=True)
class TrainingTimes:
    """How training times are drawn; the defaults are the paper's (S.2)."""

    distribution: TimeDistribution = "logit-normal"
    mean: float = 0.0  # of the normal numbers whose sigmoid is t
    std: float = 1.0
    warp: tuple[float, float] = WARP  # mu at 512 and at 4096 image tokens; 0, 0: times are not warped

    def __post_init__(self):
        check_range("t_mean", self.mean, -100, 100)
        check_range("t_std", self.std, 0, 100)
        check_range("t_warp", self.warp, -20, 20)
        if self.distribution == "uniform" and (self.mean, self.std) != (0.0, 1.0):
            raise ValueError("t_distribution: uniform times have no t_mean and t_std; leave them at 0 and 1")


def draw_t(rng: SampleRNG, x0: Packed, times: TrainingTimes = TrainingTimes(), name: str = "t") -> Tensor:
    """Training times (B,), warped by each sample's token count (S.2).

    `name`: of the random numbers.
    """
    if times.distribution == "uniform":
        t = rng.uniform(name, like=x0.tokens)
    else:
        t = torch.sigmoid(times.mean + times.std * rng.normal(name, like=x0.tokens))
    return warp(t, shift(x0.lens, t, times.warp))


def loss_weight(kind: LossWeight, t: Tensor) -> Tensor:
    """Weight (B,) of squared errors of the velocity at times t, so that the loss is that of another prediction.

    As x0_hat = x_t - t v and noise_hat = x_t + (1 - t) v, errors of x0 are t times, and errors of the noise (1 - t)
    times those of the velocity.
    """
    return {"velocity": torch.ones_like(t), "x0": t.square(), "noise": (1 - t).square()}[kind]


def self_weight(t: Tensor, s: Tensor, lam_max: float = math.inf) -> Tensor:
    """lam / (1 + lam) with lam = t/(1-t) - s/(1-s) (Eq. 17), finite for every 0 <= s <= t <= 1; 0 at s = t. (B,)"""
    gap = t - s
    weight = gap / torch.where(gap > 0, gap + (1 - t) * (1 - s), 1)
    return weight if math.isinf(lam_max) else weight.clamp_max(lam_max / (1 + lam_max))


def unwarp(t: Tensor, num_tokens: int) -> Tensor:
    """The uniform times that `warp` has mapped to the times t of a sample of so many image tokens; the shape of t."""
    return warp(t, -shift([num_tokens], like=t))


def sampling_times(num_steps: int, s_ratio: float, noise: Packed) -> tuple[Tensor, Tensor]:
    """Times t (N + 1, B) from 1 to 0 and secondary times s_k = t_{k+1} + r (t_k - t_{k+1}) (N, B) (S.2).

    t is uniform, then warped by each sample's token count. r = `s_ratio`: 0 jumps to the next time (few steps), 1 is
    flow matching, 0.5 suits one step (Fig. S.4).
    """
    uniform = torch.linspace(1, 0, num_steps + 1, dtype=noise.tokens.dtype, device=noise.tokens.device)
    t = warp(uniform[:, None], shift(noise.lens, like=uniform)[None])
    return t, t[1:] + s_ratio * (t[:-1] - t[1:])


def dropped(rng: SampleRNG, p_drop: float) -> list[bool]:
    """Which of the B prompts are dropped; drawn on the host."""
    return [number < p_drop for number in rng.uniforms("drop")]


def drop_prompts(prompts: Sequence[str], rng: SampleRNG, p_drop: float) -> list[str]:
    """Prompt dropout for classifier-free guidance: each prompt is replaced by "" with probability `p_drop`."""
    return ["" if drop else prompt for prompt, drop in zip(prompts, dropped(rng, p_drop), strict=True)]
