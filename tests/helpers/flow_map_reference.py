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
    renoise: np.ndarray | None = None  # for the score at the end of a step

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


def adaptive(live, frozen, power, offset):
    """A squared error divided by a power of itself, whose gradient is stopped."""
    return live / (frozen + offset) ** power


def mean(residual):
    return (residual * residual).sum() / residual.size


def mean_flow(sample, live, frozen, ema, *, scale, mix, width, tangent, power, offset):
    """2505.13447 and 2512.02012: a sum of squares, divided by itself; here relative to the number of values."""
    velocity = guided(sample, frozen, scale, mix)
    x_t, t, s, c = sample.x_t, sample.t, sample.s, sample.cond
    shift = 0
    if sample.pair:
        direction = frozen(x_t, t, t, c) if tangent == "network" else velocity
        shift = (t - s) * derivative(frozen, sample, direction, width)
    losses = (mean(V(x_t, t, s, c) + shift - velocity) for V in (live, frozen))
    return adaptive(*losses, power, offset / sample.x0.size)


def alpha_flow(sample, live, frozen, ema, *, scale, mix, alpha, power, offset):
    """2510.20771: the target is a v + (1 - a) V at the end of a step, the weight 1 / a before the adaptive one."""
    velocity, target, weight = guided(sample, frozen, scale, mix), None, 1
    x_t, t, s, c = sample.x_t, sample.t, sample.s, sample.cond
    target = velocity
    if sample.pair:
        middle = alpha * s + (1 - alpha) * t
        later = frozen(x_t - (t - middle) * velocity, middle, s, c) if alpha < 1 else 0
        target, weight = alpha * velocity + (1 - alpha) * later, alpha ** (2 * power - 1)
    return weight * adaptive(*(mean(V(x_t, t, s, c) - target) for V in (live, frozen)), power, offset)


def end_score(sample, frozen, ema, *, k_cls, floor):
    """Self-E's classifier score at the end of a step, brought to the level of the floor by fresh noise."""
    t, s = sample.t, sample.s
    if sample.dropped:
        return 0
    end = sample.x_t - (t - s) * frozen(sample.x_t, t, s, sample.cond)
    e = max(s, floor * t)
    a = (1 - e) / (1 - s)
    state = a * end + np.sqrt(max(e**2 - (a * s) ** 2, 0)) * sample.renoise
    lam = t / (1 - t) - e / (1 - e)
    towards = ema(state, e, e, sample.cond) - frozen(state, e, e, sample.null)
    return k_cls * lam / (1 + lam) * e / t * towards


def so_flow(sample, live, frozen, ema, *, scale, mix, ratio, power, offset, k_cls=0, floor=0):
    """2512.15657: the quotient of the solutions from t and from l, whose gradient goes through V(x_t, t, s) / 1."""
    velocity = guided(sample, frozen, scale, mix)
    x_t, t, s, c = sample.x_t, sample.t, sample.s, sample.cond
    if not sample.pair:
        return adaptive(*(mean(V(x_t, t, t, c) - velocity) for V in (live, frozen)), power, offset)
    if k_cls:
        velocity = velocity + end_score(sample, frozen, ema, k_cls=k_cls, floor=floor)
    middle = t + ratio * (s - t)
    x_l = x_t + (middle - t) * velocity
    solutions = x_t + (s - t) * frozen(x_t, t, s, c), x_l + (s - middle) * frozen(x_l, middle, s, c)
    quotient = (solutions[0] - solutions[1]) / (t - middle)
    target = frozen(x_t, t, s, c) + quotient
    return adaptive(*(mean(V(x_t, t, s, c) - target) for V in (live, frozen)), power, offset) / 2


def transition_model(sample, live, frozen, ema, *, scale, mix, width, power, offset):
    """2509.04394 on the path of flow matching; guidance by the EMA denoiser, the derivative along the data."""
    velocity = guided(sample, ema, scale, mix)
    x_t, t, s, c = sample.x_t, sample.t, sample.s, sample.cond
    target, weight = velocity, 1
    if sample.pair:
        target = velocity - (t - s) * derivative(frozen, sample, sample.v, width)
        weight = (np.tan(t) - np.tan(s) + 1) ** -0.5
    return weight * adaptive(*(mean(V(x_t, t, s, c) - target) for V in (live, frozen)), power, offset)


def any_flow(group, live, frozen, ema, *, scale, width):
    """2605.13724, forward stage, of a group of samples: the losses of pairs are rescaled to the mean of the others."""

    def loss(sample, V):
        x_t, t, s, c = sample.x_t, sample.t, sample.s, sample.cond
        w = 1 if sample.dropped else scale
        fused = (V(x_t, t, s, c) - (1 - w) * frozen(x_t, t, s, sample.null)) / w
        target = sample.v - ((t - s) * derivative(frozen, sample, sample.v, width) / w if sample.pair else 0)
        return t * np.sqrt(1 - t) / (4 / 15) * mean(fused - target)

    others = np.mean([loss(sample, frozen) for sample in group if not sample.pair])
    rescaled = [others / (loss(sample, frozen) + 1e-5) if sample.pair else 1 for sample in group]
    return np.array([factor * loss(sample, live) for factor, sample in zip(rescaled, group, strict=True)])


def terminal_velocity(sample, live, frozen, ema, *, scale, width, u):
    """2511.19797: flow matching at time u, and for pairs the velocity at the end of the step from t to s."""
    w = 1 if sample.dropped else scale
    x_u = (1 - u) * sample.x0 + u * sample.noise
    velocity = w * sample.v + (1 - w) * ema(x_u, u, u, sample.null)
    loss = mean(live(x_u, u, u, sample.cond) - velocity) / w**2
    if not sample.pair:
        return loss
    x_t, t, c = sample.x_t, sample.t, sample.cond
    after, before = min(sample.s + width, t), max(sample.s - width, 0)

    def ends(V):
        return [x_t + (s - t) * V(x_t, t, s, c) for s in (after, before)]

    slope, state = (ends(live)[0] - ends(live)[1]) / (after - before), sum(ends(frozen)) / 2
    middle = (after + before) / 2
    return loss + mean(slope - ema(state, middle, middle, c)) / w**2
