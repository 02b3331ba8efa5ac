"""Measurements of scripts/bench/run.py: interleaved CPU time, FLOPs, peak memory; and checks against bounds."""

from __future__ import annotations

import ctypes
import platform
import resource
import statistics
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode


def keep_memory() -> None:
    """Make malloc cache freed memory, as CUDA's caching allocator does.

    By default glibc may return large tensors to the system and page them in again, depending on what was freed before.
    Timings then vary between processes, most for code with large temporaries.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4  # parameters of mallopt(3)
        ctypes.CDLL(None).mallopt(mmap_max, 0)
        ctypes.CDLL(None).mallopt(trim_threshold, 2**31 - 1)


def cpu_seconds(work: Callable[[], None]) -> float:
    """CPU seconds of `work` in this process and in child processes that it has waited for."""

    def now() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    start = now()
    work()
    return now() - start


def take_turns(contenders: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each contender over interleaved rounds, after a warm-up round."""
    seconds = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, work in contenders.items():
            seconds[name].append(cpu_seconds(work))
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def flops(work: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def peak_bytes(work: Callable[[], None]) -> int:
    """Peak bytes allocated during `work`, relative to its start, from the profiler's allocator events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()

    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def at_least(name: str, value: float, bound: float) -> dict:
    return {"name": name, "value": round(value, 3), "bound": f">= {bound}", "pass": value >= bound}


def at_most(name: str, value: float, bound: float) -> dict:
    return {"name": name, "value": round(value, 3), "bound": f"<= {bound}", "pass": value <= bound}
