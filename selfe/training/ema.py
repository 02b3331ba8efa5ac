"""Moving averages of the weights (EMA): denoisers with the same sharding as the trained one, stored in fp32.

In bf16 an average with decay 0.9999 would never change, because the update is smaller than the rounding error.
"""

from __future__ import annotations

import torch
from torch import nn

from selfe.distributed.fsdp import trained_pairs
from selfe.types import check_range


class ConstantDecay:
    """An exponential moving average: a step keeps the share `decay`. The paper's has 0.9999."""

    def __init__(self, decay: float = 0.9999, warmup: bool = False):
        """
        Args:
            decay: share of the average that a step keeps.
            warmup: lower decay in the first steps, at most (1 + step) / (10 + step).
        """
        check_range("decay", decay, 0, 1)
        self.decay, self.warmup = decay, warmup
        self.name = f"ema_decay_{decay:g}"

    def decay_at(self, step: int) -> float:
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay


class PowerFunction:
    """EDM2's power-function EMA (arXiv 2312.02696, Eq. 121-126): weights of step t count as t^gamma.

    Its length grows with the run, so `std` means the same for runs of any length. From two tracks of different `std`,
    saved in several checkpoints, `selfe export --ema-std` computes the average of any other `std`.
    """

    def __init__(self, std: float = 0.05):
        """
        Args:
            std: width of the average, the standard deviation of the steps that it covers relative to all steps; 0.05
                and 0.1 are EDM2's.
        """
        check_range("std", std, 0.01, 0.28)
        self.std, self.gamma = std, gamma_of(std)
        self.name = f"ema_std_{std:g}"

    def decay_at(self, step: int) -> float:
        return (1 - 1 / (step + 1)) ** (self.gamma + 1)


def gamma_of(std: float) -> float:
    """The exponent of the power function whose relative standard deviation is `std`, at most 0.28.

    Inverts std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), which falls with gamma, by bisection.
    """
    low, high = 0.0, 1e5
    for _ in range(200):
        middle = (low + high) / 2
        variance = (middle + 1) / ((middle + 2) ** 2 * (middle + 3))
        low, high = (middle, high) if variance > std**2 else (low, middle)
    return low


@torch.no_grad()
def update(ema: nn.Module, net: nn.Module, decay: float) -> None:
    """ema <- decay ema + (1 - decay) net, on this rank's shards of what is trained, in place."""
    averages, weights = zip(*trained_pairs(ema, net), strict=True)
    torch._foreach_lerp_(averages, weights, 1 - decay)
