"""Starts one process per device for run.sh and infer.sh, and reports a single error for the whole job."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from selfe import device
from selfe.signals import Stopped
from selfe.types import UserError

STATUS: dict[str, int] = {}  # included in the failure report of this process: the current step


def main(options: argparse.Namespace) -> None:
    """The verbs `train` and `infer`: start the processes, wait for them, exit with their exit code."""
    exit_code = start(options.verb, *parse(options.config, options.rest))
    if exit_code:
        sys.exit(exit_code)


def start(program: str, path: str, num_processes: int, overrides: Sequence[str]) -> int:
    """Run `python -m selfe.{program} PATH OVERRIDES` on `num_processes` processes; returns the exit code."""
    nodes, max_restarts, grace = multi_node(), number("MAX_RESTARTS", 0), number("GRACE_SECONDS", 600)
    if not device.accelerator_count():
        print("no GPU found: all processes run on the CPU", flush=True)

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_processes)))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # 32 MiB, for trainer.deterministic
    logging.disable()  # torchrun logs failures at length; `report` prints one line instead

    # single machine: the rendezvous files are in this temporary directory
    with tempfile.TemporaryDirectory() as folder:
        config = LaunchConfig(
            nproc_per_node=num_processes,
            max_restarts=max_restarts,
            signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
            shutdown_timeout=grace,
            run_id="selfe",
            **(nodes or single_node(Path(folder))),
        )
        try:
            elastic_launch(config, sys.executable)("-m", f"selfe.{program}", path, *overrides)
        except ChildFailedError as error:
            return report(error)
        except SignalException as error:
            return 128 + error.sigval
    return 0


def parse(path: str, rest: Sequence[str]) -> tuple[str, int, list[str]]:
    """CONFIG and [NGPUS] [key=value ...] -> path, number of processes, overrides. Raises UserError."""
    rest = list(rest)
    if not Path(path).is_file():
        raise UserError(f"{path}: no such config file; the first argument is a YAML file, see --help")

    # NGPUS is optional: the first argument without "="
    available = device.accelerator_count()
    num_processes = available or 1
    if rest and "=" not in rest[0]:
        if not rest[0].isdecimal() or int(rest[0]) < 1:
            raise UserError(f"NGPUS: {rest[0]!r} is not a number of at least 1; see --help")
        num_processes = int(rest.pop(0))
    if available and num_processes > available:
        raise UserError(f"NGPUS: {num_processes} requested, this machine has {available}; use at most {available}")

    if wrong := [argument for argument in rest if "=" not in argument]:
        raise UserError(f"{wrong[0]!r} is not key=value; see --help")
    return path, num_processes, rest


def single_node(folder: Path) -> dict:
    """Launch settings for one machine: rendezvous through a file, loopback only; no port is open to the network."""
    os.environ |= {"SELFE_STORE": str(folder / "store"), "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return {
        "min_nodes": 1,
        "max_nodes": 1,
        "rdzv_backend": "c10d",
        "rdzv_endpoint": str(folder / "rendezvous"),
        "rdzv_configs": {"store_type": "file"},
        "local_addr": "127.0.0.1",
    }


def multi_node() -> dict | None:
    """Launch settings from torchrun's environment variables, or None for a single machine."""
    nodes = number("NNODES", 1)
    if nodes == 1:
        return None
    for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(f"NNODES is {nodes}, but {name} is not set; see --help")

    rank, port = number("NODE_RANK"), number("MASTER_PORT")
    if rank >= nodes:
        raise UserError(f"NODE_RANK: {rank} is not less than NNODES = {nodes}; ranks start at 0")

    return {
        "min_nodes": nodes,
        "max_nodes": nodes,
        "rdzv_backend": "static",
        "rdzv_endpoint": f"{os.environ['MASTER_ADDR']}:{port}",
        "rdzv_configs": {"rank": rank},
    }


def number(name: str, default: int | None = None) -> int:
    """A non-negative integer from an environment variable. Raises UserError."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise UserError(f"{name}: {value!r} is not a number; see --help")
    return int(value)


def report(error: ChildFailedError) -> int:
    """Print the failure that caused the others; returns its exit code by shell convention (128 + signal)."""
    others = [failure.timestamp for failure in error.failures.values() if failure.error_file_data.get("time_ns")]

    def order(item: tuple[int, ProcessFailure]) -> tuple[bool, int]:
        # After a failure torchrun sends SIGTERM to the other processes, and SIGKILL half a minute later to those that
        # hang. Any other kill left no error file and is the cause, so it sorts first (time_ns 0).
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
    try:
        program()
    except UserError as error:
        end(2, str(error))
    except Stopped as stopped:
        end(stopped.exit_code, str(stopped))
    except SystemExit as exit:
        end(exit.code or 0)
    except Exception:
        end(1, f"process {os.environ.get('RANK', 0)} failed{where()}\n{traceback.format_exc()}")
    end(0)


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
        told = {"message": message, "timestamp": now // 10**9, "time_ns": now} | STATUS
        Path(path).write_text(json.dumps(told))
    elif message:
        fail(message)

    # not sys.exit: a gloo thread that frees a tensor during interpreter shutdown aborts the process
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
