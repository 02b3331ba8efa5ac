"""Metrics move as they are defined: real emoji against real, blurred and duplicated ones."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from selfe.data.shards import Shards
from selfe.evaluation import statistics
from selfe.evaluation.image_sets import Captioned, subset
from selfe.evaluation.statistics import Bootstrap, Moments
from selfe.types import signed
from tests.evaluation.test_statistics import InBlocks
from tests.helpers.extractors import Thumbnails

ARCHIVE = Path(__file__).parents[2] / "debug_data/emoji/shards.tar.xz"
COUNT = 600  # images of a set


@pytest.fixture(scope="module")
def pixels(tmp_path_factory) -> Tensor:
    """(2 COUNT, 3, 32, 32) in [-1, 1]: training images of all styles, evenly spaced."""
    folder = tmp_path_factory.mktemp("emoji")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    images = subset(Captioned(Shards(folder / "train-*.tar", 10**6)), 2 * COUNT)
    return signed(torch.stack([images.read(i)[0] for i in range(len(images))]))


def features(images: Tensor) -> Tensor:
    extractor = Thumbnails(width=12)
    extractor.load(torch.device("cpu"))
    return extractor(images, [""] * len(images))["features"].double()


def measure(generated: Tensor, reference: Tensor) -> dict[str, float]:
    x, y = features(generated), features(reference)
    none = Bootstrap(range(len(x)), 0)
    moments = Moments.of(InBlocks(y.numpy(), 100))
    root = statistics.root(moments.covariance)
    values = {
        "fd": statistics.frechet_distance(InBlocks(x.numpy(), 100), moments, root, none).distance.value,
        "kid": statistics.kid(x, y, none).value,
        "cmmd": statistics.cmmd(x, y, none).value,
    }
    rows = statistics.neighbours(x, y, 5)._asdict()
    return values | {name: value.mean().item() for name, value in rows.items()}


def test_metrics_move_as_they_are_defined(pixels):
    reference, real = pixels[::2], pixels[1::2]
    blurred = F.avg_pool2d(F.pad(real, (7, 7, 7, 7), "replicate"), 15, stride=1)
    duplicated = torch.cat([real[::2], real[::2]])
    table = {
        name: measure(images, reference)
        for name, images in {"same": reference, "real": real, "blurred": blurred, "duplicated": duplicated}.items()
    }

    # a set against itself
    same = table["same"]
    print(table)
    assert abs(same["fd"]) < 1e-6
    assert abs(same["cmmd"]) < 1e-9
    assert same["kid"] < 0  # unbiased: the pairs of an image with itself count on one side only
    assert same["precision"] == same["recall"] == same["coverage"] == 1

    # other real images are near; blurred ones are far, all in the middle of the real ones
    real, blurred, duplicated = table["real"], table["blurred"], table["duplicated"]
    for name in ("fd", "kid", "cmmd"):
        assert real[name] < blurred[name] / 3, name
    assert real["density"] == pytest.approx(1, abs=0.1)
    assert real["coverage"] > 0.9
    assert blurred["density"] > 1.5
    assert blurred["recall"] < real["recall"] - 0.2

    # duplicates are as precise as real images, but show less of the variety
    assert duplicated["precision"] == pytest.approx(real["precision"], abs=0.05)
    assert duplicated["density"] == pytest.approx(real["density"], abs=0.1)
    assert duplicated["recall"] < real["recall"] - 0.1
    assert duplicated["coverage"] < real["coverage"] - 0.05
    assert duplicated["fd"] > real["fd"]


def test_the_numbers_of_real_images_are_those_of_numpy(pixels):
    """On images, whose features are far from normal."""
    x, y = (features(images).numpy() for images in (pixels[1::2], pixels[::2]))
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    cross = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    wanted = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a) + np.trace(b) - 2 * cross
    assert measure(pixels[1::2], pixels[::2])["fd"] == pytest.approx(wanted, rel=1e-6)
