"""The blocks of a denoiser, one by one: which activations are computed again instead of kept, and compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from selfe.attention import KERNELS

Recompute = bool | int | Literal["selective"]

# what "selective" keeps: outputs of matrix products and of attention, which cost more to compute than to store
COSTLY = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, *KERNELS]
# a compilation for every meaning of a block's sizes and weights (trained or not, with gradient or not, a batch of one,
# as many text tokens as samples), not for every size; a handful, but reaching the limit would end a run
MOST_VARIANTS = 64


def blocks(module: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """Every block and its number in its stack."""
    for stack in module.children():
        if isinstance(stack, nn.ModuleList):
            yield from enumerate(stack)


def save_memory(module: nn.Module, recompute: Recompute) -> None:
    """Compute activations again in the backward pass: of all blocks (True), of every k-th, or the cheap ones of all."""
    every = 1 if recompute == "selective" else int(recompute)
    for number, block in blocks(module) if every else ():
        if number % every == 0:
            # replaces the method rather than wrapping the module: parameter names stay what they are
            block.forward = again(block.forward, selective=recompute == "selective")


def again(forward: Callable[..., Tensor], selective: bool) -> Callable[..., Tensor]:
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, COSTLY)

    def run(*arguments: Any) -> Tensor:
        return checkpoint(forward, *arguments, **options)

    return run


def compile(module: nn.Module) -> None:
    """Compile every block when it is first called, once for all sizes. After `save_memory`, if there is any."""
    for _, block in blocks(module):
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=True, recompile_limit=MOST_VARIANTS)
