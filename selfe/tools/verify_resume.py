"""The verb `selfe verify-resume`: check that a killed and resumed run equals an uninterrupted one bitwise.

Trains a few steps twice from the same initial state, with a checkpoint every second step: once uninterrupted, once with
all processes killed by SIGKILL at a random moment and then resumed. The files of the two last checkpoints and all
logged metrics except timings must be identical; trainer.deterministic is set for that.
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
from pathlib import Path

from selfe import config, launch
from selfe.checkpoint import verify
from selfe.types import UserError

CLOCKS = (
    "time_",
    "samples_per_",
    "tokens_per_",
    "tflops",
    "mfu",
    "peak_memory",
)  # not reproducible


def main(options: argparse.Namespace) -> None:
    """Entry point of `selfe verify-resume`."""
    path, processes, overrides = launch.parse(options.config, options.rest)
    steps, seed = launch.number("VERIFY_STEPS", 8), launch.number("VERIFY_SEED", random.randrange(10**6))
    if steps < 2:
        raise UserError(f"VERIFY_STEPS: {steps} is too small; use at least 2")

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

    say(f"{steps} steps on {processes} processes, uninterrupted")
    seconds = train(command, work / "whole")

    # the same run again, killed and resumed
    moment = random.Random(seed).uniform(0.4, 1) * seconds  # the first part of a run is imports
    say(f"second run, killed after {moment:.1f} of {seconds:.1f} s (VERIFY_SEED={seed})")
    kill(command, work / "cut", moment)
    done = verify.latest(work / "cut" / "checkpoints")
    say(f"resuming from {done.name if done else 'step 0: no checkpoint was complete'}")
    train(command, work / "cut")

    problems = compare(work / "whole", work / "cut", steps)
    if problems:
        raise UserError(f"the resumed run differs from the uninterrupted one: {problems[0]}; see {work}")
    shutil.rmtree(work)
    say("bitwise identical: weights, EMA, optimizer state and all logged metrics")


def say(message: str) -> None:
    print(message, flush=True)


def train(command: list[str], folder: Path) -> float:
    """Train to the end; returns the wall-clock seconds."""
    start = time.monotonic()
    done = subprocess.run([*command, f"trainer.output_dir={folder}"], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise UserError(f"the training run failed with exit code {done.returncode}; see above")
    return time.monotonic() - start


def kill(command: list[str], folder: Path, moment: float) -> None:
    """Start a run, and kill its launcher and all of its processes after `moment` seconds."""
    run = subprocess.Popen(
        [*command, f"trainer.output_dir={folder}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        run.wait(moment)
    except subprocess.TimeoutExpired:
        for pid in [run.pid, *below(run.pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # has just exited
        run.wait()


def below(parent: int) -> list[int]:
    """Ids of all descendants of a process."""
    found = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in found.splitlines()]
    children = [pid for pid, ppid in pairs if ppid == parent]
    return children + [pid for child in children for pid in below(child)]


def compare(whole: Path, cut: Path, steps: int) -> list[str]:
    """Differences between two finished runs: files of the last checkpoint, and logged metrics."""
    markers = [verify.read_marker(run / "checkpoints" / f"step_{steps:08d}") for run in (whole, cut)]
    first, second = ({k: v for k, v in marker["files"].items() if k != ".metadata"} for marker in markers)
    # checkpoint files by checksum; .metadata is not compared
    problems = [
        f"{name} of the last checkpoint differs" for name in first | second if first.get(name) != second.get(name)
    ]

    for before, after in zip(numbers(whole), numbers(cut), strict=True):
        wrong = [name for name in before | after if before.get(name) != after.get(name)]
        problems += [f"step {before['step']}: {name} {before.get(name)} and {after.get(name)}" for name in wrong]
    return problems


def numbers(run: Path) -> list[dict]:
    """Logged metrics of a run by line, without timings."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().split(b"\n") if line]
    return [{name: value for name, value in line.items() if not name.startswith(CLOCKS)} for line in lines]
