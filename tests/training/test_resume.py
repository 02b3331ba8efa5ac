"""A resumed run equals an uninterrupted one: bitwise on the same number of processes, within rounding on another."""

import json
import shutil
from pathlib import Path

import pytest

from selfe.checkpoint import verify
from selfe.errors import UserError
from selfe.tools import verify_resume
from tests.helpers.train_processes import Run, copy_until, files, finish, lines

HALF, LAST = Path("checkpoints/step_00000004"), Path("checkpoints/step_00000006")
MEASURED = ("trainer.val_every=6", "trainer.cells_every=6", "trainer.stop_step=6")
SIZES = (1, 2, 4)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> dict[int, Path]:
    """The same run on one, two and four processes."""
    folders = {size: tmp_path_factory.mktemp(f"straight_{size}") for size in SIZES}
    for size, folder in folders.items():
        finish(folder, size, *MEASURED)
    return folders


def test_the_same_on_any_number_of_processes(straight):
    one = lines(straight[1])
    assert [line["step"] for line in one] == [1, 2, 3, 4, 5, 6]
    for size in (2, 4):
        for a, b in zip(one, lines(straight[size]), strict=True):
            assert a.keys() == b.keys()
            for name in ("train/loss", "train/data_loss", "val/loss", "val_ema/loss"):
                assert a.get(name) == pytest.approx(b.get(name), abs=1e-5)


def test_sharded_in_groups_with_activations_of_every_second_block_kept(straight, tmp_path):
    """HSDP, 2 x 2: parameters cut over two ranks and copied to two others."""
    finish(tmp_path, 4, *MEASURED, "trainer.shard_size=2", "trainer.activation_checkpointing=2")
    for a, b in zip(lines(straight[1]), lines(tmp_path), strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=1e-5)


def test_batch_sizes_by_step(tmp_path):
    """Micro-batches of a step add up to its batch, and a run resumes in the middle of a phase."""
    phases = "trainer.phases=[{step: 2, total_batch_size: 4}, {step: 4, lr: 1e-4}]"
    finish(tmp_path / "one", 1, phases, "trainer.stop_step=6")
    finish(tmp_path / "two", 2, phases, "trainer.stop_step=3")
    finish(tmp_path / "two", 2, phases, "trainer.stop_step=6")
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [line["samples"] for line in one] == [8, 16, 20, 24, 28, 32]
    assert [line["epoch"] for line in one] == [samples / 33 for samples in (8, 16, 20, 24, 28, 32)]
    for a, b in zip(one, two, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=1e-5)
    assert one[4]["train/lr"] == 1e-4


@pytest.mark.parametrize("load", SIZES)
@pytest.mark.parametrize("save", SIZES)
def test_save_on_some_load_on_others(save, load, straight, tmp_path):
    copy_until(HALF, straight[save], tmp_path)
    output = finish(tmp_path, load, *MEASURED)
    assert f"resuming from {tmp_path / HALF}" in output
    assert "config differs" not in output
    resumed, expected = lines(tmp_path), lines(straight[save])
    for a, b in zip(expected, resumed, strict=True):
        assert a.keys() == b.keys()
        for name in ("train/loss", "val/loss", "val_ema/loss"):
            assert a.get(name) == pytest.approx(b.get(name), abs=1e-5)
    seconds = [json.loads(line)["elapsed"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    before = verify.read_marker(tmp_path / HALF)["elapsed"]
    assert 0 < seconds[0] <= seconds[3] <= before < seconds[4] < seconds[5]
    if save == load:
        assert resumed == expected
        assert files(tmp_path / LAST) == files(straight[save] / LAST)


def test_a_changed_config_is_shown_and_another_shape_refused(straight, tmp_path):
    copy_until(HALF, straight[1], tmp_path)
    output = finish(tmp_path, 1, *MEASURED, "trainer.stop_step=5", "trainer.lr=2e-3")
    assert "config differs from the run so far: trainer.lr: 0.001 -> 0.002" in output.splitlines()
    (start,) = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert set(start["config_changes"]) == {"trainer.stop_step: 6 -> 5", "trainer.lr: 0.001 -> 0.002"}
    assert start["processes"] == 1
    assert "torch==" in (tmp_path / "packages.txt").read_text()
    wide = ("system.backbone.params.width=96", "system.backbone.params.rope_axes=[8, 16, 24]")
    run = Run(tmp_path, 1, *wide)
    assert run.wait() == [2]
    assert "system.backbone.params.width was 48, is now 96" in run.failures[0]["message"]
    keys = ",".join(f"system.backbone.params.{name}" for name in ("width", "rope_axes"))
    run = Run(tmp_path, 1, *wide, f"trainer.allow_changes=[{keys}]")
    assert run.wait() == [2]
    assert "the checkpoint has" in run.failures[0]["message"]
    assert verify.is_complete(tmp_path / HALF)


def test_init_from_chosen_parts(straight, tmp_path):
    """`step` counts on, `model` alone gives EMA the same weights, and the origin stays as it is."""
    origin = straight[1] / HALF
    parts = f"trainer.init_from={{path: {origin}, parts: [model, ema, optimizer, step]}}"
    every = finish(tmp_path / "all", 1, *MEASURED, parts)
    assert f"starting from model, ema, optimizer, step of {origin}" in every
    assert files(tmp_path / "all" / LAST) == files(straight[1] / LAST)
    assert lines(tmp_path / "all") == lines(straight[1])[4:]
    start = f"trainer.init_from={{path: {origin.parent}, parts: [model]}}"
    finish(tmp_path / "model", 1, start, "trainer.stop_step=1", "trainer.lr=1e-9", "trainer.ema_decay=0")
    (line,) = lines(tmp_path / "model")
    assert line["step"] == 1
    assert line["train/ema_distance"] == 0
    run = Run(tmp_path / "none", 1, f"trainer.init_from={{path: {tmp_path}/nowhere}}")
    assert run.wait() == [2]
    assert "no such checkpoint directory" in run.failures[0]["message"]


def test_verify_resume_sees_what_differs(straight, tmp_path):
    """The comparison at the heart of `selfe verify-resume`: nothing between equals, everything else by name."""
    twin = tmp_path / "twin"
    shutil.copytree(straight[1], twin)
    assert verify_resume.compare(straight[1], twin, 6) == []
    marker = verify.read_marker(twin / LAST)
    ((name, (length, crc)),) = files(twin / LAST).items()
    marker["files"][name] = [length, crc + 1]
    verify.write_marker(twin / LAST, marker)
    metrics = (twin / "metrics.jsonl").read_text().splitlines()
    line = json.loads(metrics[3])
    metrics[3] = json.dumps(line | {"train/loss": line["train/loss"] + 1e-7})
    (twin / "metrics.jsonl").write_text("\n".join(metrics) + "\n")
    checkpoint_differs, loss_differs = verify_resume.compare(straight[1], twin, 6)
    assert checkpoint_differs == "__0_0.distcp of the last checkpoint differs"
    assert loss_differs.startswith("step 4: train/loss ")


def test_verify_resume_fails_if_nothing_was_resumed(straight, tmp_path):
    """As when the kill came before the first checkpoint, or after the last step."""
    with pytest.raises(UserError, match=r"killed before its first checkpoint, so nothing was resumed"):
        verify_resume.resumes_from(tmp_path, 6)
    with pytest.raises(UserError, match=r"killed after its last step, so nothing was resumed"):
        verify_resume.resumes_from(straight[1], 6)
    assert verify_resume.resumes_from(straight[1], 8) == straight[1] / LAST
