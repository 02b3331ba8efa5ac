"""Starts one process per device, behind run.sh and infer.sh, and lets all of them speak with one voice."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from selfe import device
from selfe.signals import Stopped
from selfe.types import UserError

STATUS: dict[str, int] = {}  # what this process adds to the report of its failure: the step it is in

HELP = """\
{script} CONFIG [NGPUS] [key=value ...]

{purpose}

  CONFIG      a YAML file, for instance {example}
  NGPUS       processes on this machine: one per GPU, by default all. On a machine without GPUs they run on the CPU,
              by default one.
  key=value   sets a key of the configuration, for instance {override}; a list is [a,b]

Environment
  SELFE_CACHE_DIR           the folder of the frozen encoders' weights
  SELFE_SKIP_PRETRAINED=1   gives the frozen encoders random weights: nothing is downloaded, the pictures are noise
  NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT
                            several machines: the same command on each, with its own NODE_RANK (0 to NNODES - 1) and
                            with an address and a free port of the machine of rank 0. Without NNODES nothing listens
                            on the network.
  MAX_RESTARTS              how often failed processes are started again before giving up (default 0)
  GRACE_SECONDS             how long a training run that was asked to stop may take to finish its step and save
                            (default 600)
  OMP_NUM_THREADS           CPU threads per process (default: the CPU cores, shared out)

Ctrl-C, SIGTERM and SIGUSR1 let a training run finish its step and save; the same command continues. Ctrl-C twice
ends it at once.

Exit code: the program's own. 0 done; 1 a fault, with its traceback; 2 a mistake in what was asked, told in one line;
128 + n ended by signal n (Ctrl-C: 130, SIGTERM: 143, SIGUSR1: 138). All processes end together.
"""
PROGRAMS = {
    "train": {
        "script": "./run.sh",
        "purpose": "Trains. The same command continues an interrupted run from its newest checkpoint.",
        "example": "configs/train/selfe.yaml",
        "override": "trainer.lr=2e-4",
    },
    "infer": {
        "script": "./infer.sh",
        "purpose": "Draws pictures from a checkpoint. The same command finishes an interrupted job.",
        "example": "configs/infer/selfe.yaml",
        "override": """'inferencer.prompts=["a red bird on a branch"]'""",
    },
}


def main(arguments: list[str]) -> int:
    """Start the processes of `{train,infer} CONFIG [NGPUS] [key=value ...]`, wait for them, return the exit code."""
    program, *arguments = arguments
    if not arguments or {"-h", "--help"} & set(arguments):
        print(HELP.format(**PROGRAMS[program]))
        return 0 if arguments else 2
    try:
        path, num_processes, overrides = parse(arguments)
        nodes, max_restarts, grace = multi_node(), number("MAX_RESTARTS", 0), number("GRACE_SECONDS", 600)
    except UserError as error:
        return fail(str(error))
    if not device.accelerator_count():
        print("no GPU found: all processes run on the CPU", flush=True)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_processes)))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # 32 MiB, for trainer.deterministic
    logging.disable()  # torchrun reports failures at length; what matters is said below
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


def parse(arguments: list[str]) -> tuple[str, int, list[str]]:
    """CONFIG [NGPUS] [key=value ...] -> path, number of processes, overrides."""
    path, *rest = arguments
    if not Path(path).is_file():
        raise UserError(f"{path}: no such config file; the first argument is a YAML file, see --help")
    available = device.accelerator_count()
    num_processes = available or 1
    if rest and "=" not in rest[0]:
        if not rest[0].isdecimal() or int(rest[0]) < 1:
            raise UserError(f"NGPUS: {rest[0]!r} is not a number of at least 1; see --help")
        num_processes = int(rest.pop(0))
    if available and num_processes > available:
        raise UserError(f"NGPUS: {num_processes} asked for, this machine has {available}; ask for at most {available}")
    if wrong := [argument for argument in rest if "=" not in argument]:
        raise UserError(f"{wrong[0]!r} is not key=value; see --help")
    return path, num_processes, rest


def single_node(folder: Path) -> dict:
    """One machine: the processes meet in a file and talk over the loopback device; nothing listens to the network."""
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
    """torchrun's usual variables, or None for a single machine."""
    nodes = number("NNODES", 1)
    if nodes == 1:
        return None
    for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(f"NNODES is {nodes}, but {name} is not set; see --help")
    rank, port = number("NODE_RANK"), number("MASTER_PORT")
    if rank >= nodes:
        raise UserError(f"NODE_RANK: {rank} is not below NNODES = {nodes}; ranks count from 0")
    return {
        "min_nodes": nodes,
        "max_nodes": nodes,
        "rdzv_backend": "static",
        "rdzv_endpoint": f"{os.environ['MASTER_ADDR']}:{port}",
        "rdzv_configs": {"rank": rank},
    }


def number(name: str, default: int | None = None) -> int:
    """An environment variable that holds a number."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise UserError(f"{name}: {value!r} is not a number; see --help")
    return int(value)


def report(error: ChildFailedError) -> int:
    """Tell the first of all failures once; returns its exit code as a shell would."""
    others = [failure.timestamp for failure in error.failures.values() if failure.error_file_data.get("time_ns")]

    def order(item: tuple[int, ProcessFailure]) -> tuple[bool, int]:
        # torchrun ends the rest, by SIGTERM and those that hang by SIGKILL half a minute later; a process killed
        # otherwise left no word and is what made others fail
        _, failure = item
        late = failure.exitcode == -signal.SIGKILL and others and failure.timestamp > min(others) + 15
        return failure.exitcode == -signal.SIGTERM or bool(late), failure.error_file_data.get("time_ns", 0)

    rank, failure = min(error.failures.items(), key=order)
    if failure.exitcode < 0:
        steps = [f.error_file_data["step"] for f in error.failures.values() if "step" in f.error_file_data]
        when = f" in step {max(steps)}" if steps else ""
        name = signal.Signals(-failure.exitcode).name
        why = " (often: out of memory)" if name == "SIGKILL" else ""
        return fail(
            f"process {rank} was ended by {name}{why}{when}; the same command continues", 128 - failure.exitcode
        )
    return fail(failure.message or f"process {rank} ended with exit code {failure.exitcode}", failure.exitcode)


def fail(message: str, exit_code: int = 2) -> int:
    print(f"selfe: error: {message}", file=sys.stderr, flush=True)
    return exit_code


def worker(program: Callable[[list[str]], None]) -> None:
    """Run a program's main in one of the processes, and end the process; never returns."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends at once: the launcher speaks for all
    try:
        program(sys.argv[1:])
    except UserError as error:
        end(2, str(error))
    except Stopped as stopped:
        end(stopped.exit_code, str(stopped))
    except Exception:
        end(1, f"process {os.environ.get('RANK', 0)} failed{where()}\n{traceback.format_exc()}")
    end(0)


def where() -> str:
    return f" in step {STATUS['step']}" if "step" in STATUS else ""


def end(exit_code: int, message: str = "") -> NoReturn:
    """End this process.

    A failure is handed to the launcher by torchrun's error file, so that of 64 ranks one speaks; without a launcher it
    is printed.
    """
    if exit_code and (path := os.environ.get("TORCHELASTIC_ERROR_FILE")):
        now = time.time_ns()
        told = {"message": message, "timestamp": now // 10**9, "time_ns": now} | STATUS
        Path(path).write_text(json.dumps(told))
    elif exit_code:
        fail(message)
    sys.stdout.flush()
    sys.stderr.flush()
    # not sys.exit: gloo's threads may still let go of tensors, and an interpreter that shuts down answers with an abort
    os._exit(exit_code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
