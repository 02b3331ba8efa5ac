"""Mixtures of Gaussians, whose velocity is known in closed form and whose flow map by integration, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from selfe import flow
from selfe.types import Packed, TextCond

STEPS = 40  # of Runge-Kutta of fourth order


@dataclass(frozen=True)
class Mixture:
    """x0 ~ sum of weights[k] N(means[k], covariances[k])."""

    weights: Tensor  # (K,)
    means: Tensor  # (K, d)
    covariances: Tensor  # (K, d, d)

    def parts(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Per component, given x_t = x (n, d) at times t (n,).

        Returns:
            Its weight (n, K); the means (n, K, d) of x0 and of the noise; the covariance (n, K, d, d) of x0.
        """
        t = t[:, None, None, None]
        spread = (1 - t) ** 2 * self.covariances + t**2 * torch.eye(x.shape[1], dtype=x.dtype)
        inverse = torch.linalg.inv(spread)
        centred = (x[:, None] - (1 - t[..., 0]) * self.means)[..., None]

        distance = (centred.mT @ inverse @ centred)[..., 0, 0]
        weights = torch.softmax(self.weights.log() - (spread.logdet() + distance) / 2, dim=1)
        gain = (1 - t) * self.covariances @ inverse
        x0, noise = self.means + (gain @ centred)[..., 0], (t * inverse @ centred)[..., 0]
        return weights, x0, noise, self.covariances - (1 - t) * gain @ self.covariances

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """E[noise - x0 | x_t = x] (n, d), at x (n, d) and t (n,)."""
        weights, x0, noise, _ = self.parts(x, t)
        return (weights[..., None] * (noise - x0)).sum(dim=1)

    def mean_velocity(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The flow map (n, d) as a mean velocity: the mean slope of the solution from t to s; at s = t the velocity."""
        total, step = torch.zeros_like(x), (s - t) / STEPS
        for k in range(STEPS):
            time = t + k * step
            first = self.velocity(x, time)
            second = self.velocity(x + step[:, None] / 2 * first, time + step / 2)
            third = self.velocity(x + step[:, None] / 2 * second, time + step / 2)
            fourth = self.velocity(x + step[:, None] * third, time + step)
            slope = (first + 2 * second + 2 * third + fourth) / 6
            x, total = x + step[:, None] * slope, total + slope
        return total / STEPS

    def quadrature(self, x: Tensor, t: Tensor, order: int) -> tuple[Tensor, Tensor]:
        """Nodes x0 (n, m, d) and weights (n, m) of the expectation over x0 given x_t = x, by Gauss and Hermite.

        Polynomials of x0 of a degree below 2 `order` are integrated exactly.
        """
        nodes, node_weights = np.polynomial.hermite_e.hermegauss(order)
        grids = np.meshgrid(*[nodes] * x.shape[1], indexing="ij")
        points = torch.from_numpy(np.stack([grid.ravel() for grid in grids], axis=1))  # (order^d, d)
        shares = np.meshgrid(*[node_weights / node_weights.sum()] * x.shape[1], indexing="ij")
        shares = torch.from_numpy(np.prod(shares, axis=0).ravel())

        weights, means, _, covariances = self.parts(x, t)
        root = torch.linalg.cholesky(covariances)
        x0 = means[:, :, None] + torch.einsum("nkde,me->nkmd", root, points)
        return x0.flatten(1, 2), (weights[..., None] * shares).flatten(1)


@dataclass(frozen=True)
class Guided(Mixture):
    """The guided velocity w v + (1 - w) v_null of a mixture, and its flow map."""

    null: Mixture
    scale: float

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        return self.scale * super().velocity(x, t) + (1 - self.scale) * self.null.velocity(x, t)


def mixture(dimension: int) -> Mixture:
    """Two components of different width, in one or two dimensions."""
    means = torch.tensor([[-1.2, 0.4], [1.0, -0.3]], dtype=torch.float64)
    roots = torch.tensor([[[0.5, 0.0], [0.2, 0.4]], [[0.8, 0.0], [-0.3, 0.6]]], dtype=torch.float64)
    covariances = roots @ roots.mT
    weights = torch.tensor([0.35, 0.65], dtype=torch.float64)
    return Mixture(weights, means[:, :dimension], covariances[:, :dimension, :dimension])


class MapNet(nn.Module):
    """A flow map of a mixture plus `theta` times functions of (x, t, s); exact at theta = 0.

    `wrong`: the velocity at time t instead of the mean velocity from t to s.
    """

    def __init__(self, data: Mixture, wrong: bool = False):
        super().__init__()
        self.data, self.wrong = data, wrong
        self.theta = nn.Parameter(torch.zeros(5, dtype=torch.float64))

    def forward(self, x_t: Packed, t: Tensor, s: Tensor, cond: TextCond) -> Tensor:
        x = x_t.tokens
        data = self.data
        if isinstance(data, Guided) and not cond.pooled.any():  # the null prompt
            data = data.null
        exact = data.velocity(x, t) if self.wrong else data.mean_velocity(x, t, s)
        later, earlier = flow.per_token(t, x_t), flow.per_token(s, x_t)
        functions = [torch.ones_like(x), x, torch.sin(2 * x), later * earlier + 0 * x, later.cos() * torch.tanh(x)]
        return exact + sum(weight * function for weight, function in zip(self.theta, functions, strict=True))
