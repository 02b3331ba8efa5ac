"""Variable-length attention over packed sequences, without padding. All device-specific kernels are chosen here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from torch.utils.flop_counter import register_flop_formula, sdpa_flop_count

from selfe.device import to_device

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Sequences:
    """B sequences packed into (T, ...) tensors, T = sum(lens). Fastest if sequences of equal length are adjacent."""

    lens: Tensor  # (B,) int64 on the CPU
    ends: Tensor  # (B + 1,) int32 on the device: cumulative sequence lengths (cu_seqlens)
    longest: int  # maximum sequence length

    @classmethod
    def of(cls, lens: list[int], device: torch.device) -> Sequences:
        host = torch.tensor(lens)
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), host.cumsum(0)])
        return cls(host, to_device(ends.int(), device), max(lens))


def attend(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
    """Softmax attention within each sequence; q, k, v (T, heads, head_dim) -> (T, heads, head_dim).

    CPU: float32 (the half-precision backward is slow), one kernel call per run of sequences of equal length.
    Accelerators: the fused varlen kernel in half precision, otherwise one SDPA call per sequence.
    Meta device: shapes only, for counting FLOPs.
    """
    if q.is_meta:
        return by_length(q, k, v, sequences.lens)[0]
    if q.device.type == "cpu":
        working = torch.promote_types(q.dtype, torch.float32)
        return by_length(*(x.to(working) for x in (q, k, v)), sequences.lens)[0].to(q.dtype)
    if q.dtype in HALF:
        return varlen_attn(q, k, v, sequences.ends, sequences.ends, sequences.longest, sequences.longest)

    # Fused SDPA kernels need a batch dimension: (1, heads, n, head_dim).
    each = zip(*(x.transpose(0, 1)[None].split(sequences.lens.tolist(), dim=2) for x in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*qkv) for qkv in each], dim=2)[0].transpose(0, 1)


# ---- CPU kernel: a custom op with its own backward, opaque to torch.compile ----


@torch.library.custom_op("selfe::by_length", mutates_args=())
def by_length(q: Tensor, k: Tensor, v: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with one kernel call per run of adjacent sequences of equal length, the fastest exact way on CPU.

    Returns the output (T, heads, head_dim) and the log-sum-exp of the scores (T, heads), needed by the backward.
    """
    attended, lse = torch.empty_like(v), q.new_empty(q.shape[:2])
    for *qkv, out, weight in by_run(lens, q, k, v, attended, lse):
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*qkv)
        out.copy_(found[0])
        weight.copy_(found[1])
    return attended, lse


@torch.library.custom_op("selfe::by_length_backward", mutates_args=())
def by_length_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Tensor, lse: Tensor, lens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each (T, heads, head_dim)."""
    grads = tuple(torch.empty_like(x) for x in (q, k, v))
    for run in by_run(lens, grad, q, k, v, attended, lse, *grads):
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*run[:6], 0.0, False)
        for out, part in zip(run[6:], found, strict=True):
            out.copy_(part)
    return grads


def by_run(lens: Tensor, *tensors: Tensor) -> Iterator[list[Tensor]]:
    """For each run of `count` sequences of equal length n: views (count, heads, n, ...) of tensors (T, heads, ...)."""
    runs = [(len(list(group)), n) for n, group in groupby(lens.tolist())]
    parts = zip(*(x.split([count * n for count, n in runs]) for x in tensors), strict=True)
    for shape, run in zip(runs, parts, strict=True):
        yield [x.view(*shape, *x.shape[1:]).transpose(1, 2) for x in run]


@by_length.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), q.new_empty(q.shape[:2])


@by_length_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Tensor, lse: Tensor, lens: Tensor) -> tuple:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def remember(ctx, inputs: tuple, output: tuple) -> None:
    """The `setup_context` of `by_length`."""
    ctx.save_for_backward(*inputs[:3], *output, inputs[3])


def backward(ctx, grad: Tensor, _: Tensor) -> tuple:
    return *by_length_backward(grad.contiguous(), *ctx.saved_tensors), None


by_length.register_autograd(backward, setup_context=remember)


def squares(lens: Tensor) -> int:
    """Number of query-key pairs: the sum of n^2 over sequences."""
    return int(lens.square().sum())


@register_flop_formula(torch.ops.selfe.by_length, get_raw=True)
def flops(q: Tensor, k: Tensor, v: Tensor, lens: Tensor, **_) -> int:
    """Forward: two matmuls of n x n x head_dim per head and sequence (scores, weighted values)."""
    return 2 * 2 * q.shape[1] * q.shape[2] * squares(lens)


@register_flop_formula(torch.ops.selfe.by_length_backward, get_raw=True)
def backward_flops(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Tensor, lse: Tensor, lens: Tensor, **_
) -> int:
    """Backward: five matmuls (recomputed scores; gradients of values, attention weights, queries and keys)."""
    return 5 * 2 * q.shape[1] * q.shape[2] * squares(lens)


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def cpu_kernel_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_, **__) -> int:
    """SDPA on CPU, used by the encoders; torch registers FLOP formulas for other devices only."""
    return sdpa_flop_count(q, k, v)


aten = torch.ops.aten
# All attention kernels that `attend` may dispatch to, for selective activation checkpointing.
KERNELS = (
    torch.ops.selfe.by_length.default,
    torch.ops.torch_attn._varlen_attn.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
)
