"""The denoiser: sizes, packing and the second clock. Its equality with FLUX is in tests/checkpoint/test_flux.py."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from selfe.backbones.mmdit import MMDiT, rotate
from selfe.backbones.packing import PackedLayout, Segments, grid_rotation, one_hot
from selfe.types import Packed, TextCond, packed

SMALL = {"patch_dim": 8, "text_dim": 12, "pooled_dim": 6, "width": 48, "num_heads": 2, "rope_axes": (4, 8, 12)}
GRIDS, CAPTIONS = [(2, 3), (4, 4), (1, 1)], [3, 1, 7]


def small(seed: int = 0, dtype: torch.dtype = torch.float64, **changes) -> MMDiT:
    """A denoiser in which nothing is zero, so that every path shows."""
    net = MMDiT(**SMALL | {"num_double_blocks": 2, "num_single_blocks": 2} | changes).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return net


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Packed, torch.Tensor, torch.Tensor, TextCond]:
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    x = packed(randn(sum(h * w for h, w in GRIDS), 8), GRIDS)
    text = packed(randn(sum(CAPTIONS), 12), [(1, n) for n in CAPTIONS])
    return (
        x,
        torch.tensor([0.9, 0.5, 0.2], dtype=dtype),
        torch.tensor([0.4, 0.5, 0.0], dtype=dtype),
        TextCond(text, randn(3, 6)),
    )


@pytest.mark.parametrize(
    ("changes", "millions"),
    [
        ({"text_dim": 768, "width": 1024, "rope_axes": (8, 28, 28), "s_branch": False}, 560.246848),
        ({"width": 1024, "rope_axes": (8, 28, 28)}, 564.967488),
        ({}, 2247.716928),
    ],
)
def test_parameter_counts(changes, millions):
    with torch.device("meta"):
        net = MMDiT(**changes)
    assert sum(p.numel() for p in net.parameters()) == round(millions * 1e6)


def test_packed_samples_do_not_see_each_other():
    net, (x, t, s, cond) = small(), inputs()
    run_on_all_ranks = x.with_tokens(net(x, t, s, cond)).split()
    for i, v in enumerate(run_on_all_ranks):
        alone = net(x.select([i]), t[[i]], s[[i]], cond.select([i]))
        torch.testing.assert_close(v, alone, rtol=0, atol=1e-12)


def test_order_of_samples_does_not_matter():
    net, (x, t, s, cond) = small(), inputs()
    shuffle = [2, 0, 1]
    v = x.with_tokens(net(x, t, s, cond)).select(shuffle).tokens
    torch.testing.assert_close(
        net(x.select(shuffle), t[shuffle], s[shuffle], cond.select(shuffle)), v, rtol=0, atol=1e-12
    )


def test_every_input_and_parameter_matters():
    net, (x, t, s, cond) = small(), inputs()
    t.requires_grad_(), s.requires_grad_(), cond.pooled.requires_grad_(), cond.text.tokens.requires_grad_()
    net(x, t, s, cond).square().sum().backward()
    for tensor in (t, s, cond.pooled, cond.text.tokens, *net.parameters()):
        assert tensor.grad.abs().sum() > 0


@pytest.mark.parametrize("changes", [{}, {"s_branch": False}, {"mlp_ratio": 2.0, "learned_grid": (4, 4)}], ids=str)
def test_flops_by_formula_are_those_that_run(changes):
    net, (x, t, s, cond) = small(dtype=torch.float32, **changes), inputs(torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x, t, s, cond)
    assert net.flops(x.lens, cond.text.lens) == counter.get_total_flops()


def test_second_time_starts_from_its_difference():
    """s enters only as t - s: at s = t the second clock is a constant, whatever t."""
    net, (x, t, _, cond) = small(), inputs()
    plain = small(s_branch=False)
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("s_in")})
    zero = net.s_in(torch.cat([torch.ones(1, 128), torch.zeros(1, 128)], dim=1).double())
    plain.t_in[2].bias.data += zero[0].detach()
    torch.testing.assert_close(net(x, t, t, cond), plain(x, t, t, cond), rtol=0, atol=1e-12)


def test_initial_values_give_zero_velocity_and_depend_on_name_and_seed_alone():
    net = MMDiT(**SMALL)
    for name, parameter in net.named_parameters():
        parameter.data = net.initial(name, parameter.shape, seed=3)
    assert not net(*inputs(torch.float32)).any()
    name, shape = "double_blocks.0.image.qkv_in.weight", net.double_blocks[0].image.qkv_in.weight.shape
    assert torch.equal(net.initial(name, shape, 3), net.initial(name, shape, 3))
    assert not torch.equal(net.initial(name, shape, 3), net.initial(name, shape, 4))
    assert not torch.equal(net.initial(name, shape, 3), net.initial(name.replace("0", "1"), shape, 3))


def test_rope_is_relative():
    """Scores of rotated queries and keys depend on the difference of positions only."""
    rotation = grid_rotation((4, 5), (4, 8, 12), 10000.0, torch.float64)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 24, generator=generator, dtype=torch.float64).expand(20, 1, 24) for _ in range(2))
    q, k = (rotate(x, rotation)[:, 0] for x in (q, k))
    scores = (q @ k.T).reshape(4, 5, 4, 5)
    torch.testing.assert_close(scores[1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("device", ["cpu", "accelerator"])
def test_values_per_segment_have_the_gradient_of_finite_differences(device):
    """Both functions with a backward of their own, with sums over segments as on the CPU and on accelerators."""
    segments = Segments.of([2, 1, 3], torch.float64, torch.device("cpu"))
    assert segments.owner.tolist() == [0, 0, 1, 2, 2, 2]
    if device == "accelerator":
        segments = Segments(segments.owner, one_hot(segments.owner, 3, torch.float64))

    generator = torch.Generator().manual_seed(0)
    base, x = (torch.randn(6, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    factor = torch.randn(3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    torch.testing.assert_close(segments.addcmul(base, x, factor), base + x * segments.broadcast(factor))
    assert torch.autograd.gradcheck(segments.addcmul, (base, x, factor))
    assert torch.autograd.gradcheck(segments.broadcast, (factor,))


def test_calls_with_the_same_shapes_share_a_layout():
    """A sampling run makes it once."""
    net, (x, t, s, cond) = small(), inputs()
    before = PackedLayout.of.cache_info().misses
    for _ in range(3):
        net(x, t, s, cond)
    assert PackedLayout.of.cache_info().misses - before <= 1


def test_bad_axes_are_refused():
    with pytest.raises(ValueError, match="rope_axes"):
        MMDiT(width=64, num_heads=2, rope_axes=(4, 8, 12))
