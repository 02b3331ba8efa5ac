"""The search for sampling settings, and the presets that it writes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from selfe import infer, tune_sampler
from selfe.errors import UserError
from selfe.generator import Generator
from selfe.inference import presets
from selfe.inference.prompts import SamplingDefaults
from selfe.samplers.cost import calls_of
from selfe.samplers.heun import Heun
from selfe.tools import tune_sampler as verb
from selfe.tune_sampler import Candidate, coordinate_search
from tests.helpers.sampling_job import PHOTOS
from tests.helpers.train_processes import QUICK, finish

START = Candidate(1.0, 0.0, 1.0, None)
GRID = {"cfg_scale": [1.0, 3.0], "s_ratio": [0.0, 1.0], "eta": [0.0, 1.0], "guidance_interval": [None, [0.6, 1.0]]}
GRID["sampler"] = ["renoise", "adams_bashforth"]
EVALUATION = {
    "reference": str(PHOTOS / "manifest.tsv"),
    "base_dir": str(PHOTOS),
    "extractors": {"thumbs": {"module": "tests.helpers.extractors.Thumbnails"}},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "run"
    finish(folder, 1, "trainer.stop_step=2", "trainer.lr=0.01")
    return folder


def arguments(run: Path, out: Path, **changes) -> list[str]:
    """Of the program, for a search over 1 and 2 steps."""
    search = {"metric": "thumbs/fd", "budget": 200, "num_images": 8, "num_steps": [1, 2], "grid": GRID}
    inferencer = {"ckpt_dir": str(run / "checkpoints"), "output_dir": str(out.parent / "images"), "precision": "fp32"}
    inferencer["defaults"] = {"height": 32, "width": 32, "cfg_scale": 1.0, "prompt_file": None}
    sections = [f"inferencer={json.dumps(inferencer)}", f"evaluation={json.dumps(EVALUATION)}"]
    return [str(QUICK), json.dumps(search | {"out": str(out)} | changes), *sections]


def distance(candidate: Candidate) -> float:
    """From 3, 0.5, 0, and from the interval that starts at 0.2."""
    start = candidate.guidance_interval[0] if candidate.guidance_interval else 0
    return abs(candidate.cfg_scale - 3) + abs(candidate.s_ratio - 0.5) + candidate.eta + abs(start - 0.2)


def searched(most: int) -> tuple[Candidate, float, int]:
    grid = {
        "cfg_scale": [1.0, 2.0, 3.0],
        "s_ratio": [0.0, 0.5, 1.0],
        "eta": [0.0, 0.5],
        "guidance_interval": [(0.2, 1.0)],
    }
    return coordinate_search(8, START, grid, most, distance, lambda value, than: value < than)


def test_each_setting_is_varied_until_nothing_changes():
    best, value, count = searched(100)
    assert (best, value) == (Candidate(3.0, 0.5, 0.0, (0.2, 1.0)), 0)
    assert count == 13  # of 72 combinations
    assert searched(3) == (Candidate(3.0, 0.0, 1.0, None), distance(Candidate(3.0, 0.0, 1.0, None)), 3)


def test_settings_that_do_not_suit_the_model_are_left_out():
    """As fresh noise does not suit a flow map."""
    tried = []

    def measure(candidate: Candidate) -> float:
        tried.append(candidate)
        return -candidate.eta

    grid, start = {"eta": [0.0, 0.5, 1.0]}, Candidate(1.0, 0.0, 0.0, None)
    most = {"most": 10, "measure": measure, "is_better": lambda value, than: value < than}
    assert coordinate_search(4, start, grid, is_valid=lambda candidate: candidate.eta < 1, **most)[0].eta == 0.5
    assert [candidate.eta for candidate in tried] == [0.0, 0.5]


def test_candidates_that_generate_the_same_images_are_one():
    assert Candidate(5.0, 0.5, 0.7, (0.2, 0.8)).normal(1) == Candidate(1.0, 0.5, 0.0, None)
    assert Candidate(5.0, 0.5, 0.7, (0.2, 1.0)).normal(4) == Candidate(5.0, 0.5, 0.7, None)
    assert Candidate(5.0, 0.5, 0.7, (0.3, 1.0)).normal(4) == Candidate(5.0, 0.5, 0.7, (0.3, 1.0))
    assert Candidate(1.0, 0.5, 0.7, (0.3, 1.0)).normal(4) == Candidate(1.0, 0.5, 0.7, None)


def test_samplers_of_an_ode_are_tried_at_s_equal_to_t_and_for_the_same_calls():
    heun, bashforth = (Candidate(2.0, 0.3, 0.7, None, name) for name in ("heun", "adams_bashforth"))
    assert heun.normal(8) == Candidate(2.0, 1.0, 0.0, None, "heun")
    settings = heun.normal(8).settings(SamplingDefaults(), 8)
    assert (settings.num_steps, settings.s_ratio, type(settings.sampler)) == (4, 1.0, Heun)
    assert len(calls_of(settings.sampler, settings.num_steps)) == 7
    assert bashforth.normal(8).settings(SamplingDefaults(), 8).num_steps == 8

    # a single step is that of Euler
    assert heun.normal(2) == bashforth.normal(1) == Candidate(2.0, 1.0, 0.0, None)
    assert [count for count in (1, 2, 3, 8) if heun.uses(count)] == [3, 8]
    assert [count for count in (1, 2, 3, 8) if bashforth.uses(count)] == [2, 3, 8]

    # the times of Heun's calls decide whether an interval matters
    assert replace(heun, guidance_interval=(0.0, 0.3)).normal(4) == Candidate(1.0, 1.0, 0.0, None, "heun")

    tried = []

    def measure(candidate: Candidate) -> float:
        tried.append(candidate.sampler)
        return 0 if candidate == Candidate(2.0, 1.0, 0.0, None, "heun") else 1

    grid = {"cfg_scale": [1.0, 2.0], "sampler": ["renoise", "heun", "adams_bashforth"]}
    for count, best in ((2, "renoise"), (8, "heun")):
        start = Candidate(2.0, 0.0, 0.5, None)
        chosen, _, _ = coordinate_search(count, start, grid, 100, measure, lambda value, than: value < than)
        assert chosen.sampler == best
    assert tried[:4] == ["renoise", "renoise", "adams_bashforth", "renoise"]


def test_a_preset_of_heun_takes_the_steps_that_its_calls_allow(tmp_path):
    path = tmp_path / "preset.yaml"
    path.write_text("presets: {8: {cfg_scale: 1.0, s_ratio: 1.0, sampler: {module: selfe.samplers.heun.Heun}}}")
    variants = SamplingDefaults(preset=path, num_steps=(1, 4, 8, 9)).variants()
    assert [variant.num_steps for variant in variants] == [1, 2, 4, 5]
    assert [len(calls_of(variant.sampler, variant.num_steps)) for variant in variants] == [1, 3, 7, 9]


def test_a_search_resumes_and_its_preset_samples_what_was_measured(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("SELFE_SKIP_PRETRAINED", "1")
    out = tmp_path / "preset.yaml"
    tune_sampler.main(arguments(trained, out))
    log = tmp_path / "preset_search/candidates.jsonl"
    measured = [json.loads(line) for line in log.read_text().splitlines()]
    best = {}
    for line in measured:
        steps = json.loads(line["candidate"])["num_steps"]
        best[steps] = min(best.get(steps, line["value"]), line["value"])
    content = yaml.safe_load(out.read_text())
    assert {steps: preset["value"] for steps, preset in content["presets"].items()} == best
    assert (content["metric"], content["images"], content["record"]["weights"]["step"]) == ("thumbs/fd", 8, 2)
    assert not (tmp_path / "preset_search/evaluations/generated").exists()

    # killed while it wrote a line
    text = out.read_text()
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:4]) + lines[4][:20])
    out.unlink()
    tune_sampler.main(arguments(trained, out))
    assert out.read_text() == text

    # a list of numbers of steps takes the settings of each; a line of a prompt file may have its own
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a cat"}\n{"prompt": "a cat", "cfg_scale": 2.5}\n')
    sampled = arguments(trained, out)[2:3]
    preset = [
        f"inferencer.defaults.preset={out}",
        f"inferencer.defaults.prompt_file={file}",
        "inferencer.gallery=false",
    ]
    infer.main([str(QUICK), *sampled, "inferencer.defaults.num_steps=[1,2,3]", *preset])
    rows = [json.loads(line) for line in (tmp_path / "images/metadata.jsonl").read_text().splitlines()]
    for row in rows[:3]:
        wanted = content["presets"][min(row["num_steps"], 2)]
        assert (row["cfg_scale"], row["s_ratio"], row.get("guidance_interval")) == (
            wanted["cfg_scale"], wanted["s_ratio"], wanted["guidance_interval"],
        )  # fmt: skip
        assert row.get("eta") == wanted["sampler"]["params"].get("eta")
    assert [(row["cfg_scale"], row["s_ratio"], row["eta"]) for row in rows[3:]] == [(2.5, 0.0, 1.0)] * 3

    generator = Generator(trained / "checkpoints", precision="fp32", size=(32, 32))
    at = presets.read(out)[2]
    chosen = {"cfg_scale": at.cfg_scale, "s_ratio": at.s_ratio, "sampler": at.sampler}
    (one,) = generator.generate(["a cat"], num_steps=2, preset=out)
    (two,) = generator.generate(["a cat"], num_steps=2, guidance_interval=at.guidance_interval, **chosen)
    assert one.tobytes() == two.tobytes()


def test_the_nearest_number_of_steps_is_taken():
    by_steps = {count: presets.Preset(float(count), 0.0) for count in (1, 4, 16)}
    assert {count: presets.nearest(by_steps, count).cfg_scale for count in (1, 2, 3, 8, 9, 50)} == {
        1: 1, 2: 1, 3: 4, 8: 4, 9: 16, 50: 16,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("presets: [1]", "not a preset file"),
        ("presets: {}", "has no presets"),
        ("presets: {1: {cfg_scale: 1.0}}", "presets.1.s_ratio: missing"),
        ("presets: {1: {cfg_scale: 1.0, s_ratio: 2.0}}", "presets.1: s_ratio: 2.0 is not between 0 and 1"),
        (
            "presets: {1: {cfg_scale: 1.0, s_ratio: 0.0, sampler: {module: os.path}}}",
            "names os.path, which is not part",
        ),
        (
            "presets: {4: {cfg_scale: 1.0, s_ratio: 0.0, sampler: {module: selfe.samplers.heun.Heun}}}",
            "the sampler Heun is valid for 1 only",
        ),
    ],
)
def test_a_wrong_preset_is_one_line(text, message, tmp_path):
    path = tmp_path / "preset.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        SamplingDefaults(preset=path)
    with pytest.raises(UserError, match="no such preset file; selfe tune-sampler writes it"):
        replace(SamplingDefaults(), preset=tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"budget": 10},
            "--budget: 10 images are less than .* 8 images for each of 2 numbers of steps; give at least 16",
        ),
        ({"metric": "thumbs/fid"}, "--metric: 'thumbs/fid' is not measured; did you mean thumbs/fd"),
        ({"metric": "fd"}, "--metric: 'fd' is not EXTRACTOR/METRIC, such as thumbs/fd"),
        ({"num_images": 40}, "--images: 40 images, 1 of a prompt, need 40 prompts, but .* has 33"),
        ({"grid": GRID | {"sampler": ["ddim"]}}, "sampler: 'ddim'; valid: renoise, heun, adams_bashforth"),
        ({"grid": GRID | {"eta": [2.0]}}, "eta: 2.0 is not between 0 and 1"),
        ({"num_steps": [0]}, "--steps: 0 is not between"),
    ],
)
def test_mistakes_are_refused(changes, message, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("SELFE_SKIP_PRETRAINED", "1")
    with pytest.raises(UserError, match=message):
        tune_sampler.main(arguments(trained, tmp_path / "preset.yaml", **changes))


def test_the_verb_reads_its_lists():
    assert verb.numbers("--steps", "1,2,4", int) == [1, 2, 4]
    assert [verb.interval(text) for text in ("none", "0.2:1")] == [None, [0.2, 1.0]]
    for call, message in (
        (lambda: verb.numbers("--eta", "0,x", float), "--eta: '0,x' is not a list of numbers"),
        (lambda: verb.numbers("--eta", "0,0", float), "--eta: '0,0' repeats a value"),
        (lambda: verb.interval("0.2"), "--interval: '0.2' is neither none nor LOW:HIGH"),
    ):
        with pytest.raises(UserError, match=message):
            call()
