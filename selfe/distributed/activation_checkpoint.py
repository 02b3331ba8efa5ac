"""Activation checkpointing and torch.compile, applied per transformer block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.fx.experimental._config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from selfe.backbones.attention import KERNELS, has_varlen_kernel

ActivationCheckpointing = bool | int | Literal["selective"]

# Saved by "selective": outputs of matmuls and attention, which are more expensive to recompute than to store.
COSTLY = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, *KERNELS]
# Recompile limit. Shapes are dynamic, so a block is recompiled only for special cases (frozen or trained weights, with
# or without gradient, batch size 1, as many text tokens as samples). These are few, but exceeding the limit is fatal.
MOST_VARIANTS = 64


def blocks(module: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """Yield (index, block) for the blocks of every `nn.ModuleList` of the module."""
    for stack in module.children():
        if isinstance(stack, nn.ModuleList):
            yield from enumerate(stack)


def apply_activation_checkpointing(module: nn.Module, recompute: ActivationCheckpointing) -> None:
    """Recompute activations in the backward pass.

    `recompute`: True for all blocks, an int k for every k-th block, False for none, or "selective" to recompute only
    the cheap operations of all blocks.
    """
    if not recompute:
        return
    every = 1 if recompute == "selective" else int(recompute)
    for index, block in blocks(module):
        if index % every == 0:
            # Replace `forward` instead of wrapping the module, so that parameter names do not change.
            block.forward = checkpointed(block.forward, selective=recompute == "selective")


def checkpointed(forward: Callable[..., Tensor], selective: bool) -> Callable[..., Tensor]:
    """Wrap a `forward` in (selective) activation checkpointing."""
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, COSTLY)

    def run(*arguments: Any) -> Tensor:
        return checkpoint(forward, *arguments, **options)

    return run


def can_compile(recompute: ActivationCheckpointing, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `compile` has an effect on all blocks: torch does not break a graph inside of a checkpoint."""
    return not recompute or has_varlen_kernel(device, dtype)


def compile(module: nn.Module) -> None:
    """Compile every block with dynamic shapes, at its first call.

    Call it after `apply_activation_checkpointing`, if both are used. A block is one graph where attention is a single
    kernel (half precision on accelerators). Otherwise it is several, with attention between them, and a block with
    activation checkpointing is not compiled at all: see `can_compile`.
    """
    torch._dynamo.config.recompile_limit = MOST_VARIANTS
    torch.fx.experimental._config.use_duck_shape = False  # sizes that are equal by chance are no reason to recompile
    for _, block in blocks(module):
        block.forward = torch.compile(block.forward, dynamic=True)
