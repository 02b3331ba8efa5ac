"""Where a run's time goes: seconds by phase, samples and tokens per second, memory, and how busy the device is."""

from __future__ import annotations

import time
from collections import defaultdict

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from selfe import device
from selfe.types import Denoiser, Packed, TextCond


class Clock:
    """From one `mark` to the next, time is counted under the mark's name. Asks the device only in `rates`."""

    def __init__(self, where: torch.device, peak_tflops: float | None = None):
        self.device = None if where.type == "cpu" else where
        self.peak = peak_tflops or device.peak_tflops()
        self.flops_per_token: float | None = None
        self.marks: list[tuple[str, float | torch.Event]] = []
        self.flops = self.tokens = 0.0
        self.mark("other")

    def mark(self, name: str) -> None:
        self.marks.append((name, self.now()))

    def now(self) -> float | torch.Event:
        if self.device is None:
            return time.perf_counter()
        event = torch.Event(self.device, enable_timing=True)  # the queue of the device, not the host, is what counts
        event.record()
        return event

    def around(self, net: Denoiser) -> Denoiser:
        """The denoiser, its calls timed and counted as `forward`, or `self_evaluation` where no gradient is wanted."""

        def call(x_t: Packed, t: Tensor, s: Tensor, cond: TextCond) -> Tensor:
            learns = torch.is_grad_enabled()
            if self.flops_per_token is None:
                self.count(net, x_t, t, s, cond)
            self.mark("forward" if learns else "self_evaluation")
            v = net(x_t, t, s, cond)
            self.mark("objective")
            self.tokens += len(x_t.tokens) * learns
            # a backward pass costs two forward passes; what is computed again to save memory is no useful work
            self.flops += (3 if learns else 1) * self.flops_per_token * (len(x_t.tokens) + len(cond.text.tokens))
            return v

        return call

    @torch.no_grad()
    def count(self, net: Denoiser, x_t: Packed, t: Tensor, s: Tensor, cond: TextCond) -> None:
        """Floating point operations per token, picture and caption alike, of one call; once per run."""
        self.mark("other")
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            net(x_t, t, s, cond)
        self.flops_per_token = counter.get_total_flops() / (len(x_t.tokens) + len(cond.text.tokens))

    def rates(self, num_samples: int, world_size: int) -> dict[str, float]:
        """Since the last call, with `num_samples` over all processes; waits for the device.

        `tokens_per_second` are picture tokens that were learned from. `tflops` and `mfu` are this process's, estimated
        from the denoiser's calls alone.
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
        """Per name since the last call; waits for the device."""
        self.mark(self.marks[-1][0])
        if self.device is not None:
            self.marks[-1][1].synchronize()
        total: dict[str, float] = defaultdict(float)
        for (phase, start), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            total[phase] += end - start if self.device is None else start.elapsed_time(end) / 1000
        self.marks = [self.marks[-1]]
        return dict(total)
