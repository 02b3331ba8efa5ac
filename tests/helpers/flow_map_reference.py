"""The objectives of flow maps once more in plain NumPy, one sample at a time: written from the papers.

As in `tests/helpers/reference.py`, a sample is an array (n, d), a denoiser is V(x_t, t, s, c) with scalar times, and
`frozen` stands for the live denoiser wherever the gradient is stopped, so that derivatives can be taken by complex
steps in the parameters of `live`.
"""

from dataclasses import dataclass

import numpy as np


@dataclass
class Sample:
    """A clean sample, its random numbers, and what the prompt and the null prompt are to the denoiser."""

    x0: np.ndarray
    noise: np.ndarray
    t: float
    s: float
    pair: bool  # trained with s < t
    dropped: bool
    cond: np.ndarray
    null: np.ndarray

    @property
    def x_t(self):
        return (1 - self.t) * self.x0 + self.t * self.noise

    @property
    def v(self):
        return self.noise - self.x0


def guided(sample, V, scale, mix):
    """The velocity with guidance; a sample without prompt keeps that of the data."""
    if sample.dropped:
        return sample.v
    null, cond = (V(sample.x_t, sample.t, sample.t, c) for c in (sample.null, sample.cond))
    return (1 - mix) * (scale * sample.v + (1 - scale) * null) + mix * cond


def derivative(V, sample, tangent, width):
    """d/dt V along dx/dt = tangent, between s and 1."""
    after, before = min(sample.t + width, 1), max(sample.t - width, sample.s)

    def at(time):
        return V(sample.x_t + (time - sample.t) * tangent, time, sample.s, sample.cond)

    return (at(after) - at(before)) / (after - before)


def mean_flow(sample, live, frozen, ema, scale, mix, width, tangent, power, offset):
    """2505.13447, Eq. 9-11 and 22, and 2512.02012; a sum of squares, divided by itself."""
    velocity = guided(sample, frozen, scale, mix)
    x_t, t, s, c = sample.x_t, sample.t, sample.s, sample.cond

    def error(V):
        residual = V(x_t, t, s, c) - velocity
        if sample.pair:
            direction = frozen(x_t, t, t, c) if tangent == "network" else velocity
            residual = residual + (t - s) * derivative(frozen, sample, direction, width)
        return (residual * residual).sum()

    size = sample.x0.size
    return error(live) / size / (error(frozen) / size + offset / size) ** power
