"""How scripts/bench.py measures: CPU seconds in turns, operations, bytes; and how it says whether a bound holds."""

from __future__ import annotations

import ctypes
import platform
import resource
import statistics
from collections.abc import Callable

import torch
from torch import Size
from torch.utils.flop_counter import (
    FlopCounterMode,
    register_flop_formula,
    sdpa_backward_flop_count,
)

aten = torch.ops.aten


def keep_memory() -> None:
    """Let the C library keep what is freed, as the allocator of a GPU does.

    By default glibc returns large tensors to the system and gets them back page by page, or does not, by what happened
    to be freed before: a process is fast or slow by chance, and most of all who makes the largest temporaries.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4  # numbers of mallopt(3)
        ctypes.CDLL(None).mallopt(mmap_max, 0)
        ctypes.CDLL(None).mallopt(trim_threshold, 2**31 - 1)


def cpu_seconds(work: Callable[[], None]) -> float:
    """Of this process and of those that it started and saw end."""

    def now() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    start = now()
    work()
    return now() - start


def take_turns(contenders: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each, after one round that does not count."""
    seconds = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, work in contenders.items():
            seconds[name].append(cpu_seconds(work))
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


@register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _(grad: Size, q: Size, k: Size, v: Size, *_, **__) -> int:
    """Of a peer: torch has formulas for the kernels of accelerators only (its forward: selfe/attention.py)."""
    return sdpa_backward_flop_count(grad, q, k, v)


def flops(work: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def peak_bytes(work: Callable[[], None]) -> int:
    """The most that is allocated at a time, beyond what was there before: the allocator's own account, to the byte."""
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
