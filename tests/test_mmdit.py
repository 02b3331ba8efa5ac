"""The denoiser: sizes, packing, the second clock, and equality with diffusers' FLUX transformer."""

import pytest
import torch
from diffusers import FluxTransformer2DModel

from selfe.backbones.mmdit import MMDiT, grid_angles, rotate
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
    together = x.with_tokens(net(x, t, s, cond)).split()
    for i, v in enumerate(together):
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


def test_second_clock_starts_from_its_difference():
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
    angles = grid_angles((4, 5), (4, 8, 12), 10000.0)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 24, generator=generator, dtype=torch.float64).expand(20, 1, 24) for _ in range(2))
    q, k = (rotate(x, angles.cos()[:, None], angles.sin()[:, None])[:, 0] for x in (q, k))
    scores = (q @ k.T).reshape(4, 5, 4, 5)
    torch.testing.assert_close(scores[1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1], rtol=0, atol=1e-12)


def test_bad_axes_are_refused():
    with pytest.raises(ValueError, match="rope_axes"):
        MMDiT(width=64, num_heads=2, rope_axes=(4, 8, 12))


def test_equals_diffusers_flux():
    """Without the second clock, output and input gradient are those of diffusers' FluxTransformer2DModel."""
    net = small(dtype=torch.float32, s_branch=False)
    peer = FluxTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=24,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=6,
        guidance_embeds=False,
        axes_dims_rope=(4, 8, 12),
    )
    peer.load_state_dict(to_diffusers(net.state_dict()))
    x, t, s, cond = inputs(torch.float32)
    x.tokens.requires_grad_()
    ours = net(x, t, s, cond)
    (gradient,) = torch.autograd.grad(ours.sin().sum(), x.tokens)
    parts = zip(x.with_tokens(ours).split(), x.with_tokens(gradient).split(), strict=True)
    for i, (v, grad) in enumerate(parts):
        tokens = x.split()[i].detach()[None].requires_grad_()
        rows, columns = x.grids[i]
        position = (
            torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)).reshape(-1, 3).float()
        )
        theirs = peer(
            hidden_states=tokens,
            encoder_hidden_states=cond.text.split()[i][None],
            pooled_projections=cond.pooled[[i]],
            timestep=t[[i]],
            img_ids=position,
            txt_ids=torch.zeros(CAPTIONS[i], 3),
            return_dict=False,
        )[0]
        torch.testing.assert_close(v, theirs[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad, torch.autograd.grad(theirs.sin().sum(), tokens)[0][0], rtol=1e-5, atol=1e-5)


def to_diffusers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names and fused projections as diffusers writes them."""
    out = {}

    def put(name: str, ours: str, part: slice = slice(None)) -> None:
        for kind in ("weight", "bias"):
            if f"{ours}.{kind}" in state:
                out[f"{name}.{kind}"] = state[f"{ours}.{kind}"][part]

    for name, ours in {"x_embedder": "image_in", "context_embedder": "text_in", "proj_out": "out"}.items():
        put(name, ours)
    for name, ours in {"timestep_embedder": "t_in", "text_embedder": "pooled_in"}.items():
        put(f"time_text_embed.{name}.linear_1", f"{ours}.0")
        put(f"time_text_embed.{name}.linear_2", f"{ours}.2")
    for kind in ("weight", "bias"):
        shift, scale = state[f"out_modulation.{kind}"].chunk(2)
        out[f"norm_out.linear.{kind}"] = torch.cat([scale, shift])
    w = 48
    for n in range(2):
        ours, name = f"double_blocks.{n}", f"transformer_blocks.{n}"
        for half, suffix, qkv in (
            ("image", "", ("to_q", "to_k", "to_v")),
            ("text", "_context", ("add_q_proj", "add_k_proj", "add_v_proj")),
        ):
            put(f"{name}.norm1{suffix}.linear", f"{ours}.{half}.modulation")
            for i, part in enumerate(qkv):
                put(f"{name}.attn.{part}", f"{ours}.{half}.qkv_in", slice(i * w, (i + 1) * w))
            added = "added_" if suffix else ""
            put(f"{name}.attn.norm_{added}q", f"{ours}.{half}.qk_norm.q_norm")
            put(f"{name}.attn.norm_{added}k", f"{ours}.{half}.qk_norm.k_norm")
            put(f"{name}.attn.to_add_out" if suffix else f"{name}.attn.to_out.0", f"{ours}.{half}.attention_out")
            put(f"{name}.ff{suffix}.net.0.proj", f"{ours}.{half}.mlp.0")
            put(f"{name}.ff{suffix}.net.2", f"{ours}.{half}.mlp.2")
        ours, name = f"single_blocks.{n}", f"single_transformer_blocks.{n}"
        put(f"{name}.norm.linear", f"{ours}.modulation")
        for i, part in enumerate(("to_q", "to_k", "to_v")):
            put(f"{name}.attn.{part}", f"{ours}.qkv_mlp_in", slice(i * w, (i + 1) * w))
        put(f"{name}.proj_mlp", f"{ours}.qkv_mlp_in", slice(3 * w, None))
        put(f"{name}.attn.norm_q", f"{ours}.qk_norm.q_norm")
        put(f"{name}.attn.norm_k", f"{ours}.qk_norm.k_norm")
        put(f"{name}.proj_out", f"{ours}.attention_mlp_out")
    return out
