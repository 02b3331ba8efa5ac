"""Ragged attention: equal to attention sequence by sequence, differentiable, compilable, counted."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from selfe.backbones import attention
from selfe.backbones.attention import Sequences, attend

LENS = [2, 5, 5, 5, 9, 1]


def qkv(dtype: torch.dtype = torch.float64, lens: list[int] = LENS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(sum(lens), 2, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for _ in range(3)
    ]


def one_by_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    parts = zip(*(x.transpose(0, 1).split(LENS, dim=1) for x in (q, k, v)), strict=True)
    weights = [(torch.softmax(a @ b.mT / 8**0.5, dim=-1), c) for a, b, c in parts]
    return torch.cat([w @ c for w, c in weights], dim=1).transpose(0, 1)


def sequences() -> Sequences:
    return Sequences.of(LENS, torch.device("cpu"))


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_values_and_gradients(dtype, atol):
    found, expected = qkv(dtype), qkv()
    ours, theirs = attend(*found, sequences()), one_by_one(*expected)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=atol)
    ours.double().sin().sum().backward()
    theirs.sin().sum().backward()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=0, atol=2 * atol)


def test_flops_are_those_of_each_sequence_alone():
    """By torch's own formulas for fused attention, which it lacks for the CPU's kernel."""
    with FlopCounterMode(display=False) as counter:
        attend(*qkv(torch.float32), sequences()).sum().backward()
    shapes = [(1, 2, n, 8) for n in LENS]
    expected = sum(sdpa_flop_count(*[s] * 3) + sdpa_backward_flop_count(*[s] * 4) for s in shapes)
    assert counter.get_total_flops() == expected > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fused_kernel_gets_what_it_asks_for(dtype, monkeypatch):
    """On an accelerator: one call for all sequences, their ends as int32 beside the tokens. Here, on fake tensors."""
    calls = []

    def recorded(q, k, v, ends_q, ends_k, longest_q, longest_k):
        calls.append((q.dtype, ends_q.dtype, ends_q.device.type, tuple(ends_q.shape), longest_q))
        assert (ends_q is ends_k) & (longest_q == longest_k)
        return torch.ops.torch_attn._varlen_attn(q, k, v, ends_q, ends_k, longest_q, longest_k)[0]

    monkeypatch.setattr(attention, "varlen_attn", recorded)
    with FakeTensorMode():
        q, k, v = (torch.empty(sum(LENS), 2, 8, dtype=dtype, device="cuda") for _ in range(3))
        ends = torch.empty(len(LENS) + 1, dtype=torch.int32, device="cuda")
        out = attend(q, k, v, Sequences((), ends, max(LENS)))
    assert calls == [(dtype, torch.int32, "cuda", (len(LENS) + 1,), 9)]
    assert (out.dtype, out.shape, out.device.type) == (dtype, q.shape, "cuda")


def test_cumulative_lengths_and_runs_of_equal_length():
    packed = sequences()
    assert packed.cu_seqlens.tolist() == [0, 2, 7, 12, 17, 26, 27]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.max_seqlen == 9
    assert packed.runs == ((1, 2), (3, 5), (1, 9), (1, 1))
