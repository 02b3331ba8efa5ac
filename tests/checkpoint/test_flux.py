"""FLUX weights: equality with diffusers' transformer, import and export under either set of names."""

import json

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file

from selfe.backbones.mmdit import MMDiT
from selfe.checkpoint import flux
from selfe.checkpoint.flux import FluxStateDict
from selfe.errors import UserError
from selfe.types import Packed, TextCond, packed
from tests.checkpoint.test_warm_start import written
from tests.method.test_mmdit import small

CONFIGURATIONS = [
    {"width": 48, "num_heads": 2, "rope_axes": (4, 8, 12), "num_double_blocks": 2, "num_single_blocks": 2},
    {"width": 128, "num_heads": 4, "rope_axes": (8, 12, 12), "num_double_blocks": 1, "num_single_blocks": 3},
    {"width": 96, "num_heads": 3, "rope_axes": (16, 8, 8), "num_double_blocks": 3, "num_single_blocks": 1},
]
DIMS = {"patch_dim": 8, "text_dim": 12, "pooled_dim": 6}
GRIDS, CAPTIONS = [(2, 9), (6, 4), (1, 1)], [3, 1, 7]


def random_net(seed: int = 0, **sizes) -> MMDiT:
    """A denoiser in which nothing is zero; weights as large as those of a trained one."""
    net = MMDiT(**DIMS | sizes)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in net.named_parameters():
        width = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.2
        offset = 1.0 if "norm" in name else 0.0
        parameter.data = offset + width * torch.randn(parameter.shape, generator=generator)
    return net


def peer_of(sizes: dict) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=8,
        num_layers=sizes["num_double_blocks"],
        num_single_layers=sizes["num_single_blocks"],
        attention_head_dim=sizes["width"] // sizes["num_heads"],
        num_attention_heads=sizes["num_heads"],
        joint_attention_dim=12,
        pooled_projection_dim=6,
        axes_dims_rope=sizes["rope_axes"],
    )


def batch() -> tuple[Packed, torch.Tensor, TextCond]:
    generator = torch.Generator().manual_seed(1)
    x = packed(torch.randn(sum(h * w for h, w in GRIDS), 8, generator=generator), GRIDS)
    text = packed(torch.randn(sum(CAPTIONS), 12, generator=generator), [(1, n) for n in CAPTIONS])
    return x, torch.tensor([0.9, 0.5, 0.2]), TextCond(text, torch.randn(3, 6, generator=generator))


@pytest.mark.parametrize("sizes", CONFIGURATIONS)
def test_equals_diffusers_flux(sizes):
    """Without the second clock, output and input gradient are those of diffusers' FluxTransformer2DModel."""
    net, peer = random_net(s_branch=False, **sizes), peer_of(sizes)
    peer.load_state_dict(written(net, "diffusers"))
    x, t, cond = batch()
    x.tokens.requires_grad_()
    ours = net(x, t, t / 2, cond)
    (gradient,) = torch.autograd.grad(ours.sin().sum(), x.tokens)
    for i, (v, grad) in enumerate(zip(x.with_tokens(ours).split(), x.with_tokens(gradient).split(), strict=True)):
        tokens = x.split()[i].detach()[None].requires_grad_()
        rows, columns = x.grids[i]
        theirs = peer(
            hidden_states=tokens,
            encoder_hidden_states=cond.text.split()[i][None],
            pooled_projections=cond.pooled[[i]],
            timestep=t[[i]],
            img_ids=torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)).float(),
            txt_ids=torch.zeros(CAPTIONS[i], 3),
            return_dict=False,
        )[0]
        assert v.abs().max() > 0.1
        torch.testing.assert_close(v, theirs[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(grad, torch.autograd.grad(theirs.sin().sum(), tokens)[0][0], rtol=0, atol=1e-5)


def test_names_of_black_forest_labs_are_those_that_diffusers_converts():
    """diffusers' own converter, which knows FLUX's width only, turns what we write under those names into the rest."""
    with torch.device("meta"):
        net = MMDiT(width=3072, num_heads=24, num_double_blocks=2, num_single_blocks=2, s_branch=False)
    generator = torch.Generator().manual_seed(0)
    # conversion only moves rows: one column will do
    thin = {name: torch.randn(len(p), 1, generator=generator) for name, p in net.named_parameters()}
    bfl, expected = (
        {k: v for name, rows in thin.items() for k, v in flux.split(style, name, rows, 3072).items()}
        for style in ("bfl", "diffusers")
    )
    converted = convert_flux_transformer_checkpoint_to_diffusers(bfl)
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("style", ["bfl", "diffusers"])
@pytest.mark.parametrize("layout", ["file", "shards", "folder"])
def test_import_then_export_gives_the_same_bytes(style, layout, tmp_path):
    net = small(dtype=torch.bfloat16)
    original = written(net, style)
    path = tmp_path / "flux.safetensors"
    if layout == "file":
        save_file(original, path)
    else:
        names = sorted(original)
        halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, part in halves.items():
            save_file({name: original[name] for name in part}, tmp_path / file)
        index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
        path = tmp_path / "flux.safetensors.index.json"
        path.write_text(json.dumps(index))
    found = FluxStateDict.of(tmp_path if layout == "folder" else path, {n: p.shape for n, p in net.named_parameters()})
    assert (found.style, found.missing, found.left_over) == (style, (), ())
    back = {}
    for name in found.used:
        back |= flux.split(style, name, found.read(name), 48)
    assert back.keys() == original.keys()
    for name, tensor in original.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name].view(torch.int16), tensor.view(torch.int16)), name


@pytest.mark.parametrize("style", ["bfl", "diffusers"])
def test_a_quantised_flux_is_refused(style, tmp_path):
    """Names and shapes fit, but the weights mean nothing without their scales. Plain fp8 has none and is taken."""
    net = small(dtype=torch.float32)
    wanted = {n: p.shape for n, p in net.named_parameters()}
    name = flux.names_in(style, "double_blocks.0.image.attention_out.weight")[0]
    original = written(net, style)
    path = tmp_path / "flux.safetensors"

    fp8 = original | {name: original[name].to(torch.float8_e4m3fn)}
    save_file(fp8, path)
    assert not FluxStateDict.of(path, wanted).missing

    scale = name.removesuffix("weight") + "scale_weight"
    save_file(fp8 | {scale: torch.ones(1), "scaled_fp8": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=f"{path}: {scale}: the weights are quantised; use the bf16, fp16 or fp32"):
        FluxStateDict.of(path, wanted)
    save_file(fp8 | {"scaled_fp8": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=f"{path}: scaled_fp8: the weights are quantised"):
        FluxStateDict.of(path, wanted)
    save_file(original | {name: original[name].to(torch.int8)}, path)
    with pytest.raises(UserError, match=f"{path}: {name}: stored as I8, the weights are quantised"):
        FluxStateDict.of(path, wanted)


def test_what_is_no_fitting_flux_file_is_one_line(tmp_path):
    net = small(dtype=torch.float32)
    wanted = {n: p.shape for n, p in net.named_parameters()}
    path = tmp_path / "flux.safetensors"
    with pytest.raises(UserError, match="no such file"):
        FluxStateDict.of(path, wanted)
    save_file({"conv.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="no tensor name is recognised"):
        FluxStateDict.of(path, wanted)
    save_file(written(random_net(**CONFIGURATIONS[1]), "diffusers"), path)
    with pytest.raises(UserError, match=r"x_embedder.weight is \(128, 8\), system.backbone expects \(48, 8\)"):
        FluxStateDict.of(path, wanted)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read"):
        FluxStateDict.of(path, wanted)
