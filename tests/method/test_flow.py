"""The path, training times, per-sample sums on packed tokens, and random numbers that depend on their key alone."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfe import flow
from selfe.rng import SampleRNG, philox
from selfe.types import Packed, packed
from tests.helpers import reference

times = st.floats(0, 1)
mixed_grids = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=5)


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def randn(seed: int, grids, width: int = 3) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    count = sum(rows * columns for rows, columns in grids)
    return packed(torch.randn(count, width, generator=generator, dtype=torch.float64), grids)


def close(a, b, atol: float = 1e-10) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=atol)


# --- the clock


def test_shift_is_the_line_of_the_paper():
    lens = [1, 256, 512, 1024, 4096, 16384]
    mu = flow.shift(lens, like=f64())
    close(mu[[2, 4]], [0.5, 1.15], atol=1e-15)
    close(mu, [reference.mu(n) for n in lens])


@given(t=times, num_tokens=st.integers(1, 20_000))
def test_warp(t, num_tokens):
    warped = flow.warp(f64(0, t, 1), flow.shift([num_tokens] * 3, like=f64()))
    close(warped, [0, reference.warp(t, num_tokens), 1], atol=1e-14)
    assert warped[0] == 0
    assert warped[2] == 1


def test_warp_is_monotone_and_pushes_large_images_towards_noise():
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    small, large = (flow.warp(t, flow.shift([n], like=t)) for n in (512, 4096))
    assert (small.diff() > 0).all()
    assert (large[1:-1] > small[1:-1]).all()


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.0, 1.5), (-0.4, 1.0)])
def test_training_times_are_warped_logit_normal(mean, std):
    x0 = randn(0, [(1, 1), (2, 3), (8, 8)])
    rng = SampleRNG.of_step(0, 0, range(3))
    z = rng.normal("t", like=x0.tokens)
    expected = [reference.times(mean + std * float(z[i]), 0.0, True, 0.0, n)[0] for i, n in enumerate(x0.lens)]
    close(flow.draw_t(rng, x0, flow.TrainingTimes(mean=mean, std=std)), expected)


def test_training_times_may_be_uniform_and_warped_otherwise_or_not_at_all():
    x0 = randn(0, [(16, 32), (64, 64)])
    rng = SampleRNG.of_step(0, 0, range(2))
    uniform = rng.uniform("t", like=x0.tokens)
    close(flow.draw_t(rng, x0, flow.TrainingTimes("uniform", warp=(0, 0))), uniform)
    mu = torch.tensor([-1.0, 2.0], dtype=uniform.dtype)  # at 512 and at 4096 tokens
    close(flow.draw_t(rng, x0, flow.TrainingTimes("uniform", warp=(-1, 2))), flow.warp(uniform, mu))
    with pytest.raises(ValueError, match="uniform times have no t_mean and t_std"):
        flow.TrainingTimes("uniform", std=1.35)


def test_the_loss_weight_turns_errors_of_the_velocity_into_those_of_data_or_noise():
    x0 = randn(0, [(2, 2), (1, 3)])
    noise, v = (randn(seed, x0.grids).tokens for seed in (1, 2))
    t = torch.tensor([0.3, 0.9], dtype=x0.tokens.dtype)
    x_t = flow.interpolate(x0.tokens, noise, t, x0)
    velocity_error = flow.mean_per_sample((v - (noise - x0.tokens)).square(), x0)
    x0_error = flow.mean_per_sample((flow.predict_x0(x_t, v, t, x0) - x0.tokens).square(), x0)
    noise_error = flow.mean_per_sample((flow.predict_noise(x_t, v, t, x0) - noise).square(), x0)
    close(flow.loss_weight("velocity", t) * velocity_error, velocity_error)
    close(flow.loss_weight("x0", t) * velocity_error, x0_error)
    close(flow.loss_weight("noise", t) * velocity_error, noise_error)


@pytest.mark.parametrize("ratio", [0, 0.5, 1])
def test_sampling_times(ratio):
    noise = randn(0, [(1, 1), (16, 32), (64, 64)])
    for num_steps in (1, 2, 7):
        t, s = flow.sampling_times(num_steps, ratio, noise)
        assert (t.shape, s.shape) == ((num_steps + 1, 3), (num_steps, 3))
        assert ((t[0] == 1) & (t[-1] == 0)).all()
        for i, num_tokens in enumerate(noise.lens):
            expected_t, expected_s = reference.grid(num_steps, ratio, num_tokens)
            close(t[:, i], expected_t)
            close(s[:, i], expected_s)


@given(t=times, ratio=times, lam_max=st.sampled_from([0, 0.3, 5, math.inf]))
def test_self_weight(t, ratio, lam_max):
    s = ratio * t
    weight = float(flow.self_weight(f64(t), f64(s), lam_max))
    assert 0 <= weight <= 1
    if s == t:
        assert weight == 0
    elif t < 1:
        lam = min(t / (1 - t) - s / (1 - s), lam_max)
        assert weight == pytest.approx(lam / (1 + lam), abs=1e-10)


def test_self_weight_at_the_end_of_the_path():
    close(flow.self_weight(f64(1, 1, 1, 0), f64(0, 0.7, 1, 0)), [1, 1, 0, 0], atol=0)
    close(flow.self_weight(f64(1, 1), f64(0, 1), 4.0), [0.8, 0], atol=1e-15)


# --- the path and per-sample sums


@given(grids=mixed_grids, seed=st.integers(0, 99), t=st.floats(1e-3, 1))
def test_path_round_trips(grids, seed, t):
    x0, noise = randn(seed, grids), randn(seed + 100, grids).tokens
    t = torch.linspace(t, 1, len(x0), dtype=torch.float64)
    x_t = flow.interpolate(x0.tokens, noise, t, x0)
    v = noise - x0.tokens
    close(flow.predict_x0(x_t, v, t, x0), x0.tokens)
    close(flow.predict_noise(x_t, v, t, x0), noise)
    for x, clean, eps, time in zip(*(x0.with_tokens(y).split() for y in (x_t, x0.tokens, noise)), t, strict=True):
        close(x, (1 - time) * clean + time * eps)


@given(grids=mixed_grids, seed=st.integers(0, 99))
def test_reductions_equal_a_loop(grids, seed):
    x, target = randn(seed, grids), randn(seed + 100, grids)
    close(flow.sum_per_sample(x.tokens, x), [part.sum() for part in x.split()])
    close(flow.mean_per_sample(x.tokens, x), [part.mean() for part in x.split()])
    close(flow.norm_per_sample(x.tokens, x), [part.norm() for part in x.split()])
    for part, scaled, goal in zip(
        x.split(), x.with_tokens(flow.rescale(x.tokens, target.tokens, x)).split(), target.split(), strict=True
    ):
        close(scaled, part * goal.norm() / part.norm())
    alone = [flow.sum_per_sample(part.tokens, part) for part in (x.select([i]) for i in range(len(x)))]
    assert torch.equal(flow.sum_per_sample(x.tokens, x), torch.cat(alone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rescale_of_nothing_is_nothing(dtype):
    x = randn(0, [(8, 8)])
    zeros = torch.zeros_like(x.tokens, dtype=dtype)
    for target in (x.tokens.to(dtype), zeros):
        assert torch.equal(flow.rescale(zeros, target, x), zeros)


# --- draws


def test_draws_do_not_depend_on_the_batch():
    x, rng = randn(0, [(1, 2), (3, 1), (2, 2), (1, 1)]), SampleRNG.of_step(7, 3, [5, 0, 9, 2])
    rows = [2, 0, 3]
    few = rng.select(rows)
    assert few == SampleRNG.of_step(7, 3, [9, 5, 2])
    for sample in (rng.uniform, rng.normal):
        assert torch.equal(sample("t", x.tokens)[rows], getattr(few, sample.__name__)("t", x.tokens))
    run_on_all_ranks = x.with_tokens(rng.normal_like("noise", x)).select(rows)
    assert torch.equal(run_on_all_ranks.tokens, few.normal_like("noise", x.select(rows)))


def test_a_stream_is_philox_with_the_hash_of_its_key():
    """What numpy gives for the key by itself: nothing else, such as the machine's entropy, has a say."""
    key = (7, 3, 5, "noise")
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    bits = np.random.Philox(key=int.from_bytes(digest, "little"))
    assert np.array_equal(philox(*key).random(100), np.random.Generator(bits).random(100))


def test_every_key_and_name_has_its_own_numbers():
    x = randn(0, [(1, 1)])
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, "", 0), (0, "a", 0), (0, "0", 0), (0, 1, 10), (0, 11, 0)]
    names = ["t", "s", "noise", "renoise", "drop", "fresh 0", "fresh 1", "fresh 10"]
    numbers = {float(SampleRNG((key,)).normal_like(name, x)[0, 0]) for key in keys for name in names}
    assert len(numbers) == len(keys) * len(names)


def test_keys_of_images_do_not_depend_on_steps():
    images = SampleRNG.of_images([(3, "a cat", 0), (3, "a cat", 1)])
    assert images.keys == ((3, "a cat", 0), (3, "a cat", 1))


def kolmogorov(sample: np.ndarray, cdf) -> float:
    """sqrt(n) times the largest distance of the two distribution functions; above 1.95 once in a thousand."""
    n, p = len(sample), np.array([cdf(value) for value in np.sort(sample)])
    return math.sqrt(n) * max((np.arange(1, n + 1) / n - p).max(), (p - np.arange(n) / n).max())


def normal_cdf(z: float) -> float:
    return (1 + math.erf(z / math.sqrt(2))) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distributions(dtype):
    like = torch.zeros(1, 4, dtype=dtype)
    rng = SampleRNG.of_step(0, 0, range(4000))
    uniform, normal = rng.uniform("s", like), rng.normal("t", like)
    x = packed(torch.zeros(8000, 4, dtype=dtype), [(10, 20)] * 40)
    noise = SampleRNG.of_step(0, 1, range(40)).normal_like("noise", x)
    assert {uniform.dtype, normal.dtype, noise.dtype} == {dtype}
    assert (uniform.min() >= 0) & (uniform.max() < 1)
    assert kolmogorov(uniform.numpy(), lambda u: u) < 1.95
    assert kolmogorov(normal.numpy(), normal_cdf) < 1.95
    assert kolmogorov(noise.flatten().numpy(), normal_cdf) < 1.95


def test_double_precision_draws_have_all_their_digits():
    rng, like = SampleRNG.of_step(0, 0, range(64)), f64(0)
    for sample in (rng.uniform, rng.normal):
        assert (sample("s", like) != sample("s", like).float().double()).any()
        close(sample("s", like), sample("s", like.float()), atol=1e-6)


def test_a_prompt_is_dropped_with_its_probability():
    rng = SampleRNG.of_step(0, 0, range(4000))
    prompts = [str(i) for i in range(4000)]
    for p_drop in (0, 0.1, 1):
        left = flow.drop_prompts(prompts, rng, p_drop)
        assert all(caption in ("", prompt) for caption, prompt in zip(left, prompts, strict=True))
        assert abs(left.count("") / 4000 - p_drop) < 4 * math.sqrt(p_drop * (1 - p_drop) / 4000) + 1e-9


def test_cosine_of_each_sample():
    like = packed(torch.zeros(5, 3), [(1, 2), (1, 3)])
    a, b = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    parts = zip(a.split([2, 3]), b.split([2, 3]), strict=True)
    expected = [torch.cosine_similarity(x.flatten(), y.flatten(), dim=0) for x, y in parts]
    torch.testing.assert_close(flow.cosine(a, b, like), torch.stack(expected))
    assert flow.cosine(a, torch.zeros_like(b), like).tolist() == [0, 0]
