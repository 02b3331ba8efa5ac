"""The verb `selfe verify-resume`: check that a killed and resumed run equals an uninterrupted one bitwise.

Trains a few steps twice from the same initial state, with a checkpoint every second step: once uninterrupted, once with
all processes killed by SIGKILL at a random moment after the first checkpoint and then resumed. The files of the two
last checkpoints and all logged metrics except timings must be identical; trainer.deterministic is set for that.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from selfe import config, launch, log
from selfe.checkpoint import verify
from selfe.errors import UserError

MEASURED = ("time", "elapsed", "speed/", "memory/")  # by clocks, not reproducible


def main(options: argparse.Namespace) -> None:
    """Entry point of `selfe verify-resume`."""
    path, processes, overrides = launch.parse(options.config, options.rest)
    steps = launch.environment_number("VERIFY_STEPS", 8)
    seed = launch.environment_number("VERIFY_SEED", random.randrange(10**6))
    if steps < 4:
        raise UserError(f"VERIFY_STEPS: {steps} is too small to resume after the first checkpoint; use at least 4")

    folder = Path(config.load(path, overrides)["trainer"]["output_dir"])
    work = folder.with_name(folder.name + "_verify_resume")
    shutil.rmtree(work, ignore_errors=True)

    # a short, deterministic run that writes nothing but metrics and checkpoints
    short = [f"trainer.stop_step={steps}", "trainer.checkpoint_every=2", "trainer.log_every=1"]
    quiet = [
        "trainer.deterministic=true",
        "trainer.samples.prompts=[]",
        "trainer.wandb.mode=disabled",
        "trainer.checkpoints.keep_last=1",
    ]
    command = [sys.executable, "-m", "selfe", "train", path, str(processes), *overrides, *short, *quiet]

    log.print_line(f"{steps} steps on {log.count(processes, 'process', 'processes')}, uninterrupted")
    seconds = train(command, work / "uninterrupted")

    # the same run again, killed and resumed
    share = random.Random(seed).uniform(0, 0.8)
    moment = f"{share:.0%} of the way from the first checkpoint to the end"
    log.print_line(f"second run, killed {moment} (VERIFY_SEED={seed})")
    kill(command, work / "killed", share * seconds)
    done = resumes_from(work / "killed", steps)
    log.print_line(f"resuming from {done.name}")
    train(command, work / "killed")

    problems = compare(work / "uninterrupted", work / "killed", steps)
    if problems:
        raise UserError(f"the resumed run differs from the uninterrupted one: {problems[0]}; see {work}")
    shutil.rmtree(work)
    log.print_line("bitwise identical: weights, EMA, optimizer state and all logged metrics")


def resumes_from(folder: Path, steps: int) -> Path:
    """The checkpoint that a killed run resumes from. Raises UserError if it has none, or no step left to train."""
    done = verify.latest(folder / "checkpoints")
    if done is None or verify.read_step(done) >= steps:
        saved = "before its first checkpoint" if done is None else "after its last step"
        raise UserError(
            f"{folder}: the run was killed {saved}, so nothing was resumed; run this command again, or set "
            "VERIFY_STEPS to more steps"
        )
    return done


def train(command: list[str], folder: Path) -> float:
    """Train to the end; returns the seconds between the first checkpoint and the end."""
    run = subprocess.Popen([*command, f"trainer.output_dir={folder}"], stdout=subprocess.DEVNULL)
    wait_for_checkpoint(run, folder)
    start = time.monotonic()
    if run.wait():
        raise UserError(f"the training run failed with exit code {run.returncode}; see above")
    return time.monotonic() - start


def wait_for_checkpoint(run: subprocess.Popen, folder: Path) -> None:
    """Wait until a run has a checkpoint or has ended."""
    while verify.latest(folder / "checkpoints") is None and run.poll() is None:
        time.sleep(0.02)


def kill(command: list[str], folder: Path, seconds: float) -> None:
    """Start a run, and kill its launcher and all of its processes some seconds after its first checkpoint.

    Raises:
        UserError: the run ended before it was killed.
    """
    run = subprocess.Popen(
        [*command, f"trainer.output_dir={folder}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for_checkpoint(run, folder)
    with suppress(subprocess.TimeoutExpired):
        run.wait(seconds)
    if run.poll() is not None:
        raise UserError(
            f"the second run ended with exit code {run.returncode} before it could be killed; "
            "set VERIFY_STEPS to more steps, or run this command again"
        )

    for pid in [run.pid, *descendants(run.pid)]:
        with suppress(ProcessLookupError):  # has just exited
            os.kill(pid, signal.SIGKILL)
    run.wait()


def descendants(parent: int) -> list[int]:
    """Ids of the processes that a process has started, directly or not."""
    table = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in table.splitlines()]
    children = [pid for pid, ppid in pairs if ppid == parent]
    return children + [pid for child in children for pid in descendants(child)]


def compare(uninterrupted: Path, killed: Path, steps: int) -> list[str]:
    """Differences between two finished runs: files of the last checkpoint, and logged metrics."""
    problems = []

    # sizes and checksums of the files
    first, second = checkpoint_files(uninterrupted, steps), checkpoint_files(killed, steps)
    for name in first | second:
        if first.get(name) != second.get(name):
            problems.append(f"{name} of the last checkpoint differs")

    for before, after in zip(logged_metrics(uninterrupted), logged_metrics(killed), strict=True):
        for name in before | after:
            if before.get(name) != after.get(name):
                problems.append(f"step {before['step']}: {name} {before.get(name)} and {after.get(name)}")
    return problems


def checkpoint_files(run: Path, step: int) -> dict[str, list[int]]:
    """Size and checksum of the files of a checkpoint, without torch's index of them."""
    files = verify.read_marker(run / "checkpoints" / f"step_{step:08d}")["files"]
    return {name: entry for name, entry in files.items() if name != ".metadata"}


def logged_metrics(run: Path) -> list[dict]:
    """Logged metrics of a run by line, without timings."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().split(b"\n") if line]
    return [{name: value for name, value in line.items() if not name.startswith(MEASURED)} for line in lines]
