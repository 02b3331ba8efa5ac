"""Optimizers: groups by name, and Muon against a plain reference, on any number of ranks and for fused weights."""

import math

import pytest
import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from selfe.backbones import lora
from selfe.distributed import fsdp
from selfe.distributed.collectives import World
from selfe.errors import UserError
from selfe.optimizers.adamw import AdamW
from selfe.optimizers.groups import GroupConfig
from selfe.optimizers.muon import COEFFICIENTS, Muon, orthogonal_update, orthogonalise
from selfe.rng import philox
from selfe.training.adapt import AdaptConfig
from tests.distributed.test_fsdp import perturb, small_net
from tests.helpers.ranks import on_ranks

SETTINGS = {"lr": 2e-3, "betas": (0.9, 0.95), "weight_decay": 0.05}
STEPS = 20


def build(optimizer: AdamW | Muon, net: torch.nn.Module) -> torch.optim.Optimizer:
    return optimizer.build(net, **SETTINGS, precision="fp32")


# ---- groups ----


def test_the_first_group_that_matches_a_name_counts():
    net = small_net()
    groups = (GroupConfig(("*.bias", "*norm*"), weight_decay=0.0), GroupConfig(("double_blocks.*",), lr_scale=0.5))
    optimizer = build(AdamW(groups), net)
    names = {id(p): name for name, p in net.named_parameters()}
    rest, no_decay, slower = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert no_decay == {name for name in names.values() if name.endswith(".bias") or "norm" in name}
    assert slower == {name for name in names.values() if name.startswith("double_blocks")} - no_decay
    assert rest == set(names.values()) - no_decay - slower
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0, 0.05]
    assert [group.get("lr_scale") for group in optimizer.param_groups] == [None, 1.0, 0.5]


def test_a_pattern_that_matches_nothing_is_refused_with_names_that_exist():
    with pytest.raises(UserError, match=r"groups\[0\].names: 'block\.\*' matches no parameter; .* image_in.weight,"):
        build(AdamW((GroupConfig(("block.*",)),)), small_net())
    with pytest.raises(UserError, match=r"params.adamw: 'modulations' matches no parameter"):
        build(Muon(adamw=("modulations",)), small_net())
    with pytest.raises(UserError, match=r"params.matrices: matches no matrix; use selfe.optimizers.adamw.AdamW"):
        build(Muon(matrices=("*.bias",)), small_net())


def test_muon_takes_the_matrices_of_a_fine_tuning_run_and_needs_some():
    """Low-rank matrices are matrices of their own; modulation, which it leaves to AdamW, may be frozen."""
    net = small_net()
    AdaptConfig(rank=3, trainable=("*.qk_norm.*",)).apply(net)
    names = {id(p): name for name, p in net.named_parameters()}
    others, orthogonal = ({names[id(p)] for p in group["params"]} for group in build(Muon(), net).param_groups)
    assert all(lora.is_low_rank(name) for name in orthogonal)
    assert others
    assert all(".qk_norm." in name for name in others)

    net = small_net()
    AdaptConfig(trainable=("s_in.*",)).apply(net)
    with pytest.raises(UserError, match=r"params.matrices: matches no matrix; use selfe.optimizers.adamw.AdamW"):
        build(Muon(), net)


def test_no_groups_are_torchs_adamw_of_all_parameters():
    (group,) = build(AdamW(), small_net()).param_groups
    assert len(group["params"]) == len(list(small_net().parameters()))
    assert "lr_scale" not in group
    assert group["fused"]


# ---- Muon ----


def test_orthogonalisation_brings_all_singular_values_near_one():
    for shape in ((32, 32), (16, 48), (48, 16)):
        matrix = torch.from_numpy(philox("matrix", shape).standard_normal(shape))
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        result = orthogonalise(matrix, 5)
        values = torch.linalg.svdvals(result)
        assert values.max() < 1.25
        assert values.min() > 0.6 or shape == (32, 32)  # a square random matrix has a singular value near 0
        # the singular vectors stay, and the values are those of the polynomial
        a, b, c = COEFFICIENTS
        s = s / s.square().sum().sqrt()
        for _ in range(5):
            s = a * s + b * s**3 + c * s**5
        torch.testing.assert_close(result, u * s @ v, rtol=0, atol=1e-9)
    assert (orthogonalise(torch.zeros(4, 4), 5) == 0).all()


def test_a_step_in_half_precision_is_that_of_torchs_muon():
    """Of one matrix, with torch's own correction of the learning rate; it computes in bf16, too."""
    start = torch.from_numpy(philox("start").standard_normal((24, 40), "float32"))
    net, peer = torch.nn.Linear(40, 24, bias=False), torch.nn.Linear(40, 24, bias=False)
    optimizer = Muon(matrices=("*",), adamw=()).build(net, **SETTINGS, precision="bf16")
    options = {"lr": SETTINGS["lr"], "weight_decay": SETTINGS["weight_decay"], "adjust_lr_fn": "match_rms_adamw"}
    reference = torch.optim.Muon(peer.parameters(), **options)
    with torch.no_grad():
        net.weight.copy_(start), peer.weight.copy_(start)
    for step in range(3):
        for module in (net, peer):
            module.weight.grad = torch.from_numpy(philox("gradient", step).standard_normal((24, 40), "float32"))
        optimizer.step(), reference.step()
    moved = (peer.weight.detach() - start).abs().max()
    torch.testing.assert_close(net.weight, peer.weight, rtol=0, atol=float(moved) * 0.01)


def test_fused_weights_are_updated_as_the_matrices_that_they_hold():
    """Queries, keys and values by rows; attention and MLP output by columns: as in a network that is not fused."""
    net = small_net()
    width, hidden = 48, 192
    for name, p in net.named_parameters():
        dim, sizes = net.matrices(name)
        assert p.ndim == 1 or not sizes or sum(sizes) == p.shape[dim], name
    assert net.matrices("single_blocks.0.qkv_mlp_in.weight") == (0, (width, width, width, hidden))
    assert net.matrices("single_blocks.0.attention_mlp_out.weight") == (1, (width, hidden))
    assert net.matrices("double_blocks.0.text.qkv_in.weight") == (0, (width, width, width))
    assert net.matrices("double_blocks.0.text.mlp.0.weight") == (0, ())

    full = torch.from_numpy(philox("fused").standard_normal((6, 10)))
    left, right = full[:, :6], full[:, 6:]
    expected = [0.2 * math.sqrt(6) * orthogonalise(left, 5), 0.2 * math.sqrt(6) * orthogonalise(right, 5)]
    assert torch.equal(orthogonal_update(full, 1, (6, 4), 5), torch.cat(expected, 1))


def plain_muon(net: torch.nn.Module, moments: dict, step: int) -> None:
    """The step of Muon and AdamW in double precision, written out."""
    lr, (beta1, beta2), decay = SETTINGS.values()
    for name, p in net.named_parameters():
        gradient = p.grad.double()
        weight = p.detach().double() * (1 - lr * decay)
        if "blocks" in name and p.ndim == 2 and "modulation" not in name:
            moments[name] = 0.95 * moments.get(name, 0) + 0.05 * gradient
            ahead = 0.05 * gradient + 0.95 * moments[name]
            weight -= lr * orthogonal_update(ahead, *net.matrices(name), 5)
        else:
            mean, square = moments.get(name, (0, 0))
            moments[name] = beta1 * mean + (1 - beta1) * gradient, beta2 * square + (1 - beta2) * gradient**2
            mean, square = moments[name][0] / (1 - beta1 ** (step + 1)), moments[name][1] / (1 - beta2 ** (step + 1))
            weight -= lr * mean / (square.sqrt() + 1e-8)
        p.data.copy_(weight)


def give_gradients(net: torch.nn.Module, step: int) -> None:
    """Gradients that depend on step and weights, the same on any number of ranks to the last bit.

    Those of a network differ by the order of its sums, and AdamW moves a weight whose gradient is as small as that
    difference by the learning rate, in either direction.
    """
    for name, p in net.named_parameters():
        noise = torch.from_numpy(philox("gradient", name, step).standard_normal(tuple(p.shape), "float32"))
        if isinstance(p, DTensor):
            noise = distribute_tensor(noise, p.device_mesh, p.placements, src_data_rank=None)
        p.grad = noise + p.detach()


def weights_after_20_steps(world: World, shard_size: int | None) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        net = small_net()
    net, _ = fsdp.build_model_and_ema(net, fsdp.make_mesh(world, shard_size), "fp32", 0)
    perturb(net, 0)
    optimizer = build(Muon(), net)
    for step in range(STEPS):
        give_gradients(net, step)
        optimizer.step()
    fsdp.compare_replicas(net, world, shard_size, "the end")
    return {name: p.full_tensor().detach() for name, p in net.named_parameters()}


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    net, moments = small_net(), {}
    perturb(net, 0)
    for step in range(STEPS):
        give_gradients(net, step)
        plain_muon(net, moments, step)
    return {name: p.detach() for name, p in net.named_parameters()}


def test_muon_after_20_steps_is_the_reference(reference, alone):
    weights, start = weights_after_20_steps(alone, None), small_net()
    perturb(start, 0)
    for name, p in start.named_parameters():
        assert (reference[name] - p).abs().max() > 1e-3, name
        torch.testing.assert_close(weights[name], reference[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("size", "shard_size"), [(2, None), (2, 1), (4, None), (4, 2)], ids=["2", "2x1", "4", "2x2"])
def test_muon_after_20_steps_is_the_reference_on_any_number_of_ranks(size, shard_size, reference):
    weights = on_ranks(size, weights_after_20_steps, shard_size)
    for name, expected in reference.items():
        torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-6)


def matrices_of_a_rank(world: World) -> torch.Tensor:
    """How many matrices this rank orthogonalises, gathered from all ranks."""
    with torch.device("meta"):
        net = small_net()
    net, _ = fsdp.build_model_and_ema(net, fsdp.make_mesh(world, 2), "fp32", 0)
    optimizer = build(Muon(), net)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    layouts, counted = optimizer.layouts, []

    class Counted(dict):
        def __getitem__(self, parameter: DTensor) -> tuple:
            counted.append(parameter)
            return super().__getitem__(parameter)

    optimizer.layouts = Counted(layouts)
    optimizer.step()
    everyone = [torch.zeros(1, dtype=torch.int64) for _ in range(world.size)]
    torch.distributed.all_gather(everyone, torch.tensor([len(counted)]))
    return torch.cat(everyone)


def test_each_rank_orthogonalises_a_share_of_the_matrices():
    """Of ten: four in each double block stream, two in the single block. Replicas share them, too."""
    assert sorted(on_ranks(4, matrices_of_a_rank).tolist()) == [2, 2, 3, 3]


# ---- moments in bf16 ----


def test_moments_in_bf16_are_torchs_adamw_up_to_their_rounding():
    """Computed in fp32: with values that bf16 holds exactly, the first step is that of fp32."""
    net, peer = small_net(), small_net()
    perturb(net, 0), perturb(peer, 0)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    low, full = build(AdamW(moments="bf16"), net), build(AdamW(), peer)
    for step in range(10):
        for module in (net, peer):
            for name, p in module.named_parameters():
                gradient = philox("gradient", name, step).standard_normal(tuple(p.shape), "float32")
                p.grad = torch.from_numpy(gradient).bfloat16().float()
        low.step(), full.step()
        if step == 0:
            for a, b in zip(net.parameters(), peer.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    for (name, a), b in zip(net.named_parameters(), peer.parameters(), strict=True):
        assert (a - b).abs().max() < 0.02 * (b - start[name]).abs().max(), name
        assert low.state[a]["exp_avg"].dtype == low.state[a]["exp_avg_sq"].dtype == torch.bfloat16


def test_moments_in_bf16_go_on_after_loading():
    """torch loads them as fp32; the next step brings them back, with the same values."""
    net = small_net()
    optimizer = build(AdamW(moments="bf16"), net)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    optimizer.load_state_dict(optimizer.state_dict())
    loaded = [state["exp_avg"] for state in optimizer.state.values()]
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(moments, loaded, strict=True))
    optimizer.step()
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.bfloat16}


def test_moments_that_bf16_could_not_change_are_refused():
    with pytest.raises(UserError, match=r"trainer.betas: 0.999 is too close to 1 for moments in bf16, .* at most 0.98"):
        AdamW(moments="bf16").build(small_net(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0, precision="fp32")
