"""The device choice: one accelerator per process where the machine has any, else the CPU."""

from __future__ import annotations

import torch


def accelerator_count() -> int:
    """How many accelerators this machine has; 0 means that processes run on the CPU."""
    return torch.accelerator.device_count()


def choose_device(local_rank: int) -> torch.device:
    """The device of this machine's process number `local_rank`, made the current one."""
    if not accelerator_count():
        return torch.device("cpu")
    torch.accelerator.set_device_index(local_rank)
    return torch.device(torch.accelerator.current_accelerator().type, local_rank)
