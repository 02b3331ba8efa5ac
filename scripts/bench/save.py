"""Benchmark of asynchronous checkpointing: what a save costs the training loop.

Runs real steps and real saves of a model of 112M parameters from a cache, in one process with one compute thread, to a
temporary folder. A save costs the call that starts it (with its copy to host memory), and the slowdown of steps that
overlap with the writing. The time of the loop's thread is split into

    cpu     computing
    queue   runnable, but preempted by another thread or process (Linux only)
    lock    blocked, mostly on Python's GIL

Bounds are on cpu and lock, which other load on the machine changes little; wall-clock time and the CPU time of the
writer thread, which has a core of its own, are reported only. A save must cost the loop at most one step more than a
plain copy of the weights, their EMA and the optimizer state.
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
from torch import Tensor

from selfe import config
from selfe.data import loader
from selfe.distributed import collectives, fsdp
from selfe.tools import precompute
from selfe.train import Trainer

STEPS = 6  # from one save to the next
# the smoke system with a larger denoiser
LARGE = [
    "system.backbone.params.width=768",
    "system.backbone.params.num_heads=12",
    "system.backbone.params.rope_axes=[16,24,24]",
    "system.backbone.params.num_double_blocks=3",
    "system.backbone.params.num_single_blocks=5",
]
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


def measure(run: Trainer, rounds: int) -> tuple[list[Spent], list[Spent], list[list[Spent]]]:
    """Measure save calls, steps without a save, and per save the overlapping steps; the first round is a warm-up."""
    steps = range((rounds + 1) * STEPS)
    order = ((step, place) for step in steps for place in range(run.num_micro(step)))
    micro_batches = loader.make_loader(run.part("train"), order, num_workers=0)

    calls, alone, overlapping = [], [], []
    for step in steps:
        writing = run.saver.pending is not None and not run.saver.pending.done()
        seconds = spent(lambda step=step: run.step(step, micro_batches, lambda: 0))
        if step >= STEPS:
            (overlapping[-1] if writing else alone).append(seconds)
        if (step + 1) % STEPS == 0 and step + 1 < len(steps):
            calls.append(spent(lambda step=step: run.save(step + 1, None)))
            overlapping.append([])

    run.saver.finish()
    return calls, alone, overlapping


def save(rounds: int) -> dict:
    """Steps of a model of 112M parameters with a save every `STEPS` steps."""
    with tempfile.TemporaryDirectory() as folder, collectives.process_group() as world:
        settings = config.load(SMOKE, ["system.text_encoder.params.skip_pretrained=1", *LARGE, *SELF_EVALUATING])
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
        run = Trainer(trainer, system, data, 0, world)
        calls, alone, overlapping = measure(run, rounds)
        copies = [spent(lambda: copy_state(run)) for _ in range(rounds)]

    parameters = sum(parameter.numel() for parameter in run.net.parameters())
    return compare(parameters, copies, calls, alone, overlapping)


def copy_state(run: Trainer) -> list[Tensor]:
    """A plain copy of weights, EMA and optimizer moments: the least that an asynchronous save has to do first."""
    tensors = [*run.net.parameters(), *run.ema.parameters()]
    tensors += [value for state in run.optimizer.state.values() for value in state.values()]
    return [fsdp.local(tensor.detach()).clone() for tensor in tensors]


def compare(
    parameters: int, copies: list[Spent], calls: list[Spent], alone: list[Spent], overlapping: list[list[Spent]]
) -> dict:
    """Medians over steps and saves; the first save call, which also sets up buffers, is listed separately."""
    first, *later = calls
    figures, copy, step, call, longer = {"parameters": parameters}, {}, {}, {}, {}

    for clock in ("wall", "cpu", "queue", "lock"):
        copy[clock] = statistics.median(getattr(s, clock) for s in copies)
        step[clock] = statistics.median(getattr(s, clock) for s in alone)
        call[clock] = statistics.median(getattr(s, clock) for s in later)
        longer[clock] = statistics.median(sum(getattr(s, clock) - step[clock] for s in steps) for steps in overlapping)
        figures |= {
            f"a step alone, {clock}": step[clock],
            f"a plain copy of the state, {clock}": copy[clock],
            f"the call that saves, {clock}": call[clock],
            f"the first such call, {clock}": getattr(first, clock),
            f"steps during writing longer by, {clock}": longer[clock],
        }

    writer = statistics.median(sum(s.others for s in steps) for steps in overlapping)
    figures |= {"the writing thread, cpu": writer, "steps during writing": statistics.mean(map(len, overlapping))}
    beyond_copy = call["cpu"] - copy["cpu"] + max(longer["cpu"], 0.0)
    return {
        "figures": {name: round(value, 4) for name, value in figures.items()},
        "checks": [
            at_most("save: CPU of the loop beyond a plain copy / of a step", beyond_copy / step["cpu"], 1),
            at_most("save: steps during writing wait for the lock / CPU of a step", longer["lock"] / step["cpu"], 0.2),
        ],
    }
