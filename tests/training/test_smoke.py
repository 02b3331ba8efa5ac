"""The smoke config: the README's two commands, other numbers of processes, stopped and resumed.

The commands themselves run once; other processes are forks that need no imports. More of the launcher: test_launch.py.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image

from selfe import infer
from selfe.device import accelerator_count
from selfe.errors import UserError
from tests.helpers import infer_processes, train_processes

ROOT = Path(__file__).parents[2]
SMOKE = "configs/debug/selfe_smoke.yaml"
BARE = {key: value for key, value in os.environ.items() if not key.startswith("SELFE_")}
ENV = BARE | {"SELFE_SKIP_PRETRAINED": "1"}
HALF = Path("checkpoints/step_00000006")


# a line of progress in a log file
PROGRESS = (
    r"training \d+/12 loss \d\.\d{4}, lr [\d.e-]+, grad norm [\d.]+, (flow matching|self-evaluation.*), "
    r"[\d.]+ s/step(, .* left)?"
)


def run(script: str, processes: int, *overrides: str, env: dict | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [ROOT / script, SMOKE, str(processes), *overrides],
        cwd=ROOT,
        env=env or ENV,
        capture_output=True,
        text=True,
        timeout=300,
    )


def train(folder: Path, processes: int, *overrides: str) -> str:
    done = run("run.sh", processes, f"trainer.output_dir={folder}", *overrides)
    assert done.returncode == 0, done.stderr
    return done.stdout


def images(output: Path) -> dict[str, np.ndarray]:
    lines = [json.loads(line) for line in (output / "metadata.jsonl").read_text().splitlines()]
    assert {line["file"] for line in lines} == {path.name for path in output.glob("*.png")}
    return {line["file"]: np.asarray(Image.open(output / line["file"]), dtype=int) for line in lines}


def losses(folder: Path) -> list[dict]:
    """The logged steps, without what a clock measured."""
    return [line for line in train_processes.lines(folder) if "train/loss" in line]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights, EMA and optimizer moments."""
    entries = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size) for name, entry in entries.items() if hasattr(entry, "size")}
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return state


@pytest.fixture(scope="module")
def run_of_one(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a run on one process, and what it printed."""
    folder = tmp_path_factory.mktemp("one")
    return folder, train(folder, 1)


@pytest.fixture(scope="module")
def one(run_of_one) -> Path:
    return run_of_one[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    train_processes.finish(folder, 2, config=ROOT / SMOKE)
    return folder


def test_start_progress_and_end_are_told(run_of_one):
    folder, output = run_of_one
    for line in (
        f"run:      {folder}, new, to step 12 of 12",
        "encoders: text encoder 0.14M parameters, frozen; autoencoder 5.29M parameters, frozen",
        "data:     33 images of at most 9,216 pixels, sides multiples of 16",
        "first:    checkpoint after step 6, validation after step 6, samples after step 12",
        f"12 steps done; checkpoint: {folder}/checkpoints/step_00000012",
        f"samples:  {folder}/samples",
        f"report:   .venv/bin/selfe report {folder}",
        f"images:   .venv/bin/selfe infer {folder}/config.yaml",
    ):
        assert line in output.splitlines()
    assert "batch:    8 images per step = 4 per micro-batch (at most 4) x 2 accumulated x 1 process; " in output
    assert ("no GPU found" in output) == (accelerator_count() == 0)

    progress = [line for line in output.splitlines() if line.startswith("training ")]
    assert len(progress) >= 2
    assert all(re.fullmatch(PROGRESS, line) for line in progress), progress
    assert "after step 8: now self-evaluation and auxiliary term, " in output
    assert "the loss has other terms from here on, so its value jumps, val_plain/loss stays comparable" in output


def test_passes_through_all_phases(one):
    lines = losses(one)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all("train/self_loss" not in line for line in lines[:4])
    assert all(line["train/self_loss"] > 0 and line["train/aux_loss"] == 0 for line in lines[4:8])
    assert all(line["train/self_loss"] > 0 and line["train/aux_loss"] > 0 for line in lines[8:])
    assert (one / "samples" / "step_00000012.png").is_file()
    assert (one / "config.yaml").is_file()


def test_two_processes_agree_with_one(one, two):
    for a, b in zip(losses(one), losses(two), strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-6 if a["step"] == 1 else 1e-4)


def test_stopped_and_resumed_equals_uninterrupted(two, tmp_path):
    """From the checkpoint in the middle. Other numbers of processes: test_resume.py."""
    train_processes.copy_until(HALF, two, tmp_path)
    assert "resuming from" in train_processes.finish(tmp_path, 2, config=ROOT / SMOKE)
    for a, b in zip(losses(two), losses(tmp_path), strict=True):
        assert a == b
    expected, resumed = (weights(folder / "checkpoints/step_00000012") for folder in (two, tmp_path))
    assert expected.keys() == resumed.keys()
    assert len([name for name in expected if name.startswith("optimizer.")]) > 100
    for name, tensor in expected.items():
        assert torch.equal(tensor, resumed[name]), name


def test_finished_run_has_nothing_to_do(one):
    assert "nothing to do" in train_processes.finish(one, 1, config=ROOT / SMOKE)


def test_images_do_not_depend_on_processes_or_batch(one, tmp_path):
    """By the EMA and the live weights; each of the two on its own: test_infer.py."""
    options = f"inferencer.ckpt_dir={one}/checkpoints", "inferencer.weights=both"
    done = run("infer.sh", 1, *options, f"inferencer.output_dir={tmp_path}/a")
    assert done.returncode == 0, done.stderr
    expected = images(tmp_path / "a")
    assert {name[-6:-4] for name in expected} == {"01", "02", "04"}
    assert len({image.tobytes() for image in expected.values()}) == len(expected)

    others = f"inferencer.output_dir={tmp_path}/b", "inferencer.batch_size=1"
    processes = infer_processes.start(2, [str(ROOT / SMOKE), *options, *others])
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    actual = images(tmp_path / "b")
    assert actual.keys() == expected.keys()
    assert max(np.abs(expected[file] - actual[file]).max() for file in expected) <= 1


def only_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2, done
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_a_bad_image_on_one_rank_is_one_line(tmp_path, capsys):
    lines = (ROOT / "debug_data/t2i_smoke/manifest.tsv").read_text().splitlines()
    bad = tmp_path / "bad.jpg"
    good = (ROOT / "debug_data/t2i_smoke" / lines[0].split("\t")[0]).read_bytes()
    bad.write_bytes(good[: len(good) // 2])
    manifest = tmp_path / "manifest.tsv"
    manifest.write_text("\n".join([f"{bad}\ta broken image", *lines]))
    training = train_processes.Run(tmp_path / "run", 2, f"data.params.train_manifest={manifest}")
    assert sorted(training.wait()) == [1, 2]
    assert training.report() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(bad) in line
    assert "line 1" in line


def test_mistakes_before_the_first_step_are_one_line(tmp_path):
    training = train_processes.Run(tmp_path / "run", 2, "trainer.shard_size=3")
    assert training.wait() == [2, 2]
    assert {"groups of 3" in failure["message"] for failure in training.failures.values()} == {True}
    assert not (tmp_path / "run").exists()
    (tmp_path / "step_00000003").mkdir()
    folders = f"inferencer.output_dir={tmp_path}/images", f"inferencer.ckpt_dir={tmp_path}/step_00000003"
    with pytest.raises(UserError, match="incomplete"):
        infer.main([str(ROOT / SMOKE), *folders])


def test_without_weights_and_without_the_variable_one_line_says_what_to_run(tmp_path):
    assert "SELFE_CACHE_DIR" in only_line(run("run.sh", 1, f"trainer.output_dir={tmp_path}", env=BARE))
