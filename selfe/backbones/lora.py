"""Low-rank adaptation of linear layers (LoRA, arXiv 2106.09685), with the parameter names of the PEFT library.

A layer W gets two matrices A (rank, in) and B (out, rank), and computes W x + b + (alpha / rank) B A x. Its own
parameters keep their names; those of the matrices are `LAYER.lora_A.weight` and `LAYER.lora_B.weight`.

A fused layer, such as that of queries, keys and values, has one A for all of its parts. The rows of B belong to the
parts, so that the same adapter can be written for a model that stores the parts as layers of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfe.rng import philox

A, B = ".lora_A.weight", ".lora_B.weight"  # what follows the name of a layer


class LoRALinear(nn.Linear):
    """A linear layer with two low-rank matrices beside it; it shares the parameters of the layer that it replaces."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.scale = alpha / rank

        device = layer.weight.device
        self.lora_A = nn.Linear(layer.in_features, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, layer.out_features, bias=False, device=device)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x (n, in) -> (n, out)."""
        return super().forward(x) + self.scale * self.lora_B(self.lora_A(x))


def add_matrices(net: nn.Module, layers: Sequence[str], rank: int, alpha: float) -> None:
    """Replace linear layers, given by name, by layers with low-rank matrices."""
    for name in layers:
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, LoRALinear(net.get_submodule(name), rank, alpha))


def is_low_rank(name: str) -> bool:
    """Whether a parameter is one of the low-rank matrices."""
    return name.endswith((A, B))


def initial(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Initial value of a low-rank matrix: as in PEFT, A is uniform and B is zero, so that the first step computes the
    model without them. Float32 on the CPU; depends on (seed, name) only.
    """
    if name.endswith(B):
        return torch.zeros(shape)
    bound = 1 / math.sqrt(shape[1])
    uniform = torch.from_numpy(philox(seed, "initial", name).random(tuple(shape), dtype="float32"))
    return uniform.mul_(2 * bound).sub_(bound)


def split_rows(layer: nn.Module, x: Tensor, sizes: Sequence[int]) -> list[Callable[[], Tensor]]:
    """The outputs of a linear layer as parts of these sizes, each computed by a call of its own."""
    if not isinstance(layer, nn.Linear):
        # what another library, such as PEFT, has put in the place of the layer
        return [part.contiguous for part in layer(x).split(sizes, dim=-1)]

    rows = zip(layer.weight.split(sizes), layer.bias.split(sizes), strict=True)
    if not isinstance(layer, LoRALinear):
        return [partial(F.linear, x, *part) for part in rows]

    low = layer.lora_A(x)

    def output(weight: Tensor, bias: Tensor, low_rank_rows: Tensor) -> Tensor:
        return F.linear(x, weight, bias) + layer.scale * F.linear(low, low_rank_rows)

    return [
        partial(output, *part, low_rank_rows)
        for part, low_rank_rows in zip(rows, layer.lora_B.weight.split(sizes), strict=True)
    ]
