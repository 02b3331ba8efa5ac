"""The device: one accelerator per process where the machine has any, else the CPU; and what it can do."""

from __future__ import annotations

import resource

import torch
from torch import Tensor

# dense bf16 TFLOP/s by a part of the device's name, from the vendors' data sheets; the first that fits
PEAKS = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362}


def accelerator_count() -> int:
    """How many accelerators this machine has; 0 means that processes run on the CPU."""
    return torch.accelerator.device_count()


def choose_device(local_rank: int) -> torch.device:
    """The device of this machine's process number `local_rank`, made the current one."""
    if not accelerator_count():
        return torch.device("cpu")
    torch.accelerator.set_device_index(local_rank)
    return torch.device(torch.accelerator.current_accelerator().type, local_rank)


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, without waiting for what the device is doing."""
    if device.type in ("cpu", "meta"):
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def set_deterministic(wanted: bool) -> None:
    """Whether to give the same bits every time, where kernels have such a form."""
    torch.use_deterministic_algorithms(wanted, warn_only=True)


def synchronize() -> None:
    """Wait until the accelerator has done what it was asked for; a CPU always has."""
    if accelerator_count():
        torch.accelerator.synchronize()


def peak_tflops() -> float | None:
    """The current device's peak in bf16, None if it is not known."""
    if not accelerator_count():
        return None
    name = torch.get_device_module().get_device_properties(torch.accelerator.current_device_index()).name
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def peak_memory() -> int:
    """Bytes: the most that was allocated on the accelerator, or that this process ever held on a CPU."""
    if accelerator_count():
        return torch.accelerator.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
