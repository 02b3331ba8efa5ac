"""Whether a run survives a power cut: `.venv/bin/python scripts/verify_resume.py CONFIG [NGPUS] [key=value ...]`

Trains a few steps twice from the same start, saving every second step: once left alone; once with all of its processes
killed by SIGKILL at a random moment and started again. Then every byte of the two last checkpoints and every logged
number must be the same, for which trainer.deterministic is set. Exit code 0: they are. Needs room for four checkpoints
beside the config's output_dir.

  VERIFY_STEPS   how many steps (default 8)
  VERIFY_SEED    of the random moment (default: another one each time; it is printed)
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from selfe import checkpoint, config, launch
from selfe.types import UserError

CLOCKS = ("time_", "samples_per_", "tokens_per_", "tflops", "mfu", "peak_memory")  # differ from run to run


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    path, processes, overrides = launch.parse(arguments)
    steps, seed = launch.number("VERIFY_STEPS", 8), launch.number("VERIFY_SEED", random.randrange(10**6))
    if steps < 2:
        raise UserError(f"VERIFY_STEPS: {steps} is too few; give at least 2")
    folder = Path(config.load(path, overrides)["trainer"]["output_dir"])
    work = folder.with_name(folder.name + "_verify_resume")
    shutil.rmtree(work, ignore_errors=True)
    short = [f"trainer.stop_step={steps}", "trainer.checkpoint_every=2", "trainer.log_every=1"]
    quiet = [
        "trainer.deterministic=true",
        "trainer.samples.prompts=[]",
        "trainer.wandb.mode=disabled",
        "trainer.checkpoints.keep_last=1",
    ]
    command = [sys.executable, "-m", "selfe.launch", "train", path, str(processes), *overrides, *short, *quiet]
    say(f"{steps} steps on {processes} processes, left alone")
    seconds = train(command, work / "whole")
    moment = random.Random(seed).uniform(0.4, 1) * seconds  # the first part is imports
    say(f"again, killed after {moment:.1f} of {seconds:.1f} s (VERIFY_SEED={seed})")
    kill(command, work / "cut", moment)
    done = checkpoint.latest(work / "cut" / "checkpoints")
    say(f"started again, from {done.name if done else 'the first step: nothing was saved before'}")
    train(command, work / "cut")
    problems = compare(work / "whole", work / "cut", steps)
    if problems:
        raise UserError(f"the resumed run is another run: {problems[0]}; look into {work}")
    shutil.rmtree(work)
    say("the same to the last bit: weights, EMA, optimizer and every logged number")


def say(message: str) -> None:
    print(message, flush=True)


def train(command: list[str], folder: Path) -> float:
    """A run to its end; seconds."""
    start = time.monotonic()
    done = subprocess.run([*command, f"trainer.output_dir={folder}"], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise UserError(f"the run itself ended with exit code {done.returncode}; see above")
    return time.monotonic() - start


def kill(command: list[str], folder: Path, moment: float) -> None:
    """A run whose launcher and processes are all killed after so many seconds."""
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
                continue  # ended by itself just now
        run.wait()


def below(parent: int) -> list[int]:
    """All processes that a process has started, and theirs."""
    found = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in found.splitlines()]
    children = [pid for pid, ppid in pairs if ppid == parent]
    return children + [pid for child in children for pid in below(child)]


def compare(whole: Path, cut: Path, steps: int) -> list[str]:
    """What differs between two finished runs."""
    markers = [checkpoint.read_marker(run / "checkpoints" / f"step_{steps:08d}") for run in (whole, cut)]
    first, second = ({k: v for k, v in marker["files"].items() if k != ".metadata"} for marker in markers)
    problems = [
        f"{name} of the last checkpoint differs" for name in first | second if first.get(name) != second.get(name)
    ]
    for before, after in zip(numbers(whole), numbers(cut), strict=True):
        wrong = [name for name in before | after if before.get(name) != after.get(name)]
        problems += [f"step {before['step']}: {name} {before.get(name)} and {after.get(name)}" for name in wrong]
    return problems


def numbers(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(CLOCKS)} for line in lines]


if __name__ == "__main__":
    sys.argv[0] = "verify_resume.py"
    launch.worker(main)
