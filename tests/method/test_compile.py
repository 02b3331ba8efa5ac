"""Compiled blocks compute what plain ones do, and are not compiled again for other lengths.

Most tests trace without generating code, which leaves forward and backward graphs and guards what they are and saves
most of the time. Blocks with activation checkpointing are compiled only where attention is one kernel, as in half
precision on accelerators; a stand-in takes its place here.
"""

from __future__ import annotations

import random
from collections import Counter
from functools import partial

import pytest
import torch

from selfe.backbones import attention, lora
from selfe.backbones.mmdit import MMDiT
from selfe.data.buckets import Buckets
from selfe.distributed import activation_checkpoint, fsdp
from selfe.objectives.self_evaluation import SelfEvaluation
from selfe.rng import SampleRNG
from selfe.training.adapt import AdaptConfig
from selfe.types import Packed, packed
from tests.distributed.test_fsdp import encode, gradients
from tests.method.test_mmdit import SMALL, inputs, small

STEPS = {"start_step": 3, "tau_steps": 8, "aux_start_step": 8}  # as in configs/debug/selfe_smoke.yaml


@pytest.fixture(autouse=True)
def counters(traced) -> dict[str, Counter]:
    """What dynamo counts during the test."""
    torch._dynamo.utils.counters.clear()
    return torch._dynamo.utils.counters


@pytest.fixture
def one_kernel(monkeypatch) -> None:
    """Attention is one call with the arguments of the kernel; it computes something simple."""
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda device, dtype: True)
    monkeypatch.setattr(attention, "varlen_attn", lambda q, k, v, *lengths: q * k + v)


def pair(
    dtype: torch.dtype, recompute: activation_checkpoint.ActivationCheckpointing = False, doubles: int = 1
) -> tuple[MMDiT, MMDiT]:
    """The same denoiser, plain and compiled."""
    plain, compiled = (small(dtype=dtype, num_double_blocks=doubles, num_single_blocks=1) for _ in range(2))
    activation_checkpoint.apply_activation_checkpointing(compiled, recompute)
    activation_checkpoint.compile(compiled)
    return plain, compiled


def assert_same(plain: MMDiT, compiled: MMDiT, dtype: torch.dtype, atol: float) -> torch.Tensor:
    """Values and all gradients, of the inputs too. Returns the values of the compiled one."""
    results = []
    for net in (plain, compiled):
        x, t, s, cond = inputs(dtype)
        wanted = [x.tokens, t, s, cond.text.tokens, cond.pooled]
        for tensor in wanted:
            tensor.requires_grad_()
        v = net(x, t, s, cond)
        results.append([v, *torch.autograd.grad(v.square().mean(), [*wanted, *net.parameters()])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=atol * max(1, one.abs().max().item()))
    return v.detach()


def test_values_and_gradients(counters):
    plain, compiled = pair(torch.float64)
    v = assert_same(plain, compiled, torch.float64, 1e-12)
    assert counters["stats"]["unique_graphs"] > 2

    # packed samples do not see each other
    x, t, s, cond = inputs()
    with torch.no_grad():
        for i, together in enumerate(x.with_tokens(v).split()):
            alone = plain(x.select([i]), t[[i]], s[[i]], cond.select([i]))
            torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_times_per_token():
    """And features, of both kinds of blocks."""
    nets, (x, t, s, cond) = pair(torch.float64), inputs()
    names = ["double_blocks.0", "single_blocks.0"]
    outputs = []
    for net in nets:
        with torch.no_grad():
            v, features = net(x, t[x.owner], s[x.owner], cond, names)
        outputs.append([v, *features.values()])
    for plain, compiled in zip(*outputs, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-11)


def test_low_rank_matrices_beside_frozen_weights():
    """Values, and gradients of what is trained."""
    plain, compiled = (small(dtype=torch.float64, num_double_blocks=1, num_single_blocks=1) for _ in range(2))
    results = []
    for net in (plain, compiled):
        AdaptConfig(rank=2, alpha=4.0, trainable=("s_in.*",)).apply(net)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in net.named_parameters():
            if lora.is_low_rank(name):
                parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if net is compiled:
            activation_checkpoint.compile(net)
        v = net(*inputs())
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        results.append([v, *torch.autograd.grad(v.square().mean(), trained)])
    assert len(results[0]) == 1 + 2 * 10 + 4
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-12 * max(1, one.abs().max().item()))


def test_values_and_gradients_of_recomputed_blocks(one_kernel, counters):
    assert_same(*pair(torch.float64, "selective"), torch.float64, 1e-12)
    assert counters["stats"]["unique_graphs"] == 2


def test_recomputed_blocks_are_compiled_only_where_attention_is_one_kernel(counters):
    """`can_compile` is what the start of a run states."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert activation_checkpoint.can_compile("selective", cuda, torch.bfloat16)
    assert activation_checkpoint.can_compile(False, cpu, torch.float32)
    assert not activation_checkpoint.can_compile(True, cuda, torch.float32)

    assert not activation_checkpoint.can_compile("selective", cpu, torch.float32)
    _, compiled = pair(torch.float32, "selective")
    compiled(*inputs(torch.float32))
    assert counters["stats"]["unique_graphs"] == 0


def test_generated_code(one_kernel, counters, monkeypatch):
    """The same for generated code, on one block only, because compilation is slow."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="inductor"))
    with torch._inductor.config.patch(compile_threads=1):  # no processes, which would import torch first
        assert_same(*pair(torch.float32, "selective", doubles=0), torch.float32, 1e-5)
    assert counters["stats"]["unique_graphs"] == 1


# --- recompilation


def batch(seed: int, size: int) -> tuple[Packed, torch.Tensor, list[str]]:
    """Images from the buckets of two budgets, times and captions."""
    rng = random.Random(seed)
    shapes = [tuple(shape) for pixels in (16, 36) for shape in Buckets(pixels, 1, 3.0).shapes.tolist()]
    grids = rng.choices(shapes, k=size)
    x = packed(torch.randn(sum(rows * columns for rows, columns in grids), 8), grids)
    return x, torch.rand(size), ["x" * rng.randint(0, 9) for _ in grids]


def all_that_happens(net: MMDiT, ema: MMDiT, seeds: range) -> None:
    """Every phase of training, validation, and sampling with and without a prompt, with fresh shapes throughout."""
    objective = SelfEvaluation(**STEPS)
    for seed in seeds:
        for step, size in ((0, 4), (5, 6), (9, 4), (9, 2)):
            x0, _, captions = batch(seed * 100 + size + step, size)
            rng = SampleRNG.of_step(seed, step, range(size))
            conds = {name: encode(c) for name, c in objective.captions(captions, rng, step).items()}
            objective(net, ema, x0, conds, rng, step).per_sample.mean().backward()
            with torch.no_grad():
                for network in (net, ema):
                    objective(network, ema, x0, conds, rng, step)
        with torch.no_grad():
            for size in (1, 2, 3, 5):
                x, t, captions = batch(seed * 100 + 50 + size, size)
                for network in (net, ema):
                    network(x, t, t, encode(captions))
                    network(x, t, t, encode([""] * size))


def test_self_evaluation_takes_a_bounded_number_of_compilations(alone, one_kernel, counters):
    """Its gradients, sharded and in bf16, are those of plain fp32; kinds of calls are compiled, not shapes."""
    deep = SMALL | {"num_double_blocks": 2, "num_single_blocks": 2}
    options = {"activation_checkpointing": "selective", "compile": True}
    nets = fsdp.build_model_and_ema(MMDiT(**deep), fsdp.make_mesh(alone, None), "bf16", 0, **options)
    grads = gradients(*nets, 0, 1, micro=8)
    plain = gradients(MMDiT(**deep), MMDiT(**deep).requires_grad_(False), 0, 1, micro=8)
    for name, expected in plain.items():
        assert (grads[name] - expected).norm() <= 0.05 * expected.norm(), name

    all_that_happens(*nets, range(2))
    assert 4 <= counters["stats"]["unique_graphs"] <= 24
    assert not counters["graph_break"]  # a block is one graph
    with torch._dynamo.config.patch(error_on_recompile=True):
        all_that_happens(*nets, range(2, 4))
