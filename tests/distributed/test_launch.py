"""The launcher: its arguments, its messages and exit codes, and that it leaves nothing behind."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from selfe import cli, device, launch, signals
from selfe.checkpoint import verify
from selfe.errors import UserError
from selfe.io.folder_lock import FolderLock
from tests.helpers import train_processes

ROOT = Path(__file__).parents[2]
SMOKE, QUICK = str(ROOT / "configs/debug/selfe_smoke.yaml"), str(train_processes.QUICK)
ENV = os.environ | {"SELFE_SKIP_PRETRAINED": "1"}
LONG = "trainer.max_steps=100000"


def test_arguments(monkeypatch):
    monkeypatch.setattr(device, "accelerator_count", lambda: 0)
    assert launch.parse(SMOKE, []) == (SMOKE, 1, [])
    assert launch.parse(SMOKE, ["3", "a.b=1", "c=2"]) == (SMOKE, 3, ["a.b=1", "c=2"])
    assert launch.parse(SMOKE, ["a.b=1"]) == (SMOKE, 1, ["a.b=1"])
    monkeypatch.setattr(device, "accelerator_count", lambda: 4)
    assert launch.parse(SMOKE, []) == (SMOKE, 4, [])
    assert launch.parse(SMOKE, ["4"]) == (SMOKE, 4, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "nowhere.yaml: no such config file"),
        ([SMOKE, "two"], "NGPUS: 'two' is not a number of at least 1"),
        ([SMOKE, "0"], "NGPUS: '0' is not a number of at least 1"),
        ([SMOKE, "8"], "NGPUS: 8 requested, this machine has 4; use at most 4"),
        ([SMOKE, "2", "trainer.lr"], "'trainer.lr' is not key=value"),
    ],
)
def test_mistakes_are_one_line(arguments, message, monkeypatch):
    monkeypatch.setattr(device, "accelerator_count", lambda: 4)
    with pytest.raises(UserError, match=re.escape(message)):
        cli.run(["train", *arguments])


@pytest.mark.parametrize("program", ["train", "infer"])
def test_help(program, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run([program, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for word in ("CONFIG [NGPUS] [key=value ...]", "SELFE_CACHE_DIR", "SELFE_SKIP_PRETRAINED", "NNODES", "exit codes"):
        assert word in text
    with pytest.raises(SystemExit) as ended:
        cli.run([program])
    assert ended.value.code == 2


def test_several_machines(monkeypatch):
    for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert launch.multi_node() is None
    monkeypatch.setenv("NNODES", "2")
    with pytest.raises(UserError, match="NNODES is 2, but NODE_RANK is not set"):
        launch.multi_node()
    for name, value in {"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    found = launch.multi_node()
    assert (found["rdzv_endpoint"], found["rdzv_configs"], found["max_nodes"]) == ("10.0.0.1:29500", {"rank": 1}, 2)
    monkeypatch.setenv("NODE_RANK", "2")
    with pytest.raises(UserError, match="NODE_RANK: 2 is not less than NNODES = 2"):
        launch.multi_node()
    monkeypatch.setenv("NNODES", "many")
    with pytest.raises(UserError, match="NNODES: 'many' is not a number"):
        launch.multi_node()


def failure(exitcode: int, folder: Path, name: str, content: str | None = None) -> ProcessFailure:
    path = folder / name
    if content:
        path.write_text(content)
    return ProcessFailure(0, 1, exitcode, str(path))


def test_the_first_failure_speaks(tmp_path, capsys):
    report = f'{{"message": "%s", "timestamp": {int(time.time())}, "time_ns": %d, "step": 7}}'
    later = failure(2, tmp_path, "later", report % ("the second", 20))
    first = failure(2, tmp_path, "first", report % ("the first", 10))
    ended = failure(-signal.SIGTERM, tmp_path, "ended")
    killed = failure(-signal.SIGKILL, tmp_path, "killed")
    assert launch.report(ChildFailedError("x", {0: later, 1: first, 2: ended})) == 2
    assert capsys.readouterr().err == "selfe: error: the first\n"
    assert launch.report(ChildFailedError("x", {0: later, 1: ended, 2: killed})) == 137
    assert "process 2 was killed by SIGKILL (often: out of memory) in step 7;" in capsys.readouterr().err
    told_early = '{"message": "%s", "timestamp": 1, "time_ns": %d}'
    # one that hangs is killed half a minute after another has said so
    early = failure(1, tmp_path, "early", told_early % ("process 1 hangs", 10))
    assert launch.report(ChildFailedError("x", {0: early, 1: killed})) == 1
    assert capsys.readouterr().err == "selfe: error: process 1 hangs\n"


def children(parent: int) -> list[int]:
    """All processes below one."""
    found = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in found.splitlines()]
    below = [pid for pid, ppid in pairs if ppid == parent]
    return below + [pid for child in below for pid in children(child)]


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def begun(run: subprocess.Popen) -> None:
    """Wait for the end of the first step."""
    while "training 1/" not in (line := run.stdout.readline()):
        assert line


def started(folder: Path, **env: str) -> tuple[subprocess.Popen, list[int]]:
    """A run of two processes that has come to its first step, and everything below its shell."""
    run = subprocess.Popen(
        [ROOT / "run.sh", QUICK, "2", f"trainer.output_dir={folder}", LONG],
        env=ENV | env,
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    begun(run)
    below = children(run.pid)
    assert len(below) >= 2
    return run, below


def test_a_scheduler_stops_a_run_that_loads_ahead(tmp_path):
    """SIGTERM reaches the loader's processes too, and they must not die of it before the step is done."""
    command = [sys.executable, "-m", "selfe", "train", QUICK, "1", f"trainer.output_dir={tmp_path}"]
    long = [LONG, "trainer.checkpoint_every=100000", "trainer.num_workers=2"]
    run = subprocess.Popen(
        [*command, *long], env=ENV, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    begun(run)
    below = children(run.pid)
    assert len(below) >= 3
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 143, err
    assert "stopped by SIGTERM: " in out
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert verify.is_complete(saved)
    assert gone(below)


def gone(pids: list[int]) -> bool:
    for _ in range(300):
        if not any(map(alive, pids)):
            return True
        time.sleep(0.1)
    return False


def test_ctrl_c_leaves_no_process_behind(tmp_path):
    run, below = started(tmp_path)
    os.killpg(run.pid, signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "Traceback" not in err
    assert gone(below)


def test_a_killed_process_is_started_again_as_often_as_asked_then_ends_the_others_with_one_line(tmp_path):
    run, below = started(tmp_path, MAX_RESTARTS="1")
    for _ in range(600):
        if (tmp_path / "checkpoints/step_00000002").is_dir():
            break
        time.sleep(0.1)
    os.kill(below[-1], signal.SIGKILL)
    while "resuming from" not in (line := run.stdout.readline()):
        assert line
    again = children(run.pid)
    assert not set(again) & set(below[-2:])
    while "training" not in (line := run.stdout.readline()):
        assert line
    again = children(run.pid)  # at the start, a process may have called git
    os.kill(again[-1], signal.SIGKILL)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 137
    (line,) = err.splitlines()
    assert re.search(r"process \d was killed by SIGKILL .* in step \d+; run the same command again to resume", line)
    assert gone(below + again)


def test_a_killed_launcher_ends_its_processes_which_save(tmp_path):
    """Nothing is left that would write into the folder from which the next start resumes."""
    command = [sys.executable, "-m", "selfe", "train", QUICK, "2", f"trainer.output_dir={tmp_path}"]
    more = [LONG, "trainer.num_workers=1", "trainer.checkpoint_every=100000"]
    run = subprocess.Popen([*command, *more], env=ENV, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    begun(run)
    below = children(run.pid)
    run.kill()
    out, _ = run.communicate(timeout=60)  # of the processes, which have the same stdout
    assert "stopped by SIGTERM: " in out
    assert gone(below)
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert verify.is_complete(saved)
    with FolderLock(tmp_path, "trainer.output_dir", lost=pytest.fail):
        pass  # free, or left by a process that has ended


def test_a_process_that_is_killed_ends_the_other_node_with_one_line(tmp_path):
    """Two launchers on this machine, a process each, which meet by torchrun's variables and train as one run does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "selfe", "train", QUICK, "1", f"trainer.output_dir={tmp_path}"]
    runs = [
        subprocess.Popen(
            [*command, LONG, "trainer.num_workers=0", "trainer.log_every=1"],
            env=ENV | nodes | {"NODE_RANK": str(node)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    begun(runs[0])
    below = [children(run.pid) for run in runs]
    os.kill(below[0][0], signal.SIGKILL)
    messages = [run.communicate(timeout=60)[1] for run in runs]
    assert [run.returncode for run in runs] == [137, 1]
    assert re.fullmatch(r"selfe: error: process 0 was killed by SIGKILL .*\n", messages[0])
    assert re.fullmatch(r"selfe: error: a process of node 0 was ended \(process 0\); .*\n", messages[1])
    assert gone([*below[0], *below[1]])

    train_processes.finish(tmp_path / "one", 2, LONG, "trainer.stop_step=1", "trainer.log_every=1")
    several, one = (train_processes.lines(folder)[0]["train/loss"] for folder in (tmp_path, tmp_path / "one"))
    assert several == one


def test_the_environment_of_the_processes(monkeypatch):
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    names += ("ONEDNN_PRIMITIVE_CACHE_CAPACITY",)
    for name in (*names, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "SELFE_LAUNCHER"):
        monkeypatch.setenv(name, "")  # restored after the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("GRACE_SECONDS", "40")
    monkeypatch.setattr(device, "usable_cores", lambda: 8)
    launch.set_environment(4)
    assert (os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"]) == ("2", "PASSIVE")
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "64"
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "40"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    launch.set_environment(4)
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_a_mac_has_another_loopback_device_and_no_proc(monkeypatch, tmp_path):
    for name in ("SELFE_STORE", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
    started = signals.process_start(os.getpid())
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(os, "sched_getaffinity")
    assert launch.single_node(tmp_path)["local_addr"] == "127.0.0.1"
    assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == "lo0"
    assert device.usable_cores() == os.cpu_count()
    assert signals.process_start(os.getpid()) not in (None, started)  # by `ps`
    assert signals.process_start(2**22 + 1) is None
    monkeypatch.setattr(signals.ctypes, "CDLL", None)
    signals.signal_with_parent(signal.SIGTERM)  # prctl is not called
