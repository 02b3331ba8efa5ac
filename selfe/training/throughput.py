"""Throughput: seconds by phase of a step, samples and tokens per second, FLOP/s, MFU and peak memory."""

from __future__ import annotations

import time
from collections import defaultdict

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from selfe import device
from selfe.protocols import Denoiser
from selfe.types import Packed, TextCond


class StepTimer:
    """Attributes the time between two marks to the name of the first. Synchronises with the device only in `rates`."""

    def __init__(self, where: torch.device, peak_tflops: float | None = None):
        self.device = None if where.type == "cpu" else where
        self.peak = peak_tflops or device.peak_tflops()
        self.flops_per_token: float | None = None
        self.marks: list[tuple[str, float | torch.Event]] = []
        self.flops = self.tokens = 0.0
        self.mark("other")

    def mark(self, name: str) -> None:
        """The phase `name` starts here."""
        self.marks.append((name, self.now()))

    def now(self) -> float | torch.Event:
        """Seconds on the CPU; on accelerators an event in the device's queue, because kernels run asynchronously."""
        if self.device is None:
            return time.perf_counter()
        event = torch.Event(self.device, enable_timing=True)
        event.record()
        return event

    def around(self, net: Denoiser) -> Denoiser:
        """`net` with its calls timed and counted as `forward`, or as `self_evaluation` when gradients are disabled."""

        def call(x_t: Packed, t: Tensor, s: Tensor, cond: TextCond) -> Tensor:
            learns = torch.is_grad_enabled()
            if self.flops_per_token is None:
                self.count(net, x_t, t, s, cond)

            self.mark("forward" if learns else "self_evaluation")
            v = net(x_t, t, s, cond)
            self.mark("objective")

            # a backward pass costs two forward passes; recomputation by activation checkpointing is not counted
            self.tokens += len(x_t.tokens) * learns
            self.flops += (3 if learns else 1) * self.flops_per_token * (len(x_t.tokens) + len(cond.text.tokens))
            return v

        return call

    @torch.no_grad()
    def count(self, net: Denoiser, x_t: Packed, t: Tensor, s: Tensor, cond: TextCond) -> None:
        """Measure the FLOPs per token (image and caption tokens) of one forward pass; once per run."""
        self.mark("other")
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            net(x_t, t, s, cond)
        self.flops_per_token = counter.get_total_flops() / (len(x_t.tokens) + len(cond.text.tokens))

    def rates(self, num_samples: int, world_size: int) -> dict[str, float]:
        """Rates since the last call; waits for the device. `num_samples` is the number over all processes.

        `tokens_per_second` counts image tokens of passes with gradients. `tflops` and `mfu` are those of this process,
        estimated from the denoiser's calls only. `time_*` are fractions of the total time.
        """
        phases = self.seconds()
        total = sum(phases.values())

        values = {"samples_per_second": num_samples / total, "tokens_per_second": self.tokens * world_size / total}
        values["tflops"] = self.flops / total / 1e12
        if self.peak:
            values["mfu"] = values["tflops"] / self.peak
        values["peak_memory_gib"] = device.peak_memory() / 2**30

        self.flops = self.tokens = 0.0
        return values | {f"time_{name}": seconds / total for name, seconds in phases.items()}

    def seconds(self) -> dict[str, float]:
        """Seconds by name since the last call; waits for the device."""
        self.mark(self.marks[-1][0])
        if self.device is not None:
            self.marks[-1][1].synchronize()
        total: dict[str, float] = defaultdict(float)
        for (phase, start), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            total[phase] += end - start if self.device is None else start.elapsed_time(end) / 1000
        self.marks = [self.marks[-1]]
        return dict(total)
