"""Starts one process per device for run.sh and infer.sh, and reports a single error for the whole job."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from selfe import config, device, errors, signals
from selfe.distributed import collectives
from selfe.errors import PeerFailure, UserError
from selfe.signals import Stopped

STATUS: dict[str, int] = {}  # included in the failure report of this process: the current step


def main(options: argparse.Namespace) -> None:
    """The verbs `train` and `infer`: start the processes, wait for them, exit with their exit code."""
    exit_code = start(options.verb, *parse(options.config, options.rest))
    if exit_code:
        sys.exit(exit_code)


def start(program: str, path: str, num_processes: int, overrides: Sequence[str]) -> int:
    """Run `python -m selfe.{program} PATH OVERRIDES` on `num_processes` processes; returns the exit code."""
    nodes = multi_node()
    max_restarts = environment_number("MAX_RESTARTS", 0)
    if not device.accelerator_count():
        print("no GPU found: all processes run on the CPU", flush=True)
    set_environment(num_processes)
    logging.disable()  # torchrun logs failures at length; `report` prints one line instead

    # ids of the processes; on a single machine, also the rendezvous files
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SELFE_PROCESSES"] = folder
        launch_config = LaunchConfig(
            nproc_per_node=num_processes,
            max_restarts=max_restarts,
            signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
            run_id="selfe",
            **(nodes or single_node(Path(folder))),
        )
        watch = ProcessWatch(Path(folder), num_processes, nodes)
        try:
            elastic_launch(launch_config, sys.executable)("-m", f"selfe.{program}", path, *overrides)
        except ChildFailedError as error:
            watch.close()
            return report(error)
        except SignalException as error:
            return 128 + error.sigval
    return 0


def set_environment(num_processes: int) -> None:
    """Environment variables of the processes, except those that the user has set."""
    defaults = {
        "OMP_NUM_THREADS": str(max(1, device.usable_cores() // num_processes)),
        # Threads that spin while they wait make a step tens of times slower as soon as another program needs a core.
        "OMP_WAIT_POLICY": "PASSIVE",
        # On a CPU, every number of tokens has kernels of its own, and steps rarely have the same: keep those of a few.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # 32 MiB, for trainer.deterministic
    }
    # The number of tokens differs between micro-batches, which fragments memory.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        defaults["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)

    os.environ["SELFE_LAUNCHER"] = str(os.getpid())
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(grace_seconds())


def grace_seconds() -> int:
    """Seconds between a stop signal and the end of all processes."""
    return environment_number("GRACE_SECONDS", 600)


class ProcessWatch:
    """A thread of the launcher that detects when a process of this machine was killed, and publishes it.

    Every process keeps a file with its id until it reports how it ended (`end`). The other processes, which may be on
    other machines, read the failure from the store; they may hang in a collective otherwise.
    """

    def __init__(self, folder: Path, num_processes: int, nodes: dict | None):
        self.folder, self.num_processes = folder, num_processes
        self.node = os.environ.get("NODE_RANK", "0") if nodes else "0"
        self.address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])) if nodes else None
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self.run, name="processes", daemon=True)
        self.thread.start()

    def run(self) -> None:
        """The thread: checks the processes twice a second."""
        while not self.closed.wait(0.5):
            self.check()

    def check(self) -> bool:
        """Publish the failure of a process that was killed; whether there was one."""
        for path in sorted(self.folder.glob("process_*")):
            with suppress(FileNotFoundError):  # it has just reported how it ended
                pid = path.read_text()  # empty while it is written
                if pid and signals.process_start(int(pid)) is None:
                    _, restart, rank = path.name.split("_")
                    path.unlink()
                    self.publish(restart, rank)
                    return True
        return False

    def publish(self, restart: str, rank: str) -> None:
        message = f"a process of node {self.node} was ended (process {rank}); the output of that node names the reason"
        with suppress(DistError):  # the node that holds the store may have ended first
            notes = collectives.launcher_notes(restart, self.num_processes, self.address)
            collectives.publish_failure(notes, message)

    def close(self) -> None:
        """Check a last time. The launcher of node 0 holds the store, so it waits until the others have read it."""
        self.closed.set()
        self.thread.join()
        self.check()
        if self.address and self.node == "0":
            time.sleep(3)


def parse(path: str, rest: Sequence[str]) -> tuple[str, int, list[str]]:
    """CONFIG and [NGPUS] [key=value ...] -> path, number of processes, overrides. Raises UserError."""
    requested, overrides = config.parse_command(path, rest)
    return path, choose_processes(requested), overrides


def choose_processes(requested: int | None) -> int:
    """The number of processes on this machine: as requested, or one per accelerator. Raises UserError."""
    available = device.accelerator_count()
    if available and (requested or 0) > available:
        raise UserError(f"NGPUS: {requested} requested, this machine has {available}; use at most {available}")
    return requested or available or 1


def single_node(folder: Path) -> dict:
    """Launch settings for one machine: rendezvous through a file, loopback only; no port is open to the network."""
    address, name = device.loopback()
    os.environ |= {"SELFE_STORE": str(folder / "store"), "GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    return {
        "min_nodes": 1,
        "max_nodes": 1,
        "rdzv_backend": "c10d",
        "rdzv_endpoint": str(folder / "rendezvous"),
        "rdzv_configs": {"store_type": "file"},
        "local_addr": address,
    }


def multi_node() -> dict | None:
    """Launch settings from torchrun's environment variables, or None for a single machine."""
    nodes = environment_number("NNODES", 1)
    if nodes == 1:
        return None
    for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(f"NNODES is {nodes}, but {name} is not set; see --help")

    rank, port = environment_number("NODE_RANK"), environment_number("MASTER_PORT")
    if rank >= nodes:
        raise UserError(f"NODE_RANK: {rank} is not less than NNODES = {nodes}; ranks start at 0")

    return {
        "min_nodes": nodes,
        "max_nodes": nodes,
        "rdzv_backend": "static",
        "rdzv_endpoint": f"{os.environ['MASTER_ADDR']}:{port}",
        "rdzv_configs": {"rank": rank},
    }


def environment_number(name: str, default: int | None = None) -> int:
    """A non-negative integer from an environment variable. Raises UserError."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise UserError(f"{name}: {value!r} is not a number; see --help")
    return int(value)


def report(error: ChildFailedError) -> int:
    """Print the failure that caused the others; returns its exit code by shell convention (128 + signal)."""
    others = [failure.timestamp for failure in error.failures.values() if failure.error_file_data.get("time_ns")]

    def order(item: tuple[int, ProcessFailure]) -> tuple[bool, int]:
        """Sorts consequences after causes, and causes by time.

        After a failure torchrun sends SIGTERM to the other processes, and SIGKILL half a minute later to those that
        hang. Any other kill left no error file and is the cause, so it sorts first (time_ns 0).
        """
        _, failure = item
        late = failure.exitcode == -signal.SIGKILL and others and failure.timestamp > min(others) + 15
        return failure.exitcode == -signal.SIGTERM or bool(late), failure.error_file_data.get("time_ns", 0)

    rank, failure = min(error.failures.items(), key=order)

    # killed by a signal: no message of its own, but other processes may have reported the step
    if failure.exitcode < 0:
        steps = [f.error_file_data["step"] for f in error.failures.values() if "step" in f.error_file_data]
        when = f" in step {max(steps)}" if steps else ""
        name = signal.Signals(-failure.exitcode).name
        why = " (often: out of memory)" if name == "SIGKILL" else ""
        return fail(
            f"process {rank} was killed by {name}{why}{when}; run the same command again to resume",
            128 - failure.exitcode,
        )

    return fail(failure.message or f"process {rank} exited with code {failure.exitcode}", failure.exitcode)


def fail(message: str, exit_code: int = 2) -> int:
    """Print an error line to stderr; returns the exit code."""
    print(f"selfe: error: {message}", file=sys.stderr, flush=True)
    return exit_code


def worker(program: Callable[[], None]) -> None:
    """Run a program and exit: a user error is one line, any other error a traceback. Never returns."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # exit immediately; only the launcher prints a message
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warn when loader workers are forked
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # By a launcher of this package or by torchrun, without which nothing would end this process.
        signals.stop_with_parent(int(os.environ.get("SELFE_LAUNCHER", os.getppid())))
        if path := process_file():
            path.write_text(str(os.getpid()))

    try:
        program()
    except UserError as error:
        end(2, str(error))
    except PeerFailure as failure:
        end(1, str(failure))
    except Stopped as stopped:
        end(stopped.exit_code, str(stopped))
    except SystemExit as exit:
        end(exit.code or 0)
    except Exception as error:
        if line := errors.one_line(error):
            end(2, line)
        end(1, f"process {os.environ.get('RANK', 0)} failed{where()}\n{traceback.format_exc()}")
    end(0)


def process_file() -> Path | None:
    """The file that holds this process's id until it reports how it ended; None without a launcher."""
    if "SELFE_PROCESSES" not in os.environ or "RANK" not in os.environ:
        return None
    name = f"process_{os.environ['TORCHELASTIC_RESTART_COUNT']}_{os.environ['RANK']}"
    return Path(os.environ["SELFE_PROCESSES"]) / name


def where() -> str:
    """The current step, for error messages; empty before the first."""
    return f" in step {STATUS['step']}" if "step" in STATUS else ""


def end(exit_code: int, message: str = "") -> NoReturn:
    """Exit this process.

    A failure is passed to the launcher through torchrun's error file, so that only one of all ranks' errors is printed;
    without a launcher it is printed here.
    """
    if exit_code and (path := os.environ.get("TORCHELASTIC_ERROR_FILE")):
        now = time.time_ns()
        failure = {"message": message, "timestamp": now // 10**9, "time_ns": now} | STATUS
        with suppress(FileNotFoundError):  # the launcher has been killed, and its folder removed
            Path(path).write_text(json.dumps(failure))
    elif message:
        fail(message)
    if path := process_file():
        path.unlink(missing_ok=True)

    # not sys.exit: a gloo thread that frees a tensor during interpreter shutdown aborts the process
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
