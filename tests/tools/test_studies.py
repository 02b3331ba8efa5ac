"""The studies of scripts/studies: their configs, their measures and the judge of the emoji."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from selfe import config
from selfe.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts/studies"))


@pytest.mark.parametrize("name", ["miniature", "emoji"])
def test_every_model_of_a_study_has_a_config(name):
    """Each differs from the others, and from itself by the seed only."""
    study = import_module(f"{name}.study")
    runs = study.plan(study.SEEDS, quick=False)
    assert len({run.name for run in runs}) == len(runs)
    systems = {}
    for run in runs:
        settings = config.load(run.path)
        trained = {"system": settings["system"], "data": settings["data"], "steps": settings["trainer"]["max_steps"]}
        systems[run.config] = str(config.plain(trained))
    assert len(set(systems.values())) == len(systems)
    assert {run.config for run in study.plan(1, quick=True)} <= systems.keys()


def test_frechet_distance_of_normal_distributions():
    """|mean difference|^2 + tr(A + B - 2 sqrt(A B)); for diagonal covariances the last is a sum over axes."""
    measures = import_module("measures")
    rng = np.random.default_rng(0)
    a = rng.standard_normal((200_000, 3)) * [1.0, 2.0, 3.0]
    b = rng.standard_normal((200_000, 3)) * [2.0, 2.0, 1.0] + [0.0, 1.0, 0.0]
    assert measures.frechet(a, b) == pytest.approx(1 + (1 - 2) ** 2 + (3 - 1) ** 2, rel=0.02)
    assert measures.frechet(a, a) == pytest.approx(0, abs=1e-6)


def test_interval_holds_the_mean_and_narrows_with_the_number_of_captions():
    measures = import_module("measures")
    right = np.random.default_rng(0).random((2, 1000)) < 0.3
    low, high = measures.interval(right)
    assert low < right.mean() < high
    # seeds are resampled too: the width is near that of 2 x 1000 independent captions
    assert 0.02 < high - low < 0.09
    wide_low, wide_high = measures.interval(right[:, :50])
    assert wide_high - wide_low > 2 * (high - low)


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """The judge's module, and real held-out images."""
    sys.path.insert(0, str(ROOT / "scripts/studies"))
    judge = import_module("emoji.judge")
    sys.path.remove(str(ROOT / "scripts/studies"))
    folder = tmp_path_factory.mktemp("emoji")
    judge.unpack(folder)
    return judge, judge.real_images(folder, "held_out_pairs")


def test_the_judge_names_real_images_and_no_others(emoji):
    judge, images = emoji
    scorer = judge.load()
    real = judge.score(scorer, images.pixels, images.concepts, images.styles)
    assert real["concept@1"].float().mean() > 0.97
    assert real["style"].float().mean() > 0.97
    assert (real["concept@5"] >= real["concept@1"]).all()
    assert real["features"].shape == (len(images), judge.FEATURES)

    # another image of the same style, and a mean of two images, are not what was asked for
    others = judge.score(scorer, images.pixels.roll(200, 0), images.concepts, images.styles)
    assert others["concept@1"].float().mean() < 0.02
    blends = (images.pixels + images.pixels.roll(200, 0) + images.pixels.roll(400, 0)) / 3
    blended = judge.score(scorer, blends, images.concepts, images.styles)
    assert blended["concept@1"].float().mean() < 0.3


def test_the_judge_is_an_extractor(emoji):
    judge, images = emoji
    settings = config.load(ROOT / "scripts/studies/emoji/evaluate.yaml")
    extractor = config.build(settings, "evaluation").extractors["judge"]
    assert len(extractor.record()["weights"]) == 64
    extractor.load(torch.device("cpu"))

    some = images.select(torch.arange(0, len(images), 7))
    output = extractor(list(some.pixels), some.captions)
    wanted = judge.score(judge.load(), some.pixels, some.concepts, some.styles)
    assert all(torch.equal(output[name], wanted[name]) for name in wanted)

    # the caption's own emoji is the most similar of these captions
    similarities = output["aligned"] @ extractor.texts(some.captions).T
    assert (similarities.diagonal() >= similarities.amax(dim=1) - 1e-6).float().mean() > 0.97
    with pytest.raises(UserError, match="'a fox': the judge needs an emoji and a style"):
        extractor.texts(["a fox"])


def test_an_image_is_nearest_to_itself(emoji):
    judge, images = emoji
    pixels = images.pixels[:40]
    assert torch.allclose(judge.nearest(pixels, images.pixels), torch.zeros(40), atol=2e-3)
    darker = pixels - 0.2 * (pixels > -0.5)
    expected = ((darker - pixels).square().mean(dim=(1, 2, 3))).sqrt()
    assert (judge.nearest(darker, pixels) <= expected + 1e-4).all()
