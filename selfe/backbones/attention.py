"""Variable-length attention over packed sequences, without padding. All device-specific kernels are chosen here."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from selfe.device import to_device

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)

# All attention kernels that `attend` may dispatch to, for selective activation checkpointing.
KERNELS = (
    torch.ops.torch_attn._varlen_attn.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
)

# Before torch 2.15, only the kernels of accelerators had FLOP formulas; the CPU kernels take the same shapes.
CPU_FORMULAS = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}
for kernel, formula in CPU_FORMULAS.items():
    if kernel not in flop_registry:
        register_flop_formula(kernel)(formula)


@dataclass(frozen=True)
class Sequences:
    """B sequences packed into (T, ...) tensors, T = sum(lens). Fastest if sequences of equal length are adjacent."""

    runs: tuple[tuple[int, int], ...]  # (number of sequences, their length) of each run of equal lengths
    cu_seqlens: Tensor  # (B + 1,) int32 on the device: cumulative sequence lengths
    max_seqlen: int

    @classmethod
    def of(cls, lens: list[int], device: torch.device) -> Sequences:
        runs = tuple((len(list(group)), length) for length, group in groupby(lens))
        ends = torch.tensor([0, *lens]).cumsum(0, dtype=torch.int32)
        return cls(runs, to_device(ends, device), max(lens))


def attend(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
    """Softmax attention within each sequence; q, k, v (T, heads, head_dim) -> (T, heads, head_dim).

    Accelerators in half precision: the fused kernel for variable lengths. Otherwise one SDPA call per run of sequences
    of equal length; on the CPU in at least float32, because its backward pass is slow in half precision.
    """
    if has_varlen_kernel(q.device, q.dtype):
        ends, longest = sequences.cu_seqlens, sequences.max_seqlen
        return varlen_attn(q, k, v, ends, ends, longest, longest)

    dtype = torch.promote_types(q.dtype, torch.float32) if q.device.type == "cpu" else q.dtype
    return attend_by_runs(q.to(dtype), k.to(dtype), v.to(dtype), sequences).to(q.dtype)


def has_varlen_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether one kernel attends over all sequences at once."""
    return dtype in HALF and device.type not in ("cpu", "meta")


@torch.compiler.disable  # a graph would be specialised to the lengths of one batch
def attend_by_runs(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
    """`attend` with one SDPA call per run of sequences of equal length."""
    sizes = [count * length for count, length in sequences.runs]
    attended = []
    for run, *qkv in zip(sequences.runs, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        # (count * length, heads, head_dim) -> (count, heads, length, head_dim)
        batched = [x.unflatten(0, run).transpose(1, 2) for x in qkv]
        attended.append(sdpa(*batched).transpose(1, 2).flatten(0, 1))
    return torch.cat(attended)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over (batch, heads, length, head_dim)."""
    if q.is_meta:  # estimates of cost: on the meta device SDPA would not choose a fused kernel
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
    return F.scaled_dot_product_attention(q, k, v)
