"""What a save costs the training loop.

The smoke system from a cache, one process, one thread: real steps, and real saves to a temporary folder. A save costs
the call that starts it, its copy to host memory included, and what the steps beside the writing take longer than steps
alone. The loop's thread is either computing (cpu), ready while another thread or process has the core (queue, Linux
only), or waiting for what only one thread may have, Python's lock above all (lock).

Bounds are on what the machine's other work changes little: CPU, and the lock. Wall clock is told. If all that the
writing thread computes were taken from the loop, as on a machine of one core, a save would cost less than a step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import precompute
import torch
from bench_data import SMOKE
from measuring import at_most

from selfe import config, dist, loading
from selfe.train import Fit

STEPS = 6  # from a save to the next
SELF_EVALUATING = ["system.objective.params.start_step=0", "system.objective.params.aux_start_step=1000000"]


@dataclass(frozen=True)
class Spent:
    """Seconds of the loop's thread, and CPU seconds of the process's other threads."""

    wall: float
    cpu: float
    queue: float  # ready, but the core was another's
    others: float

    @property
    def lock(self) -> float:
        return self.wall - self.cpu - self.queue


def now() -> tuple[float, float, float, float]:
    stat = Path("/proc/thread-self/schedstat")
    queue = int(stat.read_text().split()[1]) / 1e9 if stat.exists() else 0.0
    cpu = time.thread_time()
    return time.perf_counter(), cpu, queue, time.process_time() - cpu


def spent(work: Callable[[], object]) -> Spent:
    before = now()
    work()
    return Spent(*(b - a for a, b in zip(before, now(), strict=True)))


def measure(fit: Fit, rounds: int) -> tuple[list[Spent], list[Spent], list[list[Spent]]]:
    """Calls that save, steps alone, and by save the steps beside its writing; the first round does not count."""
    steps = range((rounds + 1) * STEPS)
    order = ((step, place) for step in steps for place in range(fit.num_micro(step)))
    micro_batches = loading.ahead(fit.part("train"), order, num_workers=0)
    calls, alone, beside = [], [], []
    for step in steps:
        writing = fit.saver.pending is not None and not fit.saver.pending.done()
        seconds = spent(lambda step=step: fit.step(step, micro_batches, lambda: 0))
        if step >= STEPS:
            (beside[-1] if writing else alone).append(seconds)
        if (step + 1) % STEPS == 0 and step + 1 < len(steps):
            calls.append(spent(lambda step=step: fit.save(step + 1, None)))
            beside.append([])
    fit.saver.finish()
    return calls, alone, beside


def save(rounds: int) -> dict:
    with tempfile.TemporaryDirectory() as folder, dist.world() as world:
        settings = config.load(SMOKE, ["system.text_encoder.params.skip_pretrained=1", *SELF_EVALUATING])
        settings["system"]["autoencoder"]["params"]["skip_pretrained"] = True
        options = argparse.Namespace(workers=0, batch_size=32, one_sample=False)
        precompute.encode_all(settings, Path(folder), options, world)
        settings = config.load(
            f"{folder}/config.yaml", [f"trainer.output_dir={folder}/run", "trainer.max_steps=100000"]
        )
        with torch.device("meta"):
            system = config.build(settings, "system")
        trainer, data = config.build(settings, "trainer"), config.build(settings, "data")
        calls, alone, beside = measure(Fit(trainer, system, data, 0, world), rounds)
    return judged(calls, alone, beside)


def judged(calls: list[Spent], alone: list[Spent], beside: list[list[Spent]]) -> dict:
    """Medians over steps and saves; the first call, which also lays the files out, on its own."""
    first, *later = calls
    figures, step, call, longer = {}, {}, {}, {}
    for clock in ("wall", "cpu", "queue", "lock"):
        step[clock] = statistics.median(getattr(s, clock) for s in alone)
        call[clock] = statistics.median(getattr(s, clock) for s in later)
        longer[clock] = statistics.median(sum(getattr(s, clock) - step[clock] for s in steps) for steps in beside)
        figures |= {
            f"a step alone, {clock}": step[clock],
            f"the call that saves, {clock}": call[clock],
            f"the first such call, {clock}": getattr(first, clock),
            f"steps beside the writing longer by, {clock}": longer[clock],
        }
    writer = statistics.median(sum(s.others for s in steps) for steps in beside)
    figures |= {"the writing thread, cpu": writer, "steps beside the writing": statistics.mean(map(len, beside))}
    return {
        "figures": {name: round(value, 4) for name, value in figures.items()},
        "verdicts": [
            at_most("save: CPU of call and writing thread / of a step", (call["cpu"] + writer) / step["cpu"], 1),
            at_most(
                "save: steps beside the writing wait for the lock / CPU of a step", longer["lock"] / step["cpu"], 0.2
            ),
        ],
    }
