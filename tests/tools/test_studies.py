"""The studies of scripts/studies: configs, sampling jobs, rows of their results, pages, and the judge of the emoji."""

from __future__ import annotations

import json
import tarfile
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from selfe import config, evaluate
from selfe.errors import UserError
from selfe.evaluation.results import Evaluation, Value
from selfe.inference import job

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts/studies"))


@pytest.mark.parametrize("name", ["miniature", "emoji", "objectives"])
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


def test_the_page_of_the_miniature_is_written_from_its_results():
    """No number of the page, of its claims and of the README's table is typed by hand."""
    report, page = import_module("miniature.report"), import_module("miniature.page")
    results = json.loads(report.RESULTS.read_text())
    assert page.page(results) == (ROOT / "docs/miniature.md").read_text(encoding="utf-8")
    study = page.Study(results)
    assert report.claims(study, results["real"]) == results["claims"]
    assert page.readme_table(study) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tables_of_objectives_are_written_from_their_results():
    report = import_module("objectives.report")
    results = json.loads(report.RESULTS.read_text())
    assert f"\n\n{report.tables(results)}\n\n" in (ROOT / "docs/objectives.md").read_text(encoding="utf-8")


def test_the_best_setting_of_an_objective_is_chosen_by_the_measure():
    models, report = import_module("models"), import_module("objectives.report")
    rows = []
    for ratio, ok, fd in ((0.0, 0.5, 40), (0.25, 0.6, 50)):
        cell = models.Cell(2, 1.0, 0.0, ratio)
        rows.append({"model": "so_flow", "cell": cell.name, "s_ratio": ratio, "guidance": 1.0, "ok": ok, "fd": fd})
    study = report.Rows({"rows": rows})
    assert study.row("so_flow", 2)["ok"] == 0.5
    assert report.with_setting(study.best("so_flow", 2, lambda row: row["ok"])) == "0.60 / 50 (1, 0.25)"
    assert report.with_setting(study.best("so_flow", 2, lambda row: -row["fd"])) == "0.50 / 40 (1, 0)"
    assert report.with_setting(study.best("so_flow", 4, lambda row: row["ok"])) == "-"
    assert study.configs() == ["so_flow"]
    assert study.configs(report.EQUAL_COST) == []


def test_a_model_of_equal_cost_has_fewer_steps_and_a_schedule_in_proportion():
    models = import_module("models")
    run = models.Run("alpha_flow", 1, (), "configs/mini", "_equal_cost", 0.8)
    assert (run.model, run.name) == ("alpha_flow_equal_cost", "alpha_flow_equal_cost_1")
    overrides = dict(override.split("=") for override in models.shortened(run, None))
    assert overrides["trainer.max_steps"] == overrides["system.objective.params.alpha_end_step"] == "2000"
    assert (overrides["trainer.decay_start"], overrides["trainer.total_batch_size"]) == ("1200", "96")
    shorter = dict(override.split("=") for override in models.shortened(run, (1200, 48)))
    assert (shorter["trainer.max_steps"], shorter["trainer.micro_batch_size"]) == ("960", "48")
    assert models.shortened(models.Run("alpha_flow", 1, (), "configs/mini"), None) == []


def test_all_settings_of_a_model_are_one_sampling_job_with_the_same_noise(tmp_path, monkeypatch):
    models, scoring = import_module("models"), import_module("scoring")
    prompts = scoring.Prompts(["a", "b", "a"], ["held_out", "trained", "held_out"])
    run = models.Run("selfe", 2, (models.Cell(1), models.Cell(8), models.Cell(4, 2.0, 0.5, 0.25)), "configs/mini")
    folder = tmp_path / run.name
    folder.mkdir()
    config.save(config.load(run.path), folder / "config.yaml")
    jobs = []
    monkeypatch.setattr(scoring, "start", lambda job, settings, log: jobs.append(job))
    section = import_module("miniature.study").evaluation(tmp_path, "plain", 3)
    scoring.evaluate(run, tmp_path, prompts, 8, section)

    settings = config.load(jobs[0])
    requests = config.build(settings, "inferencer").requests(multiple=2)
    planned = job.plan(requests, ("ema",), "flat", ".png")
    for steps, guidance, s_ratio, eta in ((1, 1.0, 0.0, 0.0), (8, 1.0, 0.0, 0.0), (4, 2.0, 0.25, 0.5)):
        specs = [spec for spec in planned if spec.num_steps == steps]
        assert {(spec.cfg_scale, spec.s_ratio, spec.sampler.eta) for spec in specs} == {(guidance, s_ratio, eta)}
        assert [(spec.prompt, spec.category, spec.seed, spec.sample) for spec in specs] == [
            ("a", "held_out", 1002, 0),
            ("b", "trained", 1002, 1),
            ("a", "held_out", 1002, 2),
        ]
    assert len(planned) == 9
    assert (
        config.build(settings, "evaluation").extractors["judge"].weights == tmp_path / "scorer_plain/scorer.safetensors"
    )


def test_the_rows_of_a_study_are_means_over_the_evaluations_of_its_seeds(tmp_path):
    models, scoring = import_module("models"), import_module("scoring")
    cells = (models.Cell(1), models.Cell(4, 2.0, 0.5, 0.25))
    runs = [models.Run("selfe", seed, cells[:seed], "configs/mini") for seed in (1, 2)]
    for run in runs:
        recorded, values = [], []
        for number, cell in enumerate(run.cells):
            settings = {"num_steps": cell.steps, "cfg_scale": cell.guidance, "s_ratio": cell.s_ratio, "eta": cell.eta}
            recorded.append({"settings": settings})
            values.append(Value(number, "judge", "ok", 0.5 + run.seed / 10, 0.4 + run.seed / 10, 0.7 + run.seed / 10))
        folder = scoring.images_folder(tmp_path, run, 3)
        folder.mkdir(parents=True)
        evaluation = Evaluation(str(folder), recorded, None, {"judge": {}}, {}, 100, values)
        (folder / "evaluation.json").write_text(evaluation.to_json())

    first, second = scoring.rows(tmp_path, runs, 3)
    assert (first["model"], first["cell"], first["seeds"]) == ("selfe", "n1_w1_eta0_s0", 2)
    assert first["ok"] == pytest.approx(0.65)
    assert first["ok_seeds"] == pytest.approx([0.6, 0.7])
    assert 0.65 - first["ok_low"] == pytest.approx((2 * (0.05 * 1.96) ** 2 + 2 * 0.1**2) ** 0.5 / 2)
    assert (second["cell"], second["seeds"], second["ok_seeds"]) == ("n4_w2_eta0.5_s0.25", 1, [0.7])
    assert (second["ok_low"], second["ok_high"]) == pytest.approx((0.6, 0.9))


def test_real_images_are_evaluated_as_if_a_job_had_generated_them(tmp_path, monkeypatch):
    """By an untrained classifier: the numbers are those of the images that were written."""
    scoring, study, scores = (import_module(name) for name in ("scoring", "miniature.study", "miniature.score"))
    monkeypatch.setattr(scoring, "start", lambda job, settings, log: evaluate.main([str(job), settings]))
    monkeypatch.setattr(study, "train_scorer", lambda data, path: None)
    torch.manual_seed(0)
    scorer = scores.new_scorer(8)
    file = study.scorer_path(tmp_path, "plain")
    file.parent.mkdir()
    save_file(scorer.state_dict(), file)

    study.prepare(tmp_path, study.plan(1, quick=True)[:1], 96)
    real = import_module("miniature.report").real_measures(tmp_path, 96)
    images = study.real_images(study.ShapesData(), 96, "real", "plain")
    rounded = (127.5 * (images + 1)).round() / 127.5 - 1
    wanted = scores.score(scorer.eval(), rounded, np.arange(96) % 48)
    assert real[""]["ok"] == pytest.approx(wanted["ok"].double().mean().item())
    assert real[""]["log_norm"] == pytest.approx(wanted["log_norm"].double().mean().item(), abs=1e-6)
    assert real[""]["place"] == pytest.approx(
        np.mean([wanted[name].numpy().std() for name in ("centre_x", "centre_y")]), rel=1e-5
    )

    evaluation = scoring.read(scoring.real_folder(tmp_path, "real_plain", 96))
    assert evaluation.reference["count"] == 4 * 96
    values = scoring.values(evaluation, 0)
    held_out = torch.tensor([category == "held_out" for category in study.prompts(96).categories])
    assert held_out.sum() == 12
    assert values["shape/held_out"].value == pytest.approx(wanted["shape"][held_out].double().mean().item())
    (files,) = scoring.image_files(
        scoring.real_folder(tmp_path, "real_plain", 96), [import_module("models").Cell(0)]
    ).values()
    assert [file.name for file in files[:2]] == ["00000.png", "00001.png"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """The folder of the unpacked emoji."""
    folder = tmp_path_factory.mktemp("emoji")
    with tarfile.open(ROOT / "debug_data/emoji/shards.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def emoji(shards) -> tuple[ModuleType, Any]:
    """The judge's module, and real held-out images."""
    judge = import_module("emoji.judge")
    return judge, judge.real_images(shards, "held_out_pairs")


def test_the_judge_names_real_images_and_no_others(emoji):
    judge, images = emoji
    scorer = judge.load()
    real = judge.score(scorer, images.pixels, images.concepts, images.styles)
    assert real["concept@1"].float().mean() > 0.97
    assert real["style"].float().mean() > 0.97
    assert (real["concept@5"] >= real["concept@1"]).all()
    assert torch.equal(real["both"], real["concept@1"] & real["style"])
    assert real["features"].shape == (len(images), judge.FEATURES)

    # another image of the same style, and a mean of two images, are not what was asked for
    others = judge.score(scorer, images.pixels.roll(200, 0), images.concepts, images.styles)
    assert others["concept@1"].float().mean() < 0.02
    blends = (images.pixels + images.pixels.roll(200, 0) + images.pixels.roll(400, 0)) / 3
    blended = judge.score(scorer, blends, images.concepts, images.styles)
    assert blended["concept@1"].float().mean() < 0.3


def test_a_blurred_emoji_is_still_recognised_and_its_style_is_not(emoji):
    judge, images = emoji
    pixels = images.pixels[::4]
    assert torch.allclose(judge.blurred(pixels, 0.1), pixels, atol=1e-6)
    smooth = torch.linspace(-1, 1, 32).expand(1, 3, 32, 32)
    assert torch.allclose(judge.blurred(smooth, 1.5)[..., 8:-8], smooth[..., 8:-8], atol=1e-6)

    scores = judge.score(judge.load(), judge.blurred(pixels, 1.5), images.concepts[::4], images.styles[::4])
    assert scores["concept@1"].float().mean() > 0.9
    assert scores["both"].float().mean() < 0.8


def test_the_judge_is_an_extractor(emoji, shards, tmp_path):
    judge, images = emoji
    (tmp_path / "train-few.tar").hardlink_to(shards / "held_out_concepts.tar")
    settings = config.load(ROOT / "scripts/studies/emoji/evaluate.yaml")
    settings["evaluation"]["extractors"]["judge"]["params"]["data"] = str(tmp_path)
    extractor = config.build(settings, "evaluation").extractors["judge"]
    assert len(extractor.record()["weights"]) == 64
    assert len(extractor.record()["training images"]) == 1
    extractor.load(torch.device("cpu"))

    some = images.select(torch.arange(0, len(images), 7))
    output = extractor(list(some.pixels), some.captions)
    wanted = judge.score(judge.load(), some.pixels, some.concepts, some.styles)
    assert all(torch.equal(output[name], wanted[name]) for name in wanted)

    # the images that count as training images are copies, others are not
    trained = judge.real_images(tmp_path, "train").select(torch.arange(20))
    assert extractor(list(trained.pixels), trained.captions)["copies"].all()
    assert output["copies"].float().mean() < 0.5
    assert "copies" not in type(extractor)().record()

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
