"""Samplers and guidance: equal to the plain NumPy reference, and right about Gaussian data whose answer is known."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from selfe import flow
from selfe.protocols import Sampler
from selfe.rng import SampleRNG
from selfe.samplers.adams_bashforth import AdamsBashforth
from selfe.samplers.cost import check_sampler, num_evaluations
from selfe.samplers.euler import Euler
from selfe.samplers.guidance import guided
from selfe.samplers.heun import Heun
from selfe.samplers.renoise import Renoise
from selfe.types import Packed, packed
from tests.helpers import reference
from tests.method.test_self_evaluation import CAPTIONS, GRIDS, GaussianNet, encode

IMAGES = SampleRNG.of_images([(0, prompt, n) for n, prompt in enumerate(["a cat", "a dog"] * 4)])
MEAN, COVARIANCE = np.array([1.5, -0.5]), np.array([[0.5, 0.3], [0.3, 0.4]])


def latents() -> Packed:
    like = packed(torch.zeros(sum(r * c for r, c in GRIDS), 2, dtype=torch.float64), GRIDS)
    return like.with_tokens(IMAGES.normal_like("noise", like))


# --- equal to the reference


@pytest.mark.parametrize("cfg_scale", [1, 5])
@pytest.mark.parametrize("s_ratio", [0, 0.5, 1])
@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("eta", [None, 0, 0.5, 1])
def test_samplers_equal_the_reference(eta, num_steps, s_ratio, cfg_scale):
    net, noise = GaussianNet(0), latents()
    prompts = [prompt for _, prompt, _ in IMAGES.keys]
    cond, null = encode(prompts), encode([""] * len(prompts))
    t, s = flow.sampling_times(num_steps, s_ratio, noise)
    sampler = Euler() if eta is None else Renoise(eta)
    samples = noise.with_tokens(sampler(guided(net, cond, null, cfg_scale), noise, t, s, IMAGES).detach()).split()

    fresh = [noise.with_tokens(IMAGES.normal_like(f"fresh {k}", noise)).split() for k in range(num_steps)]
    for i, x in enumerate(noise.split()):
        codes = [np.eye(len(CAPTIONS))[CAPTIONS.index(caption)] for caption in (prompts[i], "")]
        velocity = reference.guided(net.plain(), *codes, cfg_scale)
        if eta is None:
            expected = reference.euler(velocity, x.numpy(), num_steps, s_ratio)
        else:
            parts = [part[i].numpy() for part in fresh]
            expected = reference.ddim(velocity, x.numpy(), num_steps, s_ratio, eta, parts)
        np.testing.assert_allclose(samples[i], expected, rtol=1e-10, atol=1e-10)


def test_times_that_round_to_one_make_no_nan():
    """The first of many steps of a very large image is smaller than the rounding of 1."""
    noise = packed(torch.zeros(256 * 256, 1), [(256, 256)])
    t, _ = flow.sampling_times(200, 0, noise)
    assert t[1] == 1
    for now, then in pairwise(t):
        assert Renoise().fresh_share(now, then).isfinite()


def test_without_fresh_noise_it_is_euler():
    net, noise = GaussianNet(0), latents()
    cond = encode(["a cat"] * len(noise))
    t, s = flow.sampling_times(6, 0.3, noise)
    denoise = guided(net, cond, cond, 1)
    torch.testing.assert_close(
        Renoise(0)(denoise, noise, t, s, IMAGES), Euler()(denoise, noise, t, s, IMAGES), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("sampler", [Euler(), Renoise(1)])
@pytest.mark.parametrize(("cfg_scale", "samples"), [(1, 8), (5, 16)])
def test_n_steps_are_n_calls(sampler, cfg_scale, samples):
    """Guidance packs both halves in one call; guidance 1 has no second half."""
    net, noise, calls = GaussianNet(0), latents(), []

    def counted(x_t, t, s, cond):
        calls.append(len(x_t))
        return net(x_t, t, s, cond)

    cond = encode(["a cat"] * len(noise))
    sampler(guided(counted, cond, cond, cfg_scale), noise, *flow.sampling_times(4, 0, noise), IMAGES)
    assert calls == [samples] * 4


@pytest.mark.parametrize("sampler", [Renoise(0.5), Heun(), AdamsBashforth()])
@pytest.mark.parametrize("cfg_scale", [1, 3])
@pytest.mark.parametrize("interval", [None, (0.25, 0.5), (0.5, 1), (0.9, 0.95)])
def test_evaluations_of_the_network_are_counted(sampler, cfg_scale, interval):
    net, noise, calls = GaussianNet(0), latents(), []

    def counted(x_t, t, s, cond):
        calls.append(len(x_t))
        return net(x_t, t, s, cond)

    cond = encode(["a cat"] * len(noise))
    sampler(guided(counted, cond, cond, cfg_scale, interval), noise, *flow.sampling_times(4, 1, noise), IMAGES)
    assert sum(calls) == len(noise) * num_evaluations(sampler, 4, cfg_scale, interval)
    if (type(sampler), cfg_scale) == (Renoise, 3):
        assert sum(calls) // len(noise) == {None: 8, (0.25, 0.5): 6, (0.5, 1): 7, (0.9, 0.95): 4}[interval]


def test_guidance_in_an_interval_is_that_of_its_steps_and_none_elsewhere():
    """At the time of a step, whatever the number of tokens; steps of 4 are at 1, 0.75, 0.5 and 0.25."""
    net, noise = GaussianNet(0), latents()
    cond, null = encode(["a cat"] * len(noise)), encode([""] * len(noise))
    t, s = flow.sampling_times(4, 0, noise)
    always, never = guided(net, cond, null, 5), guided(net, cond, null, 1)
    inside = guided(net, cond, null, 5, (0.5, 0.75))
    for k, expected in enumerate((never, always, always, never)):
        torch.testing.assert_close(inside(noise, t[k], s[k]), expected(noise, t[k], s[k]), rtol=0, atol=0)


@pytest.mark.parametrize("sampler", [Heun(), AdamsBashforth()])
def test_samplers_of_an_ode_refuse_another_second_time(sampler):
    check_sampler(sampler, (1, 1.0))
    with pytest.raises(ValueError, match=r"s_ratio: 0\.5, but the sampler .* is valid for 1 only; set 1"):
        check_sampler(sampler, (1, 0.5))
    check_sampler(Renoise(), (0, 0.5, 1))


def test_guidance_keeps_the_norm_of_the_conditional_velocity():
    net, x = GaussianNet(0), latents()
    cond, null = encode(["a cat"] * len(x)), encode([""] * len(x))
    t = torch.full((len(x),), 0.6, dtype=torch.float64)
    v_cond, v_null = net(x, t, t, cond), net(x, t, t, null)
    v = guided(net, cond, null, 5)(x, t, t)
    torch.testing.assert_close(flow.norm_per_sample(v, x), flow.norm_per_sample(v_cond, x))
    direction = v_null + 5 * (v_cond - v_null)
    cosine = flow.sum_per_sample(v * direction, x) / (flow.norm_per_sample(v, x) * flow.norm_per_sample(direction, x))
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_eta_out_of_range_is_named():
    with pytest.raises(ValueError, match="eta"):
        Renoise(1.5)


# --- right about Gaussian data: x0 ~ N(MEAN, COVARIANCE), exact velocity, so only the step size is to blame


def exact(x_t: Packed, t: Tensor, s: Tensor) -> Tensor:
    return torch.from_numpy(reference.gaussian_velocity(x_t.tokens.numpy(), float(t[0]), MEAN, COVARIANCE))


def error_of(sampler: Sampler, num_steps: int) -> float:
    """Distance of the sampler's affine map from the one that carries noise to data, without any sampling noise.

    The steps on a Gaussian are an affine map of the noise, so three points determine it: its mean and its covariance.
    """
    points = packed(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64), [(1, 1)] * 3)
    origin, *columns = sampler(exact, points, *flow.sampling_times(num_steps, 1, points), IMAGES).numpy()
    root = np.stack([column - origin for column in columns], axis=1)
    return np.abs(origin - MEAN).max() + np.abs(root @ root.T - COVARIANCE).max()


@pytest.mark.parametrize(
    ("sampler", "order", "last"), [(Euler(), 1, 1e-2), (Heun(), 2, 1e-4), (AdamsBashforth(), 2, 1e-4)]
)
def test_a_sampler_of_an_ode_converges_to_the_data_at_its_order(sampler, order, last):
    errors = [error_of(sampler, n) for n in (16, 32, 64, 128, 256)]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert errors[-1] < last
    assert all(a > b for a, b in pairwise(errors))
    assert orders[-1] == pytest.approx(order, abs=0.1)


def moments_of_ancestral(num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact mean and covariance of eta = 1, propagated through its affine steps by linearity."""
    like = packed(torch.zeros(1, 2, dtype=torch.float64), [(1, 1)])
    times = flow.sampling_times(num_steps, 0, like)[0][:, 0]
    mean, covariance = np.zeros(2), np.eye(2)
    points = packed(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64), [(1, 1)] * 3)
    for pair in pairwise(times):
        t = torch.stack(pair)[:, None].expand(2, 3)
        # called for one step, the sampler takes it for the last one and adds no fresh noise: here is its affine part
        origin, *columns = Renoise(1)(exact, points, t, t[1:], IMAGES).numpy()
        step = np.stack([column - origin for column in columns], axis=1)
        fresh = float(Renoise(1).fresh_share(*t)[0])
        mean, covariance = origin + step @ mean, step @ covariance @ step.T + fresh**2 * np.eye(2)
    return mean, covariance


def test_ancestral_sampling_converges_to_the_data_at_first_order():
    errors = []
    for n in (32, 64, 128, 256):
        mean, covariance = moments_of_ancestral(n)
        errors.append(np.abs(mean - MEAN).max() + np.abs(covariance - COVARIANCE).max())
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert errors[-1] < 0.03
    assert orders[-1] == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("sampler", [Euler(), Renoise(1)])
def test_samples_have_the_moments_of_the_data(sampler):
    # 40 images of 100 independent points each
    rng = SampleRNG.of_images([(0, "", n) for n in range(40)])
    noise = packed(torch.zeros(4000, 2, dtype=torch.float64), [(10, 10)] * 40)
    noise = noise.with_tokens(rng.normal_like("noise", noise))
    x0 = sampler(exact, noise, *flow.sampling_times(48, 0, noise), rng).numpy()
    np.testing.assert_allclose(x0.mean(axis=0), MEAN, atol=0.06)
    np.testing.assert_allclose(np.cov(x0.T), COVARIANCE, atol=0.08)
