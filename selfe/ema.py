"""The exponential moving average of the weights: a second copy of the denoiser, sharded alike and kept in fp32.

(Stored in bf16, an average with decay 0.9999 never moves: the update is smaller than the rounding.)
"""

from __future__ import annotations

import torch
from torch import nn

from selfe.dist import local


@torch.no_grad()
def update(ema: nn.Module, net: nn.Module, decay: float) -> None:
    """ema <- decay ema + (1 - decay) net, on this rank's shards, in place."""
    averages = [local(p) for p in ema.parameters()]
    weights = [local(p) for p in net.parameters()]
    torch._foreach_lerp_(averages, weights, 1 - decay)


def decay_at(step: int, decay: float, warmup: bool) -> float:
    """The decay of a step: constant as in the paper, or growing as (1 + step) / (10 + step) at first."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay
