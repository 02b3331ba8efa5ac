"""Throughput: seconds by phase of a step, samples and tokens per second, FLOP/s, MFU and peak memory."""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from selfe import device
from selfe.protocols import Backbone, Denoiser
from selfe.types import Packed, Route, TextCond

GC_EVERY = 50  # steps


class ManualGC:
    """Disables Python's garbage collector until `close`, and collects after every `GC_EVERY` steps instead.

    Automatic collections start at another moment on every rank, and each of them would delay all ranks.
    """

    def __init__(self):
        gc.collect()
        gc.disable()

    def after(self, step: int) -> None:
        """Call it after each step, on every rank."""
        if (step + 1) % GC_EVERY == 0:
            gc.collect(1)

    def close(self) -> None:
        gc.enable()


class StepTimer:
    """Attributes the time between two marks to the name of the first. Synchronises with the device only in `rates`."""

    def __init__(self, where: torch.device, peak_tflops: float | None = None, trained: float = 1.0):
        """`trained`: share of the parameters that have a gradient."""
        self.trained = trained
        self.device = None if where.type == "cpu" else where
        self.peak = peak_tflops or device.peak_tflops()
        self.marks: list[tuple[str, float | torch.Event]] = []
        self.flops = 0
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

    def around(self, net: Backbone) -> Denoiser:
        """`net` with its calls timed and counted as `forward`, or as `self_evaluation` when gradients are disabled."""

        def call(
            x_t: Packed,
            t: Tensor,
            s: Tensor,
            cond: TextCond,
            features: Sequence[str] = (),
            route: Route | None = None,
        ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
            learns = torch.is_grad_enabled()
            self.mark("forward" if learns else "self_evaluation")
            output = net(x_t, t, s, cond, features, route)
            self.mark("objective")

            # a backward pass costs two forward passes, one of them for the gradients of weights; recomputation by
            # activation checkpointing is not counted
            options = {"token_times": len(t) != len(x_t), "features": features, "route": route}
            self.flops += (2 + self.trained if learns else 1) * net.flops(x_t.lens, cond.text.lens, **options)
            return output

        return call

    def rates(self, num_steps: int, num_samples: float, num_tokens: float) -> dict[str, float]:
        """Rates since the last call; waits for the device.

        `speed/tflops` and `speed/mfu` are those of this process and count the denoiser only. `time/*` are fractions of
        the total time.

        Args:
            num_steps: completed steps.
            num_samples: images that all processes have learned from; those of skipped steps do not count.
            num_tokens: their image tokens, each image counted once.
        """
        phases = self.seconds()
        total = sum(phases.values())

        tflops = self.flops / total / 1e12
        self.flops = 0
        values = {
            "speed/seconds_per_step": total / max(num_steps, 1),
            "speed/images_per_second": num_samples / total,
            "speed/tokens_per_second": num_tokens / total,
            "speed/tflops": tflops,
        }
        if self.peak:
            values["speed/mfu"] = tflops / self.peak
        values["memory/peak_gib"] = device.peak_memory() / 2**30
        return values | {f"time/{name}": seconds / total for name, seconds in phases.items()}

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
