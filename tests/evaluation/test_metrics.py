"""Metrics of captions and prompts equal plain NumPy formulas; bounded sets are evenly spaced."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from selfe.evaluation import metrics
from selfe.evaluation.features import Chunk, FeatureSet
from selfe.evaluation.metrics import Measured, Reference
from selfe.evaluation.settings import EvaluationConfig
from tests.helpers.extractors import Thumbnails

CAPTIONS = [0, 0, 0, 1, 1, 2, 3, 3, 4, 5]  # of ten images


def feature_set(folder: Path, arrays: dict[str, np.ndarray], size: int) -> FeatureSet:
    """Arrays (n, ...) in files of `size` rows."""
    chunks = []
    count = len(arrays["features"])
    for start in range(0, count, size):
        chunk = Chunk(folder / f"{start}.safetensors", start, min(start + size, count))
        tensors = {name: torch.from_numpy(array[start : chunk.stop].copy()) for name, array in arrays.items()}
        folder.mkdir(exist_ok=True)
        save_file(tensors, chunk.file)
        chunks.append(chunk)
    return FeatureSet(tuple(chunks), torch.device("cpu"))


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    source = np.random.default_rng(0)
    return {name: source.standard_normal((10, 6)).astype(np.float32) for name in ("features", "aligned")}


def measured(features: FeatureSet, texts: np.ndarray | None = None, reference=None, **settings) -> Measured:
    config = EvaluationConfig({"thumbnails": Thumbnails()}, bootstrap=0, **settings)
    texts = None if texts is None else torch.from_numpy(texts)
    return Measured(features, CAPTIONS, texts, reference, config)


def unit(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64) / np.linalg.norm(array, axis=-1, keepdims=True)


def test_clip_score_and_retrieval_compare_images_with_their_captions(arrays, tmp_path):
    texts = np.random.default_rng(1).standard_normal((6, 6))
    texts[5] = texts[4]  # two captions that the extractor cannot tell apart count as one
    given = measured(feature_set(tmp_path, arrays, 4), texts, retrieval_k=(1, 3))

    cosines = unit(arrays["aligned"]) @ unit(texts).T
    own = cosines[range(10), CAPTIONS]
    assert metrics.clip_score(given)["clip_score"].value == pytest.approx(100 * own.mean())

    ranks = (cosines[:, :5] > own[:, None] + 1e-12).sum(axis=1)
    values = metrics.retrieval(given)
    assert values["retrieval@1"].value == (ranks < 1).mean()
    assert values["retrieval@3"].value == (ranks < 3).mean()
    assert 0 < values["retrieval@3"].value < 1


def test_diversity_is_the_mean_distance_of_two_images_of_a_prompt(arrays, tmp_path):
    cosines = unit(arrays["features"]) @ unit(arrays["features"]).T
    pairs = [[(0, 1), (0, 2), (1, 2)], [(3, 4)], [(6, 7)]]
    wanted = np.mean([np.mean([1 - cosines[pair] for pair in prompt]) for prompt in pairs])
    value = metrics.diversity(measured(feature_set(tmp_path, arrays, 3)))["diversity"].value
    maps = feature_set(tmp_path / "maps", arrays | {"maps": arrays["features"][:, ::-1]}, 3)
    assert metrics.map_diversity(measured(maps))["map_diversity"].value == pytest.approx(value)
    assert metrics.map_diversity(measured(feature_set(tmp_path, arrays, 3))) == {}
    assert value == pytest.approx(wanted)


def test_of_large_sets_evenly_spaced_rows_are_compared(arrays, tmp_path):
    features = feature_set(tmp_path, arrays, 4)
    rows, indices = features.some(4)
    assert indices.tolist() == [0, 2, 5, 7]
    np.testing.assert_array_equal(rows, arrays["features"][indices])

    # kid sees these rows only, fd all of them
    other = feature_set(tmp_path / "other", {"features": arrays["features"][::-1] + 1}, 10)
    few, all_rows = (
        metrics.compute(["fd", "kid"], measured(features, None, Reference(other, most), max_features=most))
        for most in (4, 100)
    )
    assert few["fd"] == all_rows["fd"]
    assert few["kid"] != all_rows["kid"]


def test_scores_are_averaged_over_all_images_and_over_each_category(arrays, tmp_path):
    scores = np.arange(10, dtype=np.float32)
    features = feature_set(tmp_path, arrays | {"bright": scores}, 4)
    categories = ["a", "a", "", "b", "a", "b", "", "b", "b", ""]
    config = EvaluationConfig({"thumbnails": Thumbnails()}, bootstrap=50)
    given = Measured(features, range(10), None, None, config, categories)

    values = metrics.compute(["scores", "deviations"], given)
    assert {name: estimate.value for name, estimate in values.items()} == {
        "bright": 4.5,
        "bright/a": pytest.approx((0 + 1 + 4) / 3),
        "bright/b": pytest.approx((3 + 5 + 7 + 8) / 4),
        "bright_std": pytest.approx(scores.std()),
    }
    assert values["bright/a"].low < values["bright/a"].value < values["bright/a"].high

    # the resampling of a category does not depend on the images of others
    rows = {name: array[[3, 5, 7, 8]] for name, array in (arrays | {"bright": scores}).items()}
    only = Measured(feature_set(tmp_path / "b", rows, 4), range(4), None, None, config)
    assert metrics.compute(["scores"], only)["bright"] == values["bright/b"]


def test_an_interval_is_over_prompts_or_over_images(arrays, tmp_path):
    """30 prompts of 10 equal images each have an interval of 30 values, over images of 300."""
    bright = np.repeat(np.random.default_rng(3).random(30), 10).astype(np.float32)
    features = feature_set(tmp_path, {"features": np.zeros((300, 1), np.float32), "bright": bright}, 300)
    widths = {}
    for resample in ("prompts", "images"):
        config = EvaluationConfig({"thumbnails": Thumbnails()}, bootstrap=200, resample=resample)
        given = Measured(features, np.repeat(np.arange(30), 10).tolist(), None, None, config)
        estimate = metrics.scores(given)["bright"]
        widths[resample] = estimate.high - estimate.low
        count = 30 if resample == "prompts" else 300
        assert widths[resample] == pytest.approx(2 * 1.96 * bright.std() / count**0.5, rel=0.2)


def test_metrics_that_lack_texts_or_a_reference_are_left_out(arrays, tmp_path):
    values = metrics.compute(list(metrics.METRICS), measured(feature_set(tmp_path, arrays, 4)))
    assert values.keys() == {"diversity"}
