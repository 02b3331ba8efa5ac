"""Saving in the background: which checkpoints are kept, and errors of the disk."""

import json
import os
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from selfe.checkpoint import verify
from selfe.checkpoint.manager import CheckpointManager, RetentionPolicy
from selfe.distributed.collectives import World
from selfe.errors import UserError
from tests.helpers import train_processes
from tests.helpers.ranks import on_ranks


def state(step: int) -> dict:
    return {"net": {"weight": torch.full((256, 256), float(step))}}


def steps(folder: Path) -> list[int]:
    """All checkpoints of a folder, which must hold nothing else."""
    assert all(verify.damage(path) is None for path in folder.iterdir())
    return sorted(verify.read_step(path) for path in folder.iterdir())


def test_what_stays(alone, tmp_path):
    saver = CheckpointManager(tmp_path, RetentionPolicy(keep_last=2, keep_every=4, keep_best=1), alone)
    scores = {1: 0.5, 3: 0.2, 6: 0.3}
    for step in range(1, 10):
        saver.begin(step, state(step), {"score": scores.get(step)})
    assert saver.finish() == tmp_path / "step_00000009"
    assert steps(tmp_path) == [3, 4, 8, 9]
    truncated = tmp_path / "step_00000009" / "__0_0.distcp"
    truncated.write_bytes(truncated.read_bytes()[:-1])
    saver.begin(10, state(10))
    saver.finish()
    assert [path.name for path in verify.list_checkpoints(tmp_path)[:3]] == [
        "step_00000010",
        "step_00000009",  # damaged: not counted, not touched
        "step_00000008",
    ]
    saver.begin(9, state(9))  # the run comes by again
    saver.finish()
    assert steps(tmp_path) == [3, 4, 8, 9, 10]


def leaves(step: int, columns: int = 5) -> dict:
    """Every kind of leaf: sharded or not is for `test_checkpoint.py`."""
    weight = torch.full((3, columns), float(step))
    tensors = {"weight": weight, "half": weight.bfloat16(), "scalar": weight[0, 0].clone(), "turned": weight.T}
    tensors |= {"part": torch.arange(10.0)[step : step + 3], "empty": torch.empty(0, 4), "mask": weight > 2}
    return {"net": tensors, "optimizer": {"lr": 1 / step, "names": ["a", "b"] * columns, "fused": True}}


def test_every_save_holds_every_leaf(alone, tmp_path):
    """The second save goes where the first went; the third has other shapes, the fourth another name, the fifth a list
    of another length."""
    saver = CheckpointManager(tmp_path, RetentionPolicy(keep_last=9), alone)
    states = {step: leaves(step, columns) for step, columns in ((1, 5), (2, 5), (3, 6), (4, 6), (5, 6))}
    states[4]["net"]["more"] = states[5]["net"]["more"] = torch.ones(2)
    states[5]["optimizer"]["names"] = ["c"]
    for step, state in states.items():
        saver.begin(step, state)
    saver.finish()
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    for step, state in states.items():
        blank = {name: torch.zeros_like(tensor) for name, tensor in state["net"].items()}
        found = {"net": blank, "optimizer": dict.fromkeys(state["optimizer"])}
        dcp.load(found, checkpoint_id=tmp_path / f"step_{step:08d}")
        assert found["optimizer"] == state["optimizer"]
        for name, tensor in state["net"].items():
            assert torch.equal(found["net"][name], tensor), name


def test_leftovers_of_an_interrupted_save_are_removed(alone, tmp_path):
    for name in ("step_00000003.partial", "step_00000002.removed"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes").mkdir()
    CheckpointManager(tmp_path, RetentionPolicy(), alone)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 1 MiB: room for three checkpoints of `state`."""
    command = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=755", "none", str(tmp_path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_full_disk(alone, small_disk, capsys):
    folder = small_disk / "checkpoints"
    saver = CheckpointManager(folder, RetentionPolicy(max_failed_saves=2), alone)
    saver.begin(1, state(1))
    saver.finish()
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 2**16))
    saver.begin(2, state(2))
    saver.begin(3, state(3))  # the first failure does not stop the run
    with pytest.raises(UserError, match=r"2 consecutive saves failed, .*; 0 MiB free in .*step_00000001"):
        saver.begin(4, state(4))
    printed = capsys.readouterr().out.splitlines()
    assert [line[: line.index(":")] for line in printed] == [
        "the checkpoint of step 2 could not be saved",
        "the checkpoint of step 3 could not be saved",
    ]
    assert steps(folder) == [1]
    filler.unlink()
    saver.failures.clear()
    saver.begin(4, state(4))
    saver.finish()
    assert steps(folder) == [1, 4]


def with_a_limit_on_rank_1(world: World, folder: str) -> list[str]:
    """The disk of one of two machines refuses in the middle of a file."""
    if world.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    saver = CheckpointManager(Path(folder), RetentionPolicy(), world)
    parts = {"net": {f"of rank {world.rank}": torch.ones(256, 256)}}
    saver.begin(2, parts)
    saver.wait()
    failed = saver.failures[:]
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    saver.begin(3, parts)
    saver.finish()
    return failed


def test_a_failure_while_sampling_costs_no_step(tmp_path):
    broken = "{module: tests.helpers.faulty_parts.FailingSampler}"
    samples = f"trainer.samples={{every: 2, prompts: [a cat], size: [32, 32], sampler: {broken}}}"
    run = train_processes.Run(tmp_path, 1, samples)
    assert run.wait() == [1]
    assert "no room for images" in run.failures[0]["message"]
    assert verify.latest(tmp_path / "checkpoints").name == "step_00000002"


def test_read_only_folder(alone):
    with tempfile.TemporaryDirectory() as outside:  # pytest's own folders are closed to other users
        Path(outside).chmod(0o755)
        folder = Path(outside) / "checkpoints"
        saver = CheckpointManager(folder, RetentionPolicy(), alone)
        saver.begin(1, state(1))
        saver.finish()
        folder.chmod(0o555)
        user = os.geteuid()
        os.seteuid(user or 65534)  # root may write anywhere
        try:
            assert steps(folder) == [1]
            saver.begin(2, state(2))
            saver.wait()
        finally:
            os.seteuid(user)
            folder.chmod(0o755)
        (failure,) = saver.failures
        assert "Permission denied" in failure
        saver.begin(3, state(3))
        saver.finish()
        assert saver.failures == []
        assert steps(folder) == [1, 3]


def test_a_failure_on_one_rank_is_a_failure_on_all(tmp_path):
    (failure,) = on_ranks(2, with_a_limit_on_rank_1, str(tmp_path))
    assert failure.startswith("process 1: ")
    assert steps(tmp_path) == [3]
    marker = json.loads((tmp_path / "step_00000003" / verify.MARKER).read_text())
    assert set(marker["files"]) == {".metadata", "__0_0.distcp", "__1_0.distcp"}
