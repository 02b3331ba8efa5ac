"""The denoiser: sizes, packing, the second time. Its equality with FLUX is in tests/checkpoint/test_flux.py."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from selfe.backbones.mmdit import MMDiT, modulate, rotate, sinusoid
from selfe.backbones.packing import PackedLayout, Segments, grid_rotation, one_hot
from selfe.errors import UserError
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


@pytest.mark.parametrize(
    "changes", [{}, {"s_branch": False}, {"mlp_ratio": 2.0, "learned_grid": (4, 4)}, {"bottleneck": 3}], ids=str
)
def test_flops_by_formula_are_those_that_run(changes):
    net, (x, t, s, cond) = small(dtype=torch.float32, **changes), inputs(torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x, t, s, cond)
    assert net.flops(x.lens, cond.text.lens) == counter.get_total_flops()


# ---- times per token, and features ----


class Head(torch.nn.Module):
    """A linear head."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.linear = torch.nn.Linear(width, out)

    def forward(self, features: torch.Tensor, x: Packed) -> torch.Tensor:
        return self.linear(features)

    def flops(self, num_tokens: int) -> int:
        return 2 * num_tokens * self.linear.weight.numel()


def test_times_per_token_that_are_equal_within_samples_give_the_result_of_times_per_sample():
    net, (x, t, s, cond) = small(), inputs()
    torch.testing.assert_close(net(x, t[x.owner], s[x.owner], cond), net(x, t, s, cond), rtol=0, atol=1e-12)


def test_times_per_token_have_the_gradients_of_times_per_sample():
    net, (x, t, s, cond) = small(), inputs()
    gradients = []
    for times in ((t, s), (t[x.owner], s[x.owner])):
        v = net(x, *times, cond)
        gradients.append(torch.autograd.grad((v * x.tokens).sum(), list(net.parameters())))
    for per_sample, per_token in zip(*gradients, strict=True):
        torch.testing.assert_close(per_token, per_sample, rtol=1e-10, atol=1e-10)


def test_the_time_of_a_token_acts_on_its_sample_alone():
    net, (x, t, s, cond) = small(), inputs()
    t, s = t[x.owner], s[x.owner]
    other = t.clone()
    other[7] = 0.1  # the second token of sample 1
    before, after = (x.with_tokens(net(x, times, s, cond)).split() for times in (t, other))
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(after[2], before[2], rtol=0, atol=1e-12)
    changes = (after[1] - before[1]).norm(dim=1)
    assert changes.argmax() == 1
    assert (changes > 0).all()  # by attention, and by the mean time of the text


def test_features_are_the_outputs_of_blocks_on_image_tokens():
    net, (x, t, s, cond) = small(), inputs()
    names = ("single_blocks.1", "double_blocks.0")
    v, features = net(x, t, s, cond, names)
    assert tuple(features) == names
    torch.testing.assert_close(v, net(x, t, s, cond), rtol=0, atol=0)

    # the output layer, applied to the feature of the last block, gives v
    emb = net.t_in(sinusoid(t)) + net.s_in(sinusoid(t - s)) + net.pooled_in(cond.pooled)
    shift, scale = net.out_modulation(torch.nn.functional.silu(emb)).chunk(2, dim=-1)
    layout = PackedLayout.of(x.grids, cond.text.grids, (4, 8, 12), 10000.0, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(net.out(modulate(features["single_blocks.1"], shift, scale, layout.image)), v)

    # a shallower network with the same weights ends at the other feature
    shallow = small(num_double_blocks=1, num_single_blocks=0)
    shallow.load_state_dict({k: v for k, v in net.state_dict().items() if k in shallow.state_dict()})
    expected = shallow(x, t, s, cond, ["double_blocks.0"])[1]["double_blocks.0"]
    torch.testing.assert_close(features["double_blocks.0"], expected, rtol=0, atol=1e-12)


def test_a_head_is_a_feature_and_its_parameters_are_initialised():
    net, (x, t, s, cond) = small(dtype=torch.float32), inputs(torch.float32)
    net.add_head("probe", "double_blocks.1", Head(48, 5))
    parameters = {name: p for name, p in net.named_parameters() if name.startswith("heads.")}
    for name, parameter in parameters.items():
        parameter.data = net.initial(name, parameter.shape, seed=0)
    assert [p.any().item() for p in parameters.values()] == [True, False]  # weight and bias

    _, features = net(x, t, s, cond, ["probe", "double_blocks.1"])
    assert torch.equal(features["probe"], features["double_blocks.1"] @ net.heads["probe"].linear.weight.T)


def test_unknown_features_and_layers_are_refused():
    net, arguments = small(), inputs()
    with pytest.raises(UserError, match=r"no feature double_blocks.2; it has double_blocks.0, double_blocks.1, single"):
        net(*arguments, ["double_blocks.2"])
    with pytest.raises(ValueError, match=r"no layer single_blocks.9"):
        net.add_head("probe", "single_blocks.9", Head(48, 5))


def test_flops_of_times_per_token_and_heads_are_those_that_run():
    net, (x, t, s, cond) = small(dtype=torch.float32), inputs(torch.float32)
    net.add_head("probe", "double_blocks.1", Head(48, 5))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x, t[x.owner], s[x.owner], cond, ["probe"])
    options = {"token_times": True, "features": ["probe"]}
    assert net.flops(x.lens, cond.text.lens, **options) == counter.get_total_flops()
    assert net.flops(x.lens, cond.text.lens, **options) > 1.2 * net.flops(x.lens, cond.text.lens)


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


def test_a_network_that_predicts_x0_returns_the_velocity_to_it():
    """v = (x_t - x0_hat) / max(t, 0.05), with times per sample or per token."""
    net, (x, _, s, cond) = small(), inputs()
    pixels = small(prediction="x0")
    pixels.load_state_dict(net.state_dict())
    t = torch.tensor([0.9, 0.5, 0.02], dtype=torch.float64)
    x0_hat = net(x, t, s * 0, cond)
    expected = (x.tokens - x0_hat) / torch.tensor([0.9, 0.5, 0.05], dtype=torch.float64)[x.owner][:, None]
    torch.testing.assert_close(pixels(x, t, s * 0, cond), expected)
    torch.testing.assert_close(pixels(x, t[x.owner], (s * 0)[x.owner], cond), expected)


def test_a_bottleneck_is_a_product_of_two_matrices_at_the_input():
    net, (x, t, s, cond) = small(bottleneck=3), inputs()
    assert [tuple(p.shape) for name, p in net.named_parameters() if "image_in" in name] == [(3, 8), (48, 3), (48,)]
    plain = small()
    state = {name: value for name, value in net.state_dict().items() if "image_in" not in name}
    down, up = net.image_in[0].weight, net.image_in[1]
    plain.load_state_dict(state | {"image_in.weight": up.weight @ down, "image_in.bias": up.bias})
    torch.testing.assert_close(net(x, t, s, cond), plain(x, t, s, cond))


def test_bad_axes_are_refused():
    with pytest.raises(ValueError, match="rope_axes"):
        MMDiT(width=64, num_heads=2, rope_axes=(4, 8, 12))
