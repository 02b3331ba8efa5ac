"""The method once more in plain NumPy, one sample at a time: written from arXiv 2512.22374, not from the package.

A sample is an array (n, d); a denoiser is a function V(x_t, t, s, c) -> velocity (n, d) with scalar t and s. What
depends on the denoiser meets no absolute value, maximum or conjugate, so all of it also runs on complex numbers: the
imaginary part of a loss, at a parameter moved by 1e-30 i, is the derivative times 1e-30, exact to rounding.
"""

from dataclasses import dataclass

import numpy as np


def mu(num_tokens):
    """The line through 0.5 at 512 tokens and 1.15 at 4096 (S.2)."""
    return np.polyval(np.polyfit([512, 4096], [0.5, 1.15], 1), num_tokens)


def warp(t, num_tokens):
    """S.2, at 0 and 1 by continuity."""
    return t if t in (0, 1) else np.exp(mu(num_tokens)) / (np.exp(mu(num_tokens)) + 1 / t - 1)


def norm(x):
    return np.sqrt((x * x).sum())


# ---------------------------------------------------------------------------------------------------------- training


@dataclass
class Settings:
    auxiliary: bool = False
    k_cls: float = 1.0  # weight of g_null - g_cond
    k_fake: float = 0.0  # weight of g_fake - g_cond, in the auxiliary phase only
    energy_preserving: bool = True
    lam_max: float = np.inf
    eval_floor: float = 0.0


@dataclass
class Sample:
    """A clean sample, its random numbers, and what c, the null prompt and the fake prompt are to the denoiser."""

    x0: np.ndarray
    noise: np.ndarray
    renoise: np.ndarray
    t: float
    s: float
    dropped: bool
    cond: np.ndarray
    null: np.ndarray
    fake: np.ndarray


def times(z, u, equal, tau, num_tokens):
    """t from a standard normal z (S.2); s = t, or uniform in ((1 - tau) t, t) from a uniform u, 0 being s = t."""
    t = warp(1 / (1 + np.exp(-z)), num_tokens)
    return t, t if equal else t - u * (t - (1 - tau) * t)


def sample_head(V, x_t, t, s, c):
    """G of Eq. 6."""
    return x_t - t * V(x_t, t, s, c)


def target(sample, x0_hat, live, cond_net, null_net, config):
    """Effective target (Eq. 14, 17-19) and the re-noised sample with its time; all of it is behind a stop-gradient."""
    t, s = sample.t, sample.s
    if s == t:
        return sample.x0, None, None
    s = max(s, config.eval_floor * t)
    x_s = (1 - s) * x0_hat + s * sample.renoise
    g_cond = sample_head(cond_net, x_s, s, s, sample.cond)
    delta = config.k_cls * (sample_head(null_net, x_s, s, s, sample.null) - g_cond)
    if config.auxiliary:
        delta = delta + config.k_fake * (sample_head(live, x_s, s, s, sample.fake) - g_cond)
    if sample.dropped:
        return sample.x0, x_s, s
    lam = min(t / (1 - t) - s / (1 - s), config.lam_max)
    mixed = (sample.x0 + lam * (x0_hat - delta)) / (1 + lam)
    return mixed * norm(sample.x0) / norm(mixed) if config.energy_preserving else mixed, x_s, s


def losses(sample, live, cond_net, null_net, config, frozen=None):
    """Main loss (Eq. 20-21) and auxiliary loss (Eq. s.8; nan for a sample at s = t) of one sample.

    `live` is the denoiser that gets the gradient; `frozen`, if given, stands for it wherever the gradient is stopped.
    """
    t, frozen = sample.t, frozen or live
    x_t = (1 - t) * sample.x0 + t * sample.noise
    stopped = sample_head(frozen, x_t, t, sample.s, sample.cond)
    goal, x_s, s = target(sample, stopped, frozen, cond_net, null_net, config)
    error = sample_head(live, x_t, t, sample.s, sample.cond) - goal
    main = (error * error).mean() / t**2
    if not config.auxiliary or x_s is None:
        return main, np.nan
    error = sample_head(live, x_s, s, s, sample.fake) - stopped
    return main, (error * error).mean() / s**2


# ---------------------------------------------------------------------------------------------------------- sampling


def grid(num_steps, s_ratio, num_tokens):
    t = [warp(1 - k / num_steps, num_tokens) for k in range(num_steps + 1)]
    return t, [t[k + 1] + s_ratio * (t[k] - t[k + 1]) for k in range(num_steps)]


def euler(V, x, num_steps, s_ratio):
    """Eq. 22; V(x, t, s)."""
    t, s = grid(num_steps, s_ratio, len(x))
    for k in range(num_steps):
        x = x - (t[k] - t[k + 1]) * V(x, t[k], s[k])
    return x


def ddim(V, x, num_steps, s_ratio, eta, fresh):
    """DDIM with alpha = 1 - t, sigma = t; `fresh[k]` is the noise of step k."""
    t, s = grid(num_steps, s_ratio, len(x))
    for k in range(num_steps):
        v = V(x, t[k], s[k])
        x0_hat, noise_hat = x - t[k] * v, x + (1 - t[k]) * v
        sigma, sigma_next = t[k], t[k + 1]
        alpha, alpha_next = 1 - sigma, 1 - sigma_next
        std = eta * sigma_next / sigma * np.sqrt(sigma**2 - (alpha / alpha_next) ** 2 * sigma_next**2)
        x = alpha_next * x0_hat + np.sqrt(sigma_next**2 - std**2) * noise_hat + std * fresh[k]
    return x


def guided(V, cond, null, omega):
    """Energy-preserving guidance (arXiv 2412.09966)."""

    def denoise(x, t, s):
        v_cond, v_null = V(x, t, s, cond), V(x, t, s, null)
        g = v_null + omega * (v_cond - v_null)
        return g * norm(v_cond) / norm(g)

    return denoise


# ----------------------------------------------------------------------------------------------------- Gaussian data


def gaussian_velocity(x, t, mean, covariance):
    """E[noise - x0 | x_t = x] for x0 ~ N(mean, covariance), every row of x a point of its own."""
    identity = np.eye(len(mean))
    spread = np.linalg.inv((1 - t) ** 2 * covariance + t**2 * identity)
    centred = x - (1 - t) * mean
    return centred @ spread @ (t * identity - (1 - t) * covariance) - mean
