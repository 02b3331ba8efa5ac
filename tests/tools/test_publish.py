"""`selfe publish`: the folder of a run, what its card says, and its upload to a Hub that fails at times."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import constants
from huggingface_hub.utils import _http

from selfe import cli
from selfe.errors import UserError
from selfe.generator import Generator
from selfe.tools.publish import card, command
from tests.helpers.run_folders import add_evaluation, add_sheets, evaluation
from tests.helpers.train_processes import TINY, finish
from tests.helpers.upload_hub import UploadHub

REPO = "lab/tiny-any-step"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of four steps with a sample grid, and an evaluation of its images."""
    folder = tmp_path_factory.mktemp("run")
    finish(folder, 1, "trainer.stop_step=4", "trainer.val_every=2", config=TINY)
    add_sheets(folder, 4)
    (folder / "images").mkdir()
    add_evaluation(folder / "images", evaluation(str(folder / "images"), path=str(folder / "val.tsv")))
    return folder


@pytest.fixture(scope="module")
def published(run, tmp_path_factory) -> Path:
    """The folder, written without an upload."""
    out = tmp_path_factory.mktemp("published") / "folder"
    statement = out.with_name("data.md")
    statement.write_text("33 photographs in the public domain.\n")
    arguments = ["--to", REPO, "--out", str(out), "--dtype", "fp32", "--license", "apache-2.0"]
    cli.run(["publish", str(run), *arguments, "--data-statement", str(statement)])
    return out


def publish(run: Path, out: Path, *more: str) -> None:
    cli.run(["publish", str(run), "--to", REPO, "--out", str(out), "--license", "apache-2.0", *more])


def test_a_folder_is_complete_and_names_no_folder_of_this_machine(published, run):
    files = {path.relative_to(published).as_posix() for path in published.rglob("*") if path.is_file()}
    assert files == {
        command.RECORD,
        "README.md",
        "config.json",
        "config.yaml",
        "curves.png",
        "evaluations/images.json",
        "model.safetensors",
        "samples.png",
        "training.yaml",
    }
    for name in files - {command.RECORD, "curves.png", "samples.png", "model.safetensors"}:
        text = (published / name).read_text()
        for folder in (run, published, Path.home(), Path.cwd()):
            assert str(folder) not in text, name
    assert yaml.safe_load((published / "training.yaml").read_text())["trainer"]["max_steps"] == 12


def test_the_card_is_written_from_the_records(published):
    text = (published / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "pipeline_tag": "text-to-image",
        "tags": ["selfe", "any-step"],
        "license": "apache-2.0",
    }
    for words in (
        "# tiny-any-step",
        "33 photographs in the public domain.",
        "Read by `selfe.data.manifest.ManifestData` from `manifest.tsv`.",
        "| steps | 4 of 12 |",
        "| images seen | 32 |",
        "./run.sh tiny.yaml 1 trainer.output_dir=",
        "trainer.stop_step=4",
        "hf download lab/tiny-any-step",
        "FLUX.1 [dev] Non-Commercial License",
        "| step | train/loss | val_plain/loss |",
        "| guidance | steps | NFE | fd (dino) | clip_score (clip) |",
        "![Samples by number of sampling steps](samples.png)",
    ):
        assert words in body, words


def test_a_user_loads_the_folder_and_samples_the_images_of_the_run(published, run, monkeypatch):
    monkeypatch.delenv("SELFE_CACHE_DIR", raising=False)
    images = []
    for folder in (run / "checkpoints", published):
        generator = Generator(folder, precision="fp32")
        for count in (1, 2, 4):
            images += generator.generate(["a cup of coffee"], num_steps=count, height=32, width=32)
    assert [image.tobytes() for image in images[:3]] == [image.tobytes() for image in images[3:]]


def test_a_user_of_diffusers_loads_samples_saves_and_reloads_the_folder(run, tmp_path):
    """As the model card says, without selfe: in 1, 2 and 4 steps, the images of the run."""
    publish(run, tmp_path / "out", "--format", "diffusers", "--dtype", "fp32")
    card_text = (tmp_path / "out/README.md").read_text()
    assert (
        f'pipe = DiffusionPipeline.from_pretrained("{REPO}", custom_pipeline="{REPO}", trust_remote_code=True)'
        in card_text
    )
    assert yaml.safe_load(card_text.split("---\n", 2)[1])["library_name"] == "diffusers"

    generator = Generator(run / "checkpoints", precision="fp32")
    pipeline = DiffusionPipeline.from_pretrained(
        tmp_path / "out", custom_pipeline=str(tmp_path / "out"), trust_remote_code=True
    )
    pipeline.save_pretrained(tmp_path / "saved")
    saved = DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    for each in (pipeline, saved):
        each.set_progress_bar_config(disable=True)
        for count in (1, 2, 4):
            (image,) = each("a cup of coffee", num_inference_steps=count, height=32, width=32).images
            (expected,) = generator.generate(["a cup of coffee"], num_steps=count, height=32, width=32)
            assert np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


def test_what_only_the_author_knows_is_asked_for():
    facts = {"license": None, "data_statement": None, "format": "diffusers"}
    questions = card.open_questions(facts)
    assert len(questions) == 3
    assert "--push needs --license" in questions[0]
    assert card.open_questions({"license": "mit", "data_statement": "x", "format": "safetensors"}) == []
    assert card.short("trainer.output_dir=/home/me/runs/a") == "trainer.output_dir=a"
    assert card.short("trainer.lr=1e-3") == "trainer.lr=1e-3"


@pytest.fixture
def hub(monkeypatch):
    """Requests go to the loopback interface, without waiting between repeated ones."""
    with UploadHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # one protocol, that of git-lfs
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        yield hub


def test_an_upload_survives_cut_connections_and_too_many_requests(hub, run, tmp_path, capsys):
    hub.cut, hub.refused = 1, {"/preupload/": [429, 503]}
    publish(run, tmp_path / "out", "--push")
    assert f"uploaded: {hub.url}/{REPO}/commit/1" in capsys.readouterr().out
    paths = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    sent = {path.relative_to(tmp_path / "out").as_posix(): path.read_bytes() for path in paths}
    sent.pop(command.RECORD)
    assert hub.files[REPO] == sent


def test_an_upload_that_failed_continues_where_it_was(hub, run, tmp_path, monkeypatch):
    hub.refused = {"/commit/": [429]}
    with pytest.raises(
        UserError, match=f"{REPO}: the Hub returned 429: too many requests; wait some minutes, then run"
    ):
        publish(run, tmp_path / "out", "--push")
    assert hub.files[REPO] == {}
    sent = hub.requests["put"]
    assert sent == len(hub.blobs) > 0

    written = (tmp_path / "out/model.safetensors").stat().st_mtime_ns
    publish(run, tmp_path / "out", "--push")
    assert (tmp_path / "out/model.safetensors").stat().st_mtime_ns == written
    assert hub.requests["put"] == sent
    assert "model.safetensors" in hub.files[REPO]


def test_a_token_that_has_expired_is_one_line(hub, published, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    record = json.loads((published / command.RECORD).read_text())
    statement = published.with_name("data.md")
    assert record["license"] == "apache-2.0"
    with pytest.raises(UserError, match="returned 401: the token is missing, invalid or expired; log in with") as error:
        publish(run, published, "--dtype", "fp32", "--data-statement", str(statement), "--push")
    assert "hf_expired" not in str(error.value)
    assert hub.files == {}


def test_mistakes_are_one_line(run, published, tmp_path):
    with pytest.raises(UserError, match=r"--to: 'model' has no user or organisation; give USER/NAME"):
        cli.run(["publish", str(run), "--to", "model"])
    with pytest.raises(UserError, match="--license: choose the licence of the model before it is uploaded"):
        cli.run(["publish", str(run), "--to", REPO, "--push"])
    with pytest.raises(UserError, match="no run; give the output folder of a training"):
        cli.run(["publish", str(tmp_path), "--to", REPO])
    with pytest.raises(UserError, match="was written with another data_statement, dtype; remove the folder, which may"):
        publish(run, published)
    with pytest.raises(UserError, match="exists and was not written by selfe publish; choose another --out"):
        publish(run, run / "checkpoints")
