"""The true flow map of mixtures of Gaussians is what each objective learns: there its expected gradient is zero.

The expectation over the data given x_t is a Gauss-Hermite quadrature over x0 given x_t, with the noise that leads from
x0 to x_t. Gradients are polynomials of it of degree 1 (linear in the velocity noise - x0, but for what a difference of
finite width adds), so the quadrature is exact to rounding. Adaptive weights are off: with them, the weight of a row
depends on its noise, and the mean is no longer what is learned.
"""

import pytest
import torch
from torch import Tensor

from selfe import flow
from selfe.objectives.alpha_flow import AlphaFlow
from selfe.objectives.any_flow import AnyFlow
from selfe.objectives.flow_map import PairTimes
from selfe.objectives.mean_flow import MeanFlow
from selfe.objectives.so_flow import SoFlow
from selfe.objectives.terminal_velocity import TerminalVelocity
from selfe.objectives.transition_model import TransitionModel
from selfe.rng import SampleRNG
from selfe.types import TextCond, packed
from tests.helpers.mixtures import Guided, MapNet, Mixture, mixture

NARROW = 2e-7  # half the width of differences: what they add to a gradient, of first order at t = 1, is below 1e-6
SHORT = 1e-7  # of a step, relative to t - s; what it adds is of first order
EXACT = {
    "MeanFlow": lambda **options: MeanFlow(tangent="data", width=NARROW, adaptive_power=0, **options),
    "iMF": lambda **options: MeanFlow(tangent="network", width=NARROW, adaptive_power=0, **options),
    # in the limit of a short step
    "alpha-Flow": lambda **options: AlphaFlow(alpha_end_step=1, alpha_min=SHORT, adaptive_power=0, **options),
    "SoFlow": lambda **options: SoFlow(r_first=SHORT, r_last=SHORT, adaptive_power=0, **options),
    "TiM": lambda **options: TransitionModel(width=NARROW, adaptive_power=0, p_zero=0, **options),
    "AnyFlow": lambda **options: AnyFlow(width=NARROW, p_zero=0, balance=False, **options),
    "TVM": lambda **options: TerminalVelocity(width=NARROW, **options),
}
T_AND_S = torch.tensor([[1.0, 0.0], [1.0, 0.6], [0.7, 0.1], [0.05, 0.02]], dtype=torch.float64)


class FixedRNG(SampleRNG):
    """Random numbers that are given."""

    def __init__(self, noise: Tensor):
        super().__init__(tuple((row,) for row in range(len(noise))))
        object.__setattr__(self, "noise", noise)

    def normal_like(self, name, x):
        return self.noise


def expected_gradient(objective, net: MapNet, monkeypatch, times: Tensor, dimension: int) -> Tensor:
    """The gradient (theta,) of the loss at points x_t of the times (n, 2), the mean over samples that lead there."""
    t, s = times.T
    x_t = torch.randn(len(t), dimension, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x0, weights = net.data.quadrature(x_t, t, order=4)
    noise = (x_t[:, None] - (1 - t)[:, None, None] * x0) / t[:, None, None]

    num_nodes = x0.shape[1]
    x0, noise = x0.flatten(0, 1), noise.flatten(0, 1)
    t, s = (values.repeat_interleave(num_nodes) for values in (t, s))
    monkeypatch.setattr(PairTimes, "draw", lambda *arguments: (t, s))
    monkeypatch.setattr(flow, "draw_t", lambda *arguments: t)  # of flow matching, where it has a time of its own
    clean = packed(x0, [(1, 1)] * len(x0))
    cond, null = (TextCond(clean, torch.full((len(x0), 1), code, dtype=torch.float64)) for code in (1, 0))
    loss = objective(net, net, clean, {"cond": cond, "null": null}, FixedRNG(noise), 1)
    (gradient,) = torch.autograd.grad((loss.per_sample * weights.flatten()).sum(), net.theta)
    return gradient


@pytest.mark.parametrize("dimension", [1, 2])
@pytest.mark.parametrize("name", EXACT)
def test_the_true_flow_map_is_a_fixed_point(name, dimension, monkeypatch):
    objective = EXACT[name](p_equal=0, p_drop=0)
    net = MapNet(mixture(dimension))
    assert expected_gradient(objective, net, monkeypatch, T_AND_S, dimension).abs().max() < 1e-6


@pytest.mark.parametrize("name", EXACT)
def test_a_wrong_map_is_no_fixed_point(name, monkeypatch):
    """Neither the velocity at time t for every s, nor the true map plus a function."""
    objective = EXACT[name](p_equal=0, p_drop=0)
    net = MapNet(mixture(1), wrong=True)
    assert expected_gradient(objective, net, monkeypatch, T_AND_S, 1).abs().max() > 0.02

    net = MapNet(mixture(1))
    with torch.no_grad():
        net.theta[2] = 0.1
    assert expected_gradient(objective, net, monkeypatch, T_AND_S, 1).abs().max() > 0.02


@pytest.mark.parametrize("name", EXACT)
def test_the_velocity_is_a_fixed_point_of_rows_with_equal_times(name, monkeypatch):
    times = T_AND_S[:, :1].expand(-1, 2)
    objective = EXACT[name](p_equal=1, p_drop=0)
    assert expected_gradient(objective, MapNet(mixture(1)), monkeypatch, times, 1).abs().max() < 1e-9


@pytest.mark.parametrize("name", EXACT)
def test_the_map_of_the_guided_velocity_is_a_fixed_point_with_guidance(name, monkeypatch):
    """Of TiM and AnyFlow at s = t only: their derivative is not that of the guided map."""
    null = Mixture(*(torch.tensor(values).double() for values in ([1.0], [[0.3]], [[[1.5]]])))
    data = mixture(1)
    net = MapNet(Guided(data.weights, data.means, data.covariances, null, 2.5))

    equal = T_AND_S[:, :1].expand(-1, 2)
    objective = EXACT[name](p_equal=1, p_drop=0, guidance=2.5)
    assert expected_gradient(objective, net, monkeypatch, equal, 1).abs().max() < 1e-9
    gradient = expected_gradient(EXACT[name](p_equal=0, p_drop=0, guidance=2.5), net, monkeypatch, T_AND_S, 1)
    assert (gradient.abs().max() > 1e-3) if name in ("TiM", "AnyFlow") else (gradient.abs().max() < 1e-5)


def test_the_error_of_a_difference_is_of_second_order(monkeypatch):
    net, gradients = MapNet(mixture(1)), []
    for width in (0.02, 0.01):
        objective = MeanFlow(width=width, adaptive_power=0, p_equal=0, p_drop=0)
        gradients.append(expected_gradient(objective, net, monkeypatch, T_AND_S[2:3], 1))
    torch.testing.assert_close(gradients[0] / gradients[1], torch.full((5,), 4.0).double(), rtol=0.05, atol=0)


def test_an_adaptive_weight_moves_the_fixed_point(monkeypatch):
    objective = MeanFlow(width=NARROW, adaptive_power=1, p_equal=0, p_drop=0)
    assert expected_gradient(objective, MapNet(mixture(1)), monkeypatch, T_AND_S, 1).abs().max() > 1e-3
