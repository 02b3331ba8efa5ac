"""Exponential moving average of the weights: a second denoiser with the same sharding, stored in fp32.

In bf16 an average with decay 0.9999 would never change, because the update is smaller than the rounding error.
"""

from __future__ import annotations

import torch
from torch import nn

from selfe.distributed.fsdp import local


@torch.no_grad()
def update(ema: nn.Module, net: nn.Module, decay: float) -> None:
    """ema <- decay ema + (1 - decay) net, on this rank's shards, in place."""
    averages = [local(p) for p in ema.parameters()]
    weights = [local(p) for p in net.parameters()]
    torch._foreach_lerp_(averages, weights, 1 - decay)


def decay_at(step: int, decay: float, warmup: bool) -> float:
    """The decay at a step: constant as in the paper, or, with warm-up, at most (1 + step) / (10 + step)."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay
