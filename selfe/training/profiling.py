"""Traces of a few training steps: torch's profiler, and on NVIDIA GPUs a snapshot of the memory allocator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch.profiler import profile, supported_activities

from selfe import device, log
from selfe.distributed.collectives import World


@dataclass(frozen=True)
class ProfileConfig:
    """Steps to profile on rank 0. The first steps of a start are not typical: they compile and allocate."""

    steps: tuple[int, ...] = ()  # [first, end): from step `first` up to, but not including, `end`; []: none

    def __post_init__(self):
        if self.steps and (len(self.steps) != 2 or not 0 <= self.steps[0] < self.steps[1]):
            raise ValueError(f"steps must be [first, end] with 0 <= first < end, got {list(self.steps)}")


class Profiler:
    """Writes `trace.json.gz` (chrome://tracing, https://ui.perfetto.dev) and `memory.snapshot`
    (https://pytorch.org/memory_viz) for the configured steps to FOLDER/profile/steps_FIRST_END."""

    def __init__(self, config: ProfileConfig, folder: Path, world: World):
        self.first, self.end = config.steps if config.steps and world.is_main else (-1, -1)
        self.folder = folder / "profile" / f"steps_{self.first:08d}_{self.end:08d}"
        self.trace: profile | None = None

    def before(self, step: int) -> None:
        """Call it before each step."""
        if step != self.first:
            return

        self.trace = profile(activities=supported_activities(), record_shapes=True)
        self.trace.start()
        device.record_allocations()

    def after(self, step: int, last: bool) -> None:
        """Call it after each step; `last`: the run ends with this step."""
        if self.trace is None or not (last or step + 1 == self.end):
            return

        self.trace.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.trace.export_chrome_trace(str(self.folder / "trace.json.gz"))
        device.save_allocations(self.folder / "memory.snapshot")
        self.trace = None
        log.print_line(f"profile of steps {self.first} to {step}: {self.folder}")
