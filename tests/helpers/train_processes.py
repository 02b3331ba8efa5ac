"""Training runs in processes that start quickly: forks of a process that has imported everything."""

import json
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from selfe import cli, launch, train

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests/helpers/tiny.yaml"
QUICK = ROOT / "tests/helpers/quick.yaml"  # without encoder networks
CONTEXT = multiprocessing.get_context("forkserver")


class Run:
    """`size` processes of one run, without a launcher: `out` is what they print, `failures` why they failed."""

    def __init__(
        self, folder: Path, size: int, *overrides: str, env: dict[str, str] | None = None, config: Path = QUICK
    ):
        self.work = Path(tempfile.mkdtemp())
        arguments = [str(config), f"trainer.output_dir={folder}", *overrides]
        self.processes = [
            CONTEXT.Process(target=_child, args=(rank, size, self.work, arguments, env or {}), daemon=True)
            for rank in range(size)
        ]
        for rank, process in enumerate(self.processes):
            (self.work / f"out_{rank}").touch()
            process.start()

    def wait(self, seconds: float = 120) -> list[int | None]:
        """Exit codes; None of a process that does not end."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def send(self, number: signal.Signals, *ranks: int) -> None:
        """Send a signal to these processes, by default all; those that have ended are left out."""
        for rank in ranks or range(len(self.processes)):
            with suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid, number)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
        self.wait()

    @property
    def out(self) -> str:
        return "".join((self.work / f"out_{rank}").read_text() for rank in range(len(self.processes)))

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Wait until the run has printed a text."""
        for _ in range(int(seconds * 50)):
            if text in self.out:
                return
            assert any(process.is_alive() for process in self.processes), self.out
            time.sleep(0.02)
        raise AssertionError(f"{text!r} did not appear in {self.out!r}")

    @property
    def failures(self) -> dict[int, dict]:
        return {
            rank: json.loads(path.read_text())
            for rank in range(len(self.processes))
            if (path := self.work / f"failure_{rank}").exists()
        }

    def report(self) -> int:
        """Print the error line that the launcher would print of these failures; returns its exit code."""
        failures = {
            rank: ProcessFailure(rank, process.pid, process.exitcode, str(self.work / f"failure_{rank}"))
            for rank, process in enumerate(self.processes)
        }
        return launch.report(ChildFailedError("train", failures))


def _child(rank: int, size: int, work: Path, arguments: list[str], env: dict[str, str]) -> None:
    _redirect_output(work / f"out_{rank}")
    os.environ |= env
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"SELFE_STORE": str(work / "store"), "TORCHELASTIC_RESTART_COUNT": "0", "GLOO_SOCKET_IFNAME": "lo"}
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(work / f"failure_{rank}")
    sys.argv = ["train", *arguments]
    launch.worker(lambda: train.main(arguments))


def _redirect_output(out: Path) -> None:
    """Output, working directory and threads of a process that a shell has started."""
    number = os.open(out, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(number, 1), os.dup2(number, 2)
    os.chdir(ROOT)
    os.environ["SELFE_SKIP_PRETRAINED"] = "1"
    torch.set_num_threads(1)


def _command(arguments: tuple[str, ...], out: Path) -> None:
    _redirect_output(out)
    sys.argv = ["selfe", *arguments]
    cli.main()


def _script(arguments: tuple[str, ...], out: Path) -> None:
    _redirect_output(out)
    sys.argv = [*arguments]
    runpy.run_path(arguments[0], run_name="__main__")


def _printed(target: Callable[..., None], arguments: tuple[str, ...], code: int) -> str:
    out = Path(tempfile.mkdtemp()) / "out"
    process = CONTEXT.Process(target=target, args=(arguments, out), daemon=True)
    process.start()
    process.join(120)
    assert process.exitcode == code, out.read_text()
    return out.read_text()


def command(*arguments: str, code: int = 0) -> str:
    """Run `selfe ARGUMENTS`; returns what it printed."""
    return _printed(_command, arguments, code)


def script(path: str, *arguments: str, code: int = 0) -> str:
    """Run `python PATH ARGUMENTS`, the path from the root of the repository; returns what it printed."""
    return _printed(_script, (path, *arguments), code)


def finish(folder: Path, size: int, *overrides: str, config: Path = QUICK, env: dict[str, str] | None = None) -> str:
    """Train to the end; returns what was printed."""
    run = Run(folder, size, *overrides, config=config, env=env)
    codes = run.wait()
    assert codes == [0] * size, (run.out, run.failures)
    return run.out


def copy_until(checkpoint: Path, source: Path, folder: Path) -> None:
    """The folder of a run as if it had been interrupted after a checkpoint, which is given relative to the folder.

    Its metrics go on to the end: a resumed run drops those of the steps that it repeats.
    """
    shutil.copytree(source / checkpoint, folder / checkpoint)
    shutil.copy(source / "metrics.jsonl", folder)
    settings = (source / "config.yaml").read_text()
    (folder / "config.yaml").write_text(settings.replace(str(source), str(folder)))


def lines(folder: Path) -> list[dict]:
    """A run's metrics, without those that a clock measured."""
    measured = ("time", "elapsed", "speed/", "memory/")
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(measured)} for line in logged]


def files(checkpoint: Path) -> dict[str, list[int]]:
    """Size and checksum of what every rank wrote of a checkpoint: its weights, EMA and optimizer."""
    files = json.loads((checkpoint / "progress.json").read_text())["files"]
    return {name: entry for name, entry in files.items() if name != ".metadata"}  # torch's index of them
