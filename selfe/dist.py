"""Processes and devices: the only home of the process group, the device choice, FSDP2 and activation checkpointing."""

from __future__ import annotations

import torch


def accelerator_count() -> int:
    """How many accelerators this machine has; 0 means that processes run on the CPU."""
    return torch.accelerator.device_count()
