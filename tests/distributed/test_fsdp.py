"""Sharding changes nothing: gradients, initial values, EMA and clipping on two processes are those of one."""

import pytest
import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from selfe.backbones.mmdit import MMDiT
from selfe.distributed import fsdp
from selfe.distributed.collectives import World
from selfe.distributed.fsdp import GatherConfig
from selfe.errors import UserError
from selfe.objectives.self_evaluation import SelfEvaluation
from selfe.rng import SampleRNG, philox
from selfe.training import ema
from selfe.types import Packed, TextCond, packed
from tests.helpers.ranks import on_ranks

GRIDS = [(2, 2), (2, 2), (1, 4), (1, 4), (3, 2), (3, 2), (2, 2), (2, 2)]
STEP = 5


def small_net() -> MMDiT:
    return MMDiT(
        patch_dim=8,
        text_dim=12,
        pooled_dim=6,
        width=48,
        num_heads=2,
        num_double_blocks=1,
        num_single_blocks=1,
        rope_axes=(4, 8, 12),
    )


def objective() -> SelfEvaluation:
    return SelfEvaluation(tau_steps=STEP, aux_start_step=STEP)


def latents(rows: range) -> Packed:
    parts = [philox("x0", r).standard_normal((GRIDS[r][0] * GRIDS[r][1], 8), "float32") for r in rows]
    return packed(torch.cat([torch.from_numpy(p) for p in parts]), [GRIDS[r] for r in rows])


def encode(captions: list[str]) -> TextCond:
    text = [torch.from_numpy(philox("text", c).standard_normal((1 + len(c) % 5, 12), "float32")) for c in captions]
    pooled = [torch.from_numpy(philox("pooled", c).standard_normal(6, "float32")) for c in captions]
    return TextCond(packed(torch.cat(text), [(1, len(t)) for t in text]), torch.stack(pooled))


def perturb(net: torch.nn.Module, seed: int) -> None:
    """Away from the zeros of the start, so that every parameter has a gradient; the same on any number of ranks."""
    for name, p in net.named_parameters():
        full = torch.from_numpy(0.1 * philox(seed, name).standard_normal(tuple(p.shape), "float32"))
        if isinstance(p, DTensor):
            full = distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None)
        p.data.copy_(full)


def gradients(net: torch.nn.Module, twin: torch.nn.Module, rank: int, size: int, micro: int) -> dict[str, torch.Tensor]:
    """Gradients of the mean Self-E loss over this rank's share of eight samples, in micro-batches."""
    perturb(net, 0), perturb(twin, 1)
    share = len(GRIDS) // size
    loss_of = objective()
    for first in range(rank * share, (rank + 1) * share, micro):
        rows = range(first, first + micro)
        rng = SampleRNG.of_step(0, STEP, rows)
        conds = {k: encode(v) for k, v in loss_of.captions([f"prompt {r}" for r in rows], rng, STEP).items()}
        loss = loss_of(net, twin, latents(rows), conds, rng, STEP)
        (loss.per_sample.mean() * micro / share).backward()
    return {
        name: p.grad.full_tensor().clone() if isinstance(p.grad, DTensor) else p.grad
        for name, p in net.named_parameters()
    }


def sharded_gradients(world: World, *args: int | bool | str) -> dict[str, torch.Tensor]:
    shard_size, recompute, *gathering = args
    with torch.device("meta"):
        net = small_net()
    options = {"activation_checkpointing": recompute, "gathering": GatherConfig(*gathering)}
    net, twin = fsdp.build_model_and_ema(net, fsdp.make_mesh(world, shard_size), "fp32", 0, **options)
    grads = gradients(net, twin, world.rank, world.size, micro=2)
    norm = fsdp.grad_norm(net)
    fsdp.clip_gradients(net, norm, 1e-3)
    ema.update(twin, net, 0.5)
    return {
        "norm": norm,
        "clipped": net.out.weight.grad.full_tensor(),
        "average": twin.out.weight.full_tensor(),
        "unsharded": torch.tensor(not isinstance(net.out.weight, DTensor)),
    } | grads


@pytest.fixture(scope="module")
def single() -> dict[str, torch.Tensor]:
    net, twin = small_net(), small_net().requires_grad_(False)
    return gradients(net, twin, 0, 1, micro=8)


def test_micro_batches_add_up_to_the_batch(single):
    for micro in (2, 4):
        parts = gradients(small_net(), small_net().requires_grad_(False), 0, 1, micro)
        for name, gradient in single.items():
            torch.testing.assert_close(parts[name], gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "args",  # shard_size, activation_checkpointing, gathering
    [
        (2, False, True, 0),
        (1, False),
        (2, True, False, 1),
        (2, 2, 1, 2),
        (2, "selective"),
        (1, "selective", False, 3),
    ],
)
def test_gradients_of_two_ranks_equal_one(single, args):
    found = on_ranks(2, sharded_gradients, *args)
    for name, gradient in single.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6)
    norm = torch.stack([g.square().sum() for g in single.values()]).sum().sqrt()
    torch.testing.assert_close(found["norm"], norm, rtol=1e-5, atol=0)
    torch.testing.assert_close(found["clipped"], single["out.weight"] * 1e-3 / norm, rtol=1e-3, atol=1e-9)
    net, twin = small_net(), small_net()
    perturb(net, 0), perturb(twin, 1)
    torch.testing.assert_close(found["average"], (net.out.weight + twin.out.weight) / 2, rtol=0, atol=1e-6)
    assert not found["unsharded"]


def test_blocks_may_stay_cut_over_fewer_ranks(single):
    found = on_ranks(4, sharded_gradients, 4, False, 2, 1)
    for name, gradient in single.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6)


class Gatherings(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.c10d._allgather_base_.default
        return function(*args, **kwargs or {})


def gathered(world: World, keep: bool) -> torch.Tensor:
    with torch.device("meta"):
        net = small_net()
    net, twin = fsdp.build_model_and_ema(
        net, fsdp.make_mesh(world, None), "fp32", 0, gathering=GatherConfig(reshard_after_forward=not keep)
    )
    with Gatherings() as seen:
        gradients(net, twin, world.rank, world.size, micro=4)
    return torch.tensor(seen.count)


def test_blocks_that_are_kept_whole_are_gathered_less_often():
    """Two blocks: for each of four forward passes and two backward passes, or once for each net and once between the
    backward passes. What belongs to no block goes with the passes, its backward passes being one."""
    assert on_ranks(2, gathered, False) == 2 * 6 + 5
    assert on_ranks(2, gathered, True) == 2 * 3 + 5


def after_looking(world: World) -> dict[str, torch.Tensor]:
    """Values before and after a change of the weights, with passes that keep blocks whole and have no backward pass."""
    with torch.device("meta"):
        net = small_net()
    net, twin = fsdp.build_model_and_ema(
        net, fsdp.make_mesh(world, None), "fp32", 0, gathering=GatherConfig(reshard_after_forward=False)
    )
    perturb(net, 0)
    conds = encode(["a", "b"])
    arguments = latents(range(2)), torch.tensor([0.9, 0.5]), torch.tensor([0.4, 0.5]), conds
    with torch.no_grad():
        found = {"before": net(*arguments)}
        fsdp.reshard(net)
        ema.update(twin, net, 0.0)
        for parameter in net.parameters():
            fsdp.local(parameter).mul_(2)
        found |= {"after": net(*arguments), "average": twin(*arguments)}
    return found


def test_blocks_that_are_kept_whole_are_never_out_of_date():
    found, net = on_ranks(2, after_looking), small_net()
    perturb(net, 0)
    conds = encode(["a", "b"])
    arguments = latents(range(2)), torch.tensor([0.9, 0.5]), torch.tensor([0.4, 0.5]), conds
    with torch.no_grad():
        torch.testing.assert_close(found["before"], net(*arguments), rtol=0, atol=1e-6)
        torch.testing.assert_close(found["average"], found["before"], rtol=0, atol=1e-6)
        for parameter in net.parameters():
            parameter.mul_(2)
        torch.testing.assert_close(found["after"], net(*arguments), rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrong", [3, 0])
def test_indivisible_gathering_is_one_line(wrong, alone):
    with pytest.raises(UserError, match=f"reshard_after_forward: {wrong} does not divide the 1 ranks"):
        fsdp.build_model_and_ema(small_net(), fsdp.make_mesh(alone, None), "fp32", 0, gathering=GatherConfig(wrong))


def initial_weights(world: World) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        net = small_net()
    fsdp.shard(net, fsdp.make_mesh(world, None), precision="fp32", activation_checkpointing=False)
    fsdp.materialise(net, world.device, seed=7)
    return {name: p.full_tensor().detach() for name, p in net.named_parameters()}


def test_initial_weights_do_not_depend_on_the_number_of_ranks():
    net = small_net()
    found = on_ranks(2, initial_weights)
    assert found.keys() == dict(net.named_parameters()).keys()
    for name, p in net.named_parameters():
        assert torch.equal(found[name], net.initial(name, p.shape, seed=7))


def with_a_flipped_bit(world: World) -> str:
    net, _ = fsdp.build_model_and_ema(small_net(), fsdp.make_mesh(world, 1), "fp32", 0)
    fsdp.compare_replicas(net, world, 1, "step 3")
    if world.rank == 1:
        weight = fsdp.local(net.out.weight.detach())
        weight.view(torch.int32)[0, 0] ^= 1
    try:
        fsdp.compare_replicas(net, world, 1, "step 4")
    except UserError as error:
        return str(error)
    return "not seen"


def test_replicas_that_differ_in_a_bit_are_seen():
    assert on_ranks(2, with_a_flipped_bit).startswith(
        "step 4: the weights of process 1 differ from those of its replica, process 0"
    )


def test_indivisible_shard_size_is_one_line():
    with pytest.raises(UserError, match=r"trainer.shard_size: 4 processes cannot form groups of 3"):
        fsdp.make_mesh(World(0, 4, torch.device("cpu")), 3)
