"""One process writes to a folder; a lock left by a dead process does not stop the next one."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from selfe.errors import UserError
from selfe.io import folder_lock
from selfe.io.folder_lock import FolderLock, removed_on_failure
from tests.helpers.train_processes import Run


def lock(folder: Path) -> FolderLock:
    return FolderLock(folder, "trainer.output_dir", lost=pytest.fail)


def leave(folder: Path, **changes: object) -> Path:
    """A lock file as this process would have left it, with changes."""
    folder.mkdir(exist_ok=True)
    path = folder / folder_lock.FILE
    path.write_text(json.dumps(json.loads(folder_lock.describe_holder()) | changes))
    return path


def test_a_live_holder_is_named_and_the_lock_is_free_afterwards(tmp_path):
    folder = tmp_path / "run"
    with lock(folder):
        with pytest.raises(UserError, match=rf"another process is writing to it: process {os.getpid()} on ") as refused:
            lock(folder).__enter__()
        assert "set another trainer.output_dir" in str(refused.value)
    assert list(folder.iterdir()) == []
    with lock(folder):
        pass


def test_a_dead_holder_on_this_machine_is_replaced_at_once(tmp_path):
    child = os.fork()
    if not child:
        os._exit(0)
    leave(tmp_path, pid=child)  # a zombie until it is waited for
    with lock(tmp_path):
        pass
    os.waitpid(child, 0)
    for changes in ({"pid": child}, {"started": "1"}):  # ended; its id has been given to another process
        leave(tmp_path, **changes)
        with lock(tmp_path):
            assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_holder_on_another_machine_lives_as_long_as_its_heartbeat(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "BEAT", 0.02)
    path = leave(tmp_path, machine="elsewhere", host="node7", pid=12)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.01):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(UserError, match="process 12 on node7, since 2"):
        lock(tmp_path).__enter__()
    stop.set()
    thread.join()

    os.utime(path, (time.time() - 2 * folder_lock.STALE,) * 2)
    with lock(tmp_path):
        assert json.loads(path.read_bytes())["pid"] == os.getpid()


def test_a_lock_file_that_was_cut_short_counts_by_its_age(tmp_path):
    path = tmp_path / folder_lock.FILE
    path.write_text('{"pid": 1')
    os.utime(path, (time.time() - 2 * folder_lock.STALE,) * 2)
    with lock(tmp_path):
        pass


def test_a_holder_notices_that_it_was_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "BEAT", 0.01)
    lost = threading.Event()
    with FolderLock(tmp_path, "--out", lost=lambda message: lost.set()) as mine:
        mine.path.unlink()  # by hand: written again
        while not mine.path.exists():
            time.sleep(0.01)
        assert not lost.is_set()
        leave(tmp_path)
        assert lost.wait(20)
    assert mine.path.exists()  # that of the other one


@pytest.mark.parametrize("size", [1, 2])
def test_a_second_run_in_the_same_folder_ends_with_one_line(size, tmp_path):
    first = Run(tmp_path, 1, "trainer.max_steps=100000", "trainer.checkpoint_every=100000")
    first.wait_for("training 1/")
    second = Run(tmp_path, size)
    assert second.wait() == [2] * size
    messages = {failure["message"] for failure in second.failures.values()}
    (message,) = messages
    assert f"process {first.processes[0].pid} on " in message
    assert len((tmp_path / "starts.jsonl").read_text().splitlines()) == 1
    first.send(signal.SIGTERM)
    assert first.wait() == [128 + signal.SIGTERM]
    assert not (tmp_path / folder_lock.FILE).exists()


@pytest.mark.parametrize(
    ("files", "is_removed"), [({}, True), ({"a.yaml": "x", "empty": ""}, True), ({"a.yaml": "x", "b": "x"}, False)]
)
def test_a_folder_that_a_failed_start_has_created_is_removed_unless_it_holds_results(tmp_path, files, is_removed):
    folder = tmp_path / "run"

    def start() -> None:
        folder.mkdir(exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
        raise RuntimeError

    with pytest.raises(RuntimeError), removed_on_failure(folder, ["a.yaml"]):
        start()
    assert folder.exists() != is_removed

    # it was there before
    folder.mkdir(exist_ok=True)
    with pytest.raises(RuntimeError), removed_on_failure(folder, ["a.yaml"]):
        start()
    assert folder.exists()
