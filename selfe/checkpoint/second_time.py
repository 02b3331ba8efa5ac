"""The embedding of t - s in a model that has been trained without it, or only at s = t, by flow matching.

Self-E and flow maps start best from a model whose prediction at any s is its prediction at s = t.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from selfe.backbones.mmdit import sinusoid
from selfe.distributed import fsdp
from selfe.errors import UserError

PREFIX = "s_in."  # of the names of its parameters
OUTPUT = "s_in.2."  # its output layer


@torch.no_grad()
def silence(module: nn.Module) -> None:
    """Zero the output layer, so that predictions do not depend on s.

    The first layer keeps its random values, so that the output layer has a gradient.
    """
    for name, parameter in module.named_parameters():
        if name.startswith(OUTPUT):
            parameter.zero_()


@torch.no_grad()
def reset(module: nn.Module) -> None:
    """Let a sharded denoiser predict V(x_t, t, t) for any s; call it on every rank.

    Training at s = t has given the embedding of t - s one constant value, and no meaning elsewhere. This value moves
    to the bias of the embedding of t, and the output layer becomes zero.

    Raises:
        UserError: the denoiser has no embedding of t - s.
    """
    weights = {name: fsdp.unsharded(p) for name, p in module.named_parameters() if name.startswith(PREFIX)}
    if not weights:
        raise UserError("trainer.init_from.reset_s: system.backbone has no embedding of t - s; set s_branch: true")
    zero = sinusoid(torch.zeros(1, device=weights["s_in.0.weight"].device), module.time_scale)
    hidden = F.silu(F.linear(zero, weights["s_in.0.weight"], weights["s_in.0.bias"]))
    constant = F.linear(hidden, weights["s_in.2.weight"], weights["s_in.2.bias"])[0]

    bias = module.get_parameter("t_in.2.bias")
    fsdp.fill(bias, fsdp.unsharded(bias) + constant)
    silence(module)
