"""Distances of feature sets: equal to plain NumPy formulas, and moved by blur and by duplicates as they are defined."""

import numpy as np
import pytest
import torch

from selfe.evaluation import statistics
from selfe.evaluation.statistics import Bootstrap, Moments


class InBlocks:
    """Rows of an array in blocks of a size."""

    def __init__(self, array: np.ndarray, size: int):
        self.array, self.size = torch.from_numpy(array), size

    def __len__(self) -> int:
        return len(self.array)

    def blocks(self):
        yield from self.array.split(self.size)


@pytest.fixture(scope="module")
def features() -> tuple[np.ndarray, np.ndarray]:
    """Generated (600, 24) and reference (900, 24): correlated, not normal, with other means."""
    source = np.random.default_rng(0)
    mixing = source.standard_normal((24, 24)) / 5
    x = np.abs(source.standard_normal((600, 24))) @ mixing + 0.3
    y = source.standard_normal((900, 24)) @ mixing + 0.1
    return x, y


def frechet_distance(x: np.ndarray, y: np.ndarray, size: int, bootstrap: Bootstrap) -> statistics.Frechet:
    reference = Moments.of(InBlocks(y, size))
    return statistics.frechet_distance(InBlocks(x, size), reference, statistics.root(reference.covariance), bootstrap)


def no_intervals(x: np.ndarray) -> Bootstrap:
    return Bootstrap(range(len(x)), 0)


# ---- references in NumPy ----


def numpy_frechet(x: np.ndarray, y: np.ndarray) -> float:
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    cross = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    return np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a) + np.trace(b) - 2 * cross


def numpy_kid(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, m = len(x), len(y)
    xx, yy = kernel(x, x), kernel(y, y)
    np.fill_diagonal(xx, 0)
    np.fill_diagonal(yy, 0)
    return xx.sum() / n / (n - 1) + yy.sum() / m / (m - 1) - 2 * kernel(x, y).mean()


def numpy_cmmd(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x / np.linalg.norm(x, axis=1, keepdims=True), y / np.linalg.norm(y, axis=1, keepdims=True)

    def kernel(a, b):
        return np.exp(-np.square(a[:, None] - b[None]).sum(axis=2) / 200).mean()

    return 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))


def numpy_prdc(x: np.ndarray, y: np.ndarray, k: int) -> tuple[float, ...]:
    def distances(a, b):
        return np.linalg.norm(a[:, None] - b[None], axis=2)

    def radii(a):
        return np.sort(distances(a, a), axis=1)[:, k]

    across = distances(y, x)
    in_real, in_fake = across < radii(y)[:, None], across < radii(x)[None]
    density = in_real.sum(axis=0).mean() / k
    return in_real.any(axis=0).mean(), in_fake.any(axis=1).mean(), density, in_real.any(axis=1).mean()


def test_frechet_distance_equals_the_formula_in_any_blocks(features):
    x, y = features
    for size in (1, 37, 900):
        reference = Moments.of(InBlocks(y, size))
        np.testing.assert_allclose(reference.covariance, np.cov(y, rowvar=False), rtol=1e-10, atol=1e-12)
        parts = frechet_distance(x, y, size, no_intervals(x))
        assert parts.distance.value == pytest.approx(numpy_frechet(x, y), rel=1e-8)
        assert parts.of_means.value == pytest.approx(np.square(x.mean(0) - y.mean(0)).sum(), rel=1e-8)
        assert parts.extent.value == pytest.approx(x.var(0, ddof=1).sum() / y.var(0, ddof=1).sum(), rel=1e-8)


def test_weights_of_a_replicate_equal_repeated_rows(features):
    x, _ = features
    weights = Bootstrap(range(len(x)), 1).weights(0)
    repeated = np.repeat(x, weights.int().numpy(), axis=0)
    moments = Moments.of(InBlocks(x, 100), weights)
    assert moments.count == len(repeated) == len(x)
    np.testing.assert_allclose(moments.mean, repeated.mean(0), rtol=1e-10)
    np.testing.assert_allclose(moments.covariance, np.cov(repeated, rowvar=False), rtol=1e-9, atol=1e-12)


def test_kernel_distances_equal_their_formulas(features, monkeypatch):
    monkeypatch.setattr(statistics, "BLOCK", 100)
    x, y = map(torch.from_numpy, features)
    assert statistics.kid(x, y, no_intervals(x)).value == pytest.approx(numpy_kid(*features), rel=1e-8)
    assert statistics.cmmd(x, y, no_intervals(x)).value == pytest.approx(numpy_cmmd(*features), rel=1e-8)


@pytest.mark.parametrize("k", [3, 5])
def test_precision_recall_density_and_coverage_equal_their_formulas(features, k, monkeypatch):
    monkeypatch.setattr(statistics, "BLOCK", 100)
    rows = statistics.neighbours(*map(torch.from_numpy, features), k)
    values = [value.mean().item() for value in rows]
    assert values == pytest.approx(numpy_prdc(*features, k), rel=1e-10)
    assert 0 < min(values) < max(values)


def test_the_interval_of_a_mean_has_the_width_of_the_normal_approximation():
    values = torch.from_numpy(np.random.default_rng(1).standard_normal(400) * 3 + 5)
    mean, low, high = Bootstrap(range(400), 1000).mean(values)
    assert mean == pytest.approx(values.mean().item())
    assert high - low == pytest.approx(2 * 1.96 * 3 / 20, rel=0.1)
    assert low < mean < high


def test_images_of_one_prompt_are_resampled_together():
    values = torch.arange(8.0).repeat_interleave(50)  # 50 equal images per prompt: they count as one
    prompts = np.repeat(np.arange(8), 50)
    together, alone = Bootstrap(prompts, 500).mean(values), Bootstrap(range(400), 500).mean(values)
    assert together.high - together.low > 5 * (alone.high - alone.low)


@pytest.mark.parametrize("name", ["fd", "kid", "cmmd"])
def test_distances_have_intervals_around_their_values(features, name):
    x, y = map(torch.from_numpy, features)
    bootstrap = Bootstrap(range(len(x)), 60)
    if name == "fd":
        wide, narrow = (
            frechet_distance(features[0][:n], features[1], 300, Bootstrap(range(n), 60)).distance for n in (100, 600)
        )
    else:
        function = getattr(statistics, name)
        wide, narrow = function(x[:100], y, Bootstrap(range(100), 60)), function(x, y, bootstrap)
    assert narrow.low < narrow.value < narrow.high
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_a_deviation_is_that_of_numpy_and_its_interval_narrows_with_the_number_of_images():
    values = np.random.default_rng(2).standard_normal(2000) * 3 + 100
    few, many = (Bootstrap(range(n), 100).deviation(torch.from_numpy(values[:n])) for n in (100, 2000))
    assert many.value == pytest.approx(values.std(), rel=1e-9)
    # the deviation of n values has a standard error of 3 / sqrt(2 n)
    assert many.high - many.low == pytest.approx(2 * 1.96 * 3 / np.sqrt(4000), rel=0.3)
    assert few.high - few.low > 2.5 * (many.high - many.low)
    assert Bootstrap([0, 1], 0).deviation(torch.tensor([1.0, 3.0])) == (1.0, None, None)


def test_a_pooled_interval_is_that_of_a_bootstrap_over_runs_and_images():
    source = np.random.default_rng(0)
    runs = (source.random((4, 500)) < np.array([[0.2], [0.3], [0.35], [0.5]])).astype(float)
    estimates = [Bootstrap(range(500), 400).mean(torch.from_numpy(run)) for run in runs]
    together = statistics.pooled(estimates)

    means = []
    for _ in range(4000):
        drawn = runs[source.integers(4, size=4)]
        means.append(np.mean([run[source.integers(500, size=500)].mean() for run in drawn]))
    assert together.value == pytest.approx(runs.mean())
    assert together.high - together.low == pytest.approx(np.subtract(*np.percentile(means, [97.5, 2.5])), rel=0.1)

    # one run has its own interval; without intervals there is none
    assert statistics.pooled(estimates[:1]) == pytest.approx(estimates[0])
    assert statistics.pooled([statistics.Estimate(1.0), statistics.Estimate(2.0)]) == (1.5, None, None)
