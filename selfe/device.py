"""Device selection and capabilities: one accelerator per process if the machine has any, otherwise the CPU."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

# dense bf16 TFLOP/s from the vendors' data sheets, by substring of the device name; the first match counts
PEAKS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "RTX 4090": 165,
}

ALLOCATIONS = 100_000  # most recent ones that are recorded


def accelerator_count() -> int:
    """Number of accelerators of this machine; 0: processes run on the CPU."""
    return torch.accelerator.device_count()


def choose_device(local_rank: int) -> torch.device:
    """The device of process `local_rank` on this machine; makes it the current device."""
    if not accelerator_count():
        return torch.device("cpu")
    torch.accelerator.set_device_index(local_rank)
    return torch.device(torch.accelerator.current_accelerator().type, local_rank)


def is_accelerator(device: torch.device) -> bool:
    """Whether copies from the host to this device can run in the background, from pinned memory."""
    return device.type not in ("cpu", "meta")


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies matrices in bf16 by hardware, so that bf16 is faster than fp32.

    A CPU needs AMX or AVX512-BF16, which the environment variable ATEN_CPU_CAPABILITY can switch off; without them
    torch emulates bf16, several times slower than fp32.
    """
    if device.type == "cpu":
        wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        return wide and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    supported = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    return supported is not None and supported(including_emulation=False)


def choose_precision(wanted: Literal["auto", "bf16", "fp32"], device: torch.device) -> Literal["bf16", "fp32"]:
    """The precision of matrix products: `auto` is bf16 where the hardware has it, otherwise fp32."""
    if wanted != "auto":
        return wanted
    return "bf16" if has_fast_bf16(device) else "fp32"


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to the device without synchronising: pinned and non-blocking on accelerators."""
    if not is_accelerator(device):
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def device_name(device: torch.device) -> str:
    """The model of a device, such as `NVIDIA H100`; of a CPU, with the instructions that torch uses."""
    if device.type == "cpu":
        return f"CPU with {torch.backends.cpu.get_cpu_capability()}"
    return torch.get_device_module(device).get_device_properties(device).name


def set_deterministic(wanted: bool) -> None:
    """Enable or disable deterministic kernels; warns about operations that have none."""
    torch.use_deterministic_algorithms(wanted, warn_only=True)


def synchronize() -> None:
    """Wait for all queued work of the accelerator; no-op on the CPU."""
    if accelerator_count():
        torch.accelerator.synchronize()


def peak_tflops() -> float | None:
    """Peak dense bf16 TFLOP/s of the current device, None if unknown."""
    if not accelerator_count():
        return None
    name = torch.get_device_module().get_device_properties(torch.accelerator.current_device_index()).name
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def peak_memory() -> int:
    """Peak bytes allocated on the accelerator; on the CPU, peak resident set size of this process."""
    if accelerator_count():
        return torch.accelerator.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, others KiB


def usable_cores() -> int:
    """Number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def loopback() -> tuple[str, str]:
    """Address and name of the network device that reaches this machine only."""
    return "127.0.0.1", "lo0" if sys.platform == "darwin" else "lo"


def record_allocations() -> None:
    """Start to record the history of the accelerator's allocator, for `save_allocations`; no-op where unsupported."""
    if memory := allocator():
        memory._record_memory_history(max_entries=ALLOCATIONS)


def save_allocations(path: Path) -> None:
    """Save the recorded history for https://pytorch.org/memory_viz and stop recording; no-op where unsupported."""
    if memory := allocator():
        memory._dump_snapshot(str(path))
        memory._record_memory_history(enabled=None)


def allocator() -> ModuleType | None:
    """torch's module of the accelerator's allocator, None if it cannot record its history."""
    memory = getattr(torch.get_device_module(), "memory", None)
    return memory if hasattr(memory, "_record_memory_history") else None
