"""Compiled blocks compute what plain ones do, and are not compiled again for other lengths.

Most tests trace without generating code, which leaves forward and backward graphs and guards what they are and saves
most of the time.
"""

from __future__ import annotations

import random

import pytest
import torch

from selfe.backbones import attention
from selfe.backbones.mmdit import MMDiT
from selfe.data.buckets import Buckets
from selfe.distributed import activation_checkpoint, fsdp
from selfe.distributed.collectives import World
from selfe.objectives.self_evaluation import SelfEvaluation
from selfe.rng import SampleRNG
from selfe.types import Packed, packed
from tests.distributed.test_fsdp import encode, gradients, small_net
from tests.method.test_mmdit import SMALL, inputs, small

STEPS = {"start_step": 3, "tau_steps": 8, "aux_start_step": 8}  # as in configs/debug/selfe_smoke.yaml


pytestmark = pytest.mark.usefixtures("traced")


def pair(
    dtype: torch.dtype, recompute: activation_checkpoint.ActivationCheckpointing = False, singles: int = 1
) -> tuple[MMDiT, MMDiT]:
    """The same denoiser, plain and compiled."""
    plain, compiled = (small(dtype=dtype, num_double_blocks=1, num_single_blocks=singles) for _ in range(2))
    activation_checkpoint.apply_activation_checkpointing(compiled, recompute)
    activation_checkpoint.compile(compiled)
    return plain, compiled


def assert_same(plain: MMDiT, compiled: MMDiT, dtype: torch.dtype, atol: float) -> None:
    """Values and all gradients, of the inputs too."""
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


@pytest.mark.parametrize("recompute", [False, "selective"])
def test_values_and_gradients(recompute):
    assert_same(*pair(torch.float64, recompute), torch.float64, 1e-12)


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


def test_generated_code(monkeypatch):
    """The same for generated code, on one block only, because compilation is slow."""
    monkeypatch.undo()
    assert_same(*pair(torch.float32, "selective", singles=0), torch.float32, 1e-5)


def test_packed_samples_do_not_see_each_other():
    _, net = pair(torch.float64)
    x, t, s, cond = inputs()
    with torch.no_grad():
        together = x.with_tokens(net(x, t, s, cond)).split()
        for i, v in enumerate(together):
            alone = net(x.select([i]), t[[i]], s[[i]], cond.select([i]))
            torch.testing.assert_close(v, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("precision", "recompute", "rtol"), [("fp32", True, 1e-5), ("bf16", "selective", 0.05)])
def test_self_evaluation(alone, precision, recompute, rtol):
    """Its gradients with the auxiliary term, sharded, against those of plain fp32."""
    options = {"activation_checkpointing": recompute, "compile": True}
    nets = fsdp.build_model_and_ema(small_net(), fsdp.make_mesh(alone, None), precision, 0, **options)
    grads = gradients(*nets, 0, 1, micro=8)
    for name, expected in gradients(small_net(), small_net().requires_grad_(False), 0, 1, micro=8).items():
        assert (grads[name] - expected).norm() <= rtol * expected.norm(), name


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


def test_a_bounded_number_of_compilations(alone: World):
    """Kinds of calls are compiled, shapes are not."""
    with torch.device("meta"):
        net = MMDiT(**SMALL | {"num_double_blocks": 2, "num_single_blocks": 2})
    net, ema = fsdp.build_model_and_ema(
        net, fsdp.make_mesh(alone, None), "fp32", 0, activation_checkpointing=True, compile=True
    )
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]  # of other tests in this process
    all_that_happens(net, ema, range(2))
    assert stats["unique_graphs"] - before <= 24
    with torch._dynamo.config.patch(error_on_recompile=True):
        all_that_happens(net, ema, range(2, 5))


def test_a_block_is_one_graph_where_attention_is_one_kernel(alone: World, monkeypatch):
    """As in half precision on accelerators; here by a stand-in for the kernel with the same arguments."""
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda q: True)
    monkeypatch.setattr(attention, "varlen_attn", lambda q, k, v, *lengths: q * k + v)
    breaks = torch._dynamo.utils.counters["graph_break"]
    breaks.clear()
    _, net = pair(torch.float32, "selective")
    ema = small(dtype=torch.float32).requires_grad_(False)
    activation_checkpoint.compile(ema)
    all_that_happens(net, ema, range(2))
    assert not breaks
    with torch._dynamo.config.patch(error_on_recompile=True):
        all_that_happens(net, ema, range(2, 4))
