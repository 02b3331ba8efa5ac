"""Benchmark of asynchronous checkpointing: what a save costs the training loop.

Runs real steps and real saves of the smoke system from a cache, in one process with one compute thread, to a temporary
folder. A save costs the call that starts it (with its copy to host memory), and the slowdown of steps that overlap with
the writing. The time of the loop's thread is split into

    cpu     computing
    queue   runnable, but preempted by another thread or process (Linux only)
    lock    blocked, mostly on Python's GIL

Bounds are on cpu and lock, which other load on the machine changes little; wall-clock time is reported only. The bound
on cpu includes the writer thread: even on a single core, a save must cost less than a step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from data import SMOKE
from measure import at_most

from selfe import config
from selfe.data import loader
from selfe.distributed import collectives
from selfe.tools import precompute
from selfe.train import Trainer

STEPS = 6  # from one save to the next
SELF_EVALUATING = ["system.objective.params.start_step=0", "system.objective.params.aux_start_step=1000000"]


@dataclass(frozen=True)
class Spent:
    """Seconds of the loop's thread, and CPU seconds of the process's other threads."""

    wall: float
    cpu: float
    queue: float  # runnable, but preempted
    others: float

    @property
    def lock(self) -> float:
        """Seconds blocked."""
        return self.wall - self.cpu - self.queue


def now() -> tuple[float, float, float, float]:
    """Current values of the clocks of `Spent`."""
    stat = Path("/proc/thread-self/schedstat")
    queue = int(stat.read_text().split()[1]) / 1e9 if stat.exists() else 0.0
    cpu = time.thread_time()
    return time.perf_counter(), cpu, queue, time.process_time() - cpu


def spent(work: Callable[[], object]) -> Spent:
    """Run `work` and measure it."""
    before = now()
    work()
    return Spent(*(b - a for a, b in zip(before, now(), strict=True)))


def measure(fit: Trainer, rounds: int) -> tuple[list[Spent], list[Spent], list[list[Spent]]]:
    """Measure save calls, steps without a save, and per save the overlapping steps; the first round is a warm-up."""
    steps = range((rounds + 1) * STEPS)
    order = ((step, place) for step in steps for place in range(fit.num_micro(step)))
    micro_batches = loader.make_loader(fit.part("train"), order, num_workers=0)

    calls, alone, overlapping = [], [], []
    for step in steps:
        writing = fit.saver.pending is not None and not fit.saver.pending.done()
        seconds = spent(lambda step=step: fit.step(step, micro_batches, lambda: 0))
        if step >= STEPS:
            (overlapping[-1] if writing else alone).append(seconds)
        if (step + 1) % STEPS == 0 and step + 1 < len(steps):
            calls.append(spent(lambda step=step: fit.save(step + 1, None)))
            overlapping.append([])

    fit.saver.finish()
    return calls, alone, overlapping


def save(rounds: int) -> dict:
    """Steps of the smoke system with a save every `STEPS` steps."""
    with tempfile.TemporaryDirectory() as folder, collectives.process_group() as world:
        settings = config.load(SMOKE, ["system.text_encoder.params.skip_pretrained=1", *SELF_EVALUATING])
        settings["system"]["autoencoder"]["params"]["skip_pretrained"] = True
        options = argparse.Namespace(workers=0, batch_size=32, one_sample=False)
        precompute.encode_all(settings, Path(folder), options, world)

        # train from the cache, without a step limit in reach
        settings = config.load(
            f"{folder}/config.yaml", [f"trainer.output_dir={folder}/run", "trainer.max_steps=100000"]
        )
        with torch.device("meta"):
            system = config.build(settings, "system")
        trainer, data = config.build(settings, "trainer"), config.build(settings, "data")
        calls, alone, overlapping = measure(Trainer(trainer, system, data, 0, world), rounds)
    return compare(calls, alone, overlapping)


def compare(calls: list[Spent], alone: list[Spent], overlapping: list[list[Spent]]) -> dict:
    """Medians over steps and saves; the first save call, which also sets up buffers, is listed separately."""
    first, *later = calls
    figures, step, call, longer = {}, {}, {}, {}

    for clock in ("wall", "cpu", "queue", "lock"):
        step[clock] = statistics.median(getattr(s, clock) for s in alone)
        call[clock] = statistics.median(getattr(s, clock) for s in later)
        longer[clock] = statistics.median(sum(getattr(s, clock) - step[clock] for s in steps) for steps in overlapping)
        figures |= {
            f"a step alone, {clock}": step[clock],
            f"the call that saves, {clock}": call[clock],
            f"the first such call, {clock}": getattr(first, clock),
            f"steps during writing longer by, {clock}": longer[clock],
        }

    writer = statistics.median(sum(s.others for s in steps) for steps in overlapping)
    figures |= {"the writing thread, cpu": writer, "steps during writing": statistics.mean(map(len, overlapping))}
    return {
        "figures": {name: round(value, 4) for name, value in figures.items()},
        "checks": [
            at_most("save: CPU of call and writing thread / of a step", (call["cpu"] + writer) / step["cpu"], 1),
            at_most("save: steps during writing wait for the lock / CPU of a step", longer["lock"] / step["cpu"], 0.2),
        ],
    }
