"""Training aids around an objective: TREAD, REPA, Self-Flow."""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from selfe import cli, config
from selfe.backbones.mmdit import MMDiT
from selfe.distributed import fsdp
from selfe.distributed.collectives import World
from selfe.encoders.hf_vision import HFVision
from selfe.errors import UserError
from selfe.generator import Generator
from selfe.objectives.flow_matching import FlowMatching
from selfe.objectives.heads import ConvHead, MlpHead
from selfe.objectives.repa import Repa, normalise
from selfe.objectives.self_evaluation import SelfEvaluation
from selfe.objectives.self_flow import SelfFlow, mask_tokens
from selfe.objectives.tread import Tread, choose_tokens
from selfe.rng import SampleRNG, philox
from selfe.tools import precompute
from selfe.types import Packed, Route, TextCond
from tests.distributed.test_fsdp import GRIDS, encode, latents, perturb, small_net
from tests.helpers.ranks import on_ranks
from tests.helpers.train_processes import ROOT, TINY, copy_until, files, finish, lines
from tests.method.test_mmdit import inputs, small

RNG = SampleRNG.of_step(0, 5, range(3))


def objective_inputs(dtype: torch.dtype = torch.float64) -> tuple:
    """x0 and conditioning of three samples, for an objective that asks for `cond` alone."""
    x, _, _, cond = inputs(dtype)
    return x, {"cond": cond}


# ---- TREAD ----


@pytest.mark.parametrize("per_token", [False, True], ids=["times per sample", "times per token"])
@pytest.mark.parametrize(
    ("first", "last"),
    [
        ("double_blocks.0", "double_blocks.1"),
        ("double_blocks.1", "single_blocks.0"),
        ("single_blocks.0", "single_blocks.1"),
    ],
)
def test_a_route_without_skipped_tokens_changes_nothing(first, last, per_token):
    net, (x, t, s, cond) = small(), inputs()
    if per_token:
        t, s = t[x.owner], s[x.owner]
    route = Route(first, last, tuple(torch.arange(n) for n in x.lens))
    torch.testing.assert_close(net(x, t, s, cond, (), route), net(x, t, s, cond), rtol=0, atol=1e-12)


def test_skipped_tokens_pass_the_other_blocks_only():
    """With all blocks in the route, a skipped token is what enters the first block."""
    net, (x, t, s, cond) = small(), inputs()
    kept = (torch.tensor([0, 3]), torch.arange(16), torch.tensor([0]))
    v = net(x, t, s, cond, (), Route("double_blocks.0", "single_blocks.1", kept))

    empty = small(num_double_blocks=0, num_single_blocks=0)
    empty.load_state_dict({k: v for k, v in net.state_dict().items() if k in empty.state_dict()})
    skipped = [1, 2, 4, 5]
    torch.testing.assert_close(v[skipped], empty(x, t, s, cond)[skipped], rtol=0, atol=1e-12)

    # samples without skipped tokens are unchanged, and kept tokens do not see skipped ones
    torch.testing.assert_close(v[6:], net(x, t, s, cond)[6:], rtol=0, atol=1e-12)
    changed = x.tokens.clone()
    changed[1] += 1
    other = net(x.with_tokens(changed), t, s, cond, (), Route("double_blocks.0", "single_blocks.1", kept))
    torch.testing.assert_close(other[[0, 3]], v[[0, 3]], rtol=0, atol=1e-12)
    assert not torch.allclose(other[1], v[1])


def test_flops_of_a_route_fall_and_are_those_that_run():
    net, (x, t, s, cond) = small(dtype=torch.float32), inputs(torch.float32)
    route = Route("double_blocks.1", "single_blocks.0", choose_tokens(x, RNG, 0.5))
    for times in ((t, s), (t[x.owner], s[x.owner])):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(x, *times, cond, (), route)
        options = {"token_times": len(times[0]) != 3}
        assert net.flops(x.lens, cond.text.lens, **options, route=route) == counter.get_total_flops()
        assert counter.get_total_flops() < 0.9 * net.flops(x.lens, cond.text.lens, **options)


def test_the_choice_of_tokens_is_a_function_of_step_and_sample():
    x, _, _, _ = inputs()
    kept = choose_tokens(x, RNG, 0.5)
    assert [len(indices) for indices in kept] == [3, 8, 1]
    assert all((np.diff(indices) > 0).all() for indices in kept)
    alone = choose_tokens(x.select([1]), RNG.select([1]), 0.5)
    assert torch.equal(alone[0], kept[1])
    assert not torch.equal(choose_tokens(x, SampleRNG.of_step(0, 6, range(3)), 0.5)[1], kept[1])


def test_tread_routes_training_and_not_validation():
    net, (x0, conds) = small(), objective_inputs()
    routes = []

    def recorded(x_t, t, s, cond, features=(), route=None):
        routes.append(route)
        return net(x_t, t, s, cond, features, route)

    plain, routed = FlowMatching(), Tread(FlowMatching(), "double_blocks.1", "single_blocks.0", skip=0.5)
    routed.prepare(net)
    with torch.no_grad():
        validated = routed(recorded, net, x0, conds, RNG, 5).per_sample
        torch.testing.assert_close(validated, plain(net, net, x0, conds, RNG, 5).per_sample, rtol=0, atol=0)
    loss = routed(recorded, net, x0, conds, RNG, 5)
    assert [route is None for route in routes] == [True, False]
    assert not torch.allclose(loss.per_sample, validated)
    loss.per_sample.mean().backward()
    assert net.single_blocks[0].modulation.weight.grad.abs().sum() > 0


def test_tread_leaves_the_passes_of_self_evaluation_complete():
    """Those without gradient, and the auxiliary one of the evaluated samples."""
    net, (x, _, _, cond) = small(), inputs()
    x0, cond = x.select([0, 1]), cond.select([0, 1])
    objective = Tread(SelfEvaluation(tau_steps=1, aux_start_step=1), "double_blocks.0", "double_blocks.1")
    routes = []

    def recorded(x_t, t, s, cond, features=(), route=None):
        routes.append(None if route is None else route.lens)
        return net(x_t, t, s, cond, features, route)

    one = cond.select([1])
    conds = {"cond": cond, "null": TextCond(one.text, one.pooled), "fake": one}
    objective(recorded, recorded, x0, conds, SampleRNG.of_step(0, 9, range(2)), 9)
    assert routes == [(3, 8), None, None, None]


def test_blocks_of_a_route_are_checked():
    for first, last, words in (
        ("double_blocks.7", "single_blocks.0", "the backbone has no block double_blocks.7; its blocks are double_bl"),
        ("single_blocks.0", "double_blocks.1", "first block single_blocks.0 comes after last block double_blocks.1"),
    ):
        with pytest.raises(ValueError, match=words):
            Tread(FlowMatching(), first, last).prepare(small())
    net, (x, t, s, cond) = small(), inputs()
    route = Route("double_blocks.0", "double_blocks.1", choose_tokens(x, RNG, 0.5))
    with pytest.raises(UserError, match=r"feature double_blocks.1 is inside of the blocks double_blocks.0 to double_b"):
        net(x, t, s, cond, ["double_blocks.1"], route)


# ---- REPA ----


def repa(**options) -> Repa:
    """Around flow matching, with features of 5 channels."""
    encoder = HFVision("none", feature_dim=5, skip_pretrained=True)
    return Repa(FlowMatching(), encoder, "double_blocks.0", **{"hidden": 7} | options)


def prepared(objective: Repa | SelfFlow, dtype: torch.dtype = torch.float64) -> MMDiT:
    """A denoiser with the heads of an objective, and random weights."""
    net = small(dtype=dtype)
    objective.prepare(net)
    net.to(dtype)
    for name, parameter in net.named_parameters():
        if name.startswith("heads."):
            parameter.data = torch.from_numpy(philox(name).standard_normal(tuple(parameter.shape))).to(dtype)
    return net


def image_features(x0: Packed, seed: int = 3) -> Packed:
    values = philox("features", seed).standard_normal((len(x0.tokens), 5))
    return x0.with_tokens(torch.from_numpy(values).to(x0.tokens.dtype))


@pytest.mark.parametrize("options", [{}, {"head": "conv", "spatial_norm": 1.0}], ids=["REPA", "iREPA"])
def test_repa_subtracts_the_cosine_of_the_projected_layer_and_the_features(options):
    objective = repa(weight=0.3, **options)
    net, (x0, conds) = prepared(objective), objective_inputs()
    features = image_features(x0)
    loss = objective(net, net, x0, conds, RNG, 5, features=features)

    # the same layer, taken from outside
    layers = []

    def recorded(x_t, t, s, cond):
        v, outputs = net(x_t, t, s, cond, ["double_blocks.0"])
        layers.append(outputs["double_blocks.0"])
        return v

    plain = FlowMatching()(recorded, net, x0, conds, RNG, 5)
    head, expected = net.heads["repa"], []
    for layer, target, grid in zip(x0.with_tokens(layers[0]).split(), features.split(), x0.grids, strict=True):
        if options:
            projected = head.conv(layer.T.unflatten(1, grid)[None])[0].flatten(1).T
            target = (target - target.mean(dim=0)) / (target.std(dim=0, correction=0) + 1e-6)
        else:
            projected = head.layers(layer)
        expected.append(F.cosine_similarity(projected, target, dim=1).mean())
    torch.testing.assert_close(loss.per_sample, plain.per_sample - 0.3 * torch.stack(expected))
    assert torch.equal(loss.metrics["data_loss"], plain.metrics["data_loss"])
    assert loss.metrics["repa_cosine"].shape == (3,)


def test_spatial_normalisation_removes_a_share_of_the_mean():
    x0, _ = objective_inputs()
    features = image_features(x0)
    for gamma in (0.0, 0.5, 1.0):
        for before, after in zip(features.split()[:2], normalise(features, gamma).split()[:2], strict=True):
            torch.testing.assert_close(after.std(dim=0, correction=0), torch.ones(5).double(), rtol=1e-4, atol=0)
            scaled_mean = (1 - gamma) * before.mean(dim=0) / before.std(dim=0, correction=0)
            torch.testing.assert_close(after.mean(dim=0), scaled_mean, rtol=1e-4, atol=1e-6)


def test_repa_changes_neither_validation_nor_the_steps_after_its_last():
    objective = repa(stop_step=9)
    net, (x0, conds) = prepared(objective), objective_inputs()
    plain = FlowMatching()(net, net, x0, conds, RNG, 5).per_sample
    with torch.no_grad():
        assert torch.equal(objective(net, net, x0, conds, RNG, 5).per_sample, plain)
    assert torch.equal(objective(net, net, x0, conds, RNG, 9).per_sample, plain)
    assert [objective.phase(step) for step in (8, 9)] == ["flow matching with REPA", "flow matching"]
    with pytest.raises(UserError, match="no stored image features"):
        objective(net, net, x0, conds, RNG, 8)


def test_aids_can_be_combined():
    """The head of REPA on a block before the route of TREAD, in either order."""
    x0, conds = objective_inputs()
    inner = Repa(Tread(FlowMatching(), "double_blocks.1", "single_blocks.0"), repa().encoder, "double_blocks.0")
    outer = Tread(repa(hidden=2048), "double_blocks.1", "single_blocks.0")
    losses = []
    for objective in (inner, outer):
        net = prepared(objective)
        losses.append(objective(net, net, x0, conds, RNG, 5, features=image_features(x0)).per_sample)
    assert torch.equal(*losses)
    assert outer.wants_features
    assert outer.feature_encoder.feature_dim == 5


def test_mistakes_of_aids_are_one_line():
    net = small()
    encoder = repa().encoder
    with pytest.raises(ValueError, match=r"no block double_blocks.9; its blocks are double_blocks.0"):
        Repa(FlowMatching(), encoder, "double_blocks.9").prepare(net)
    with pytest.raises(ValueError, match=r"no block top; its blocks are"):
        SelfFlow("double_blocks.0", "top").prepare(net)
    with pytest.raises(ValueError, match="already aligned"):
        Repa(repa(), encoder, "double_blocks.0")
    with pytest.raises(ValueError, match=r"mask_ratio must be between 0 and 0.5"):
        SelfFlow("double_blocks.0", "double_blocks.1", mask_ratio=0.6)


@pytest.mark.parametrize("head", [MlpHead(48, 7, 5), ConvHead(48, 5)], ids=["mlp", "conv"])
def test_flops_of_heads_are_those_that_run(head):
    x, _, _, _ = inputs(torch.float32)
    with FlopCounterMode(display=False) as counter:
        head(torch.zeros(len(x.tokens), 48), x)
    assert head.flops(len(x.tokens)) == counter.get_total_flops()


# ---- vision encoders ----

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
SIZES |= {"image_size": 8, "patch_size": 2}
VISION = {
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES)),
    "dinov2 with registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3)
    ),
    "dinov3": lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SIZES, num_register_tokens=3)),
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**SIZES), add_pooling_layer=False),
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES)),
    "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES)),
}


def vision_folder(folder: Path, kind: str) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        VISION[kind]().save_pretrained(folder)
    statistics = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    return folder


@pytest.mark.parametrize("kind", VISION)
def test_features_are_the_patch_tokens_of_transformers(kind, tmp_path):
    encoder = HFVision(str(vision_folder(tmp_path, kind)), feature_dim=16, dtype="fp32")
    encoder.load(torch.device("cpu"))
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    wide = torch.zeros(3, 12, 20)
    features = encoder([image, wide, image], [(4, 4), (3, 5), (4, 4)])  # 8 x 8 pixels are 4 x 4 patches
    assert features.grids == ((4, 4), (3, 5), (4, 4))

    net = VISION[kind]().from_pretrained(tmp_path).eval()
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    with torch.no_grad():
        states = net(pixel_values=(((image + 1) / 2 - mean) / std)[None]).last_hidden_state[0]
    first, _, third = features.split()
    torch.testing.assert_close(first, states[-16:], rtol=0, atol=1e-5)
    assert torch.equal(first, third)


def test_folders_that_are_no_vision_model_are_one_line(tmp_path):
    folder = vision_folder(tmp_path / "vit", "vit")
    with pytest.raises(UserError, match=r"the model has hidden_size 16; set feature_dim to it"):
        HFVision(str(folder), feature_dim=12).load(torch.device("cpu"))
    with pytest.raises(UserError, match=r"no such folder; download it with selfe cache-pretrained --vision-model a/b"):
        HFVision("a/b", cache_dir=tmp_path).load(torch.device("cpu"))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"preprocessor_config.json: no such file"):
        HFVision(str(folder), feature_dim=16).load(torch.device("cpu"))

    text = tmp_path / "text"
    transformers.BertModel(
        transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ).save_pretrained(text)
    (text / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    with pytest.raises(UserError, match=r"not a vision transformer: its config has no patch_size"):
        HFVision(str(text), feature_dim=16).load(torch.device("cpu"))


# ---- Self-Flow ----


def test_self_flow_is_two_noise_levels_and_the_features_of_the_ema_denoiser():
    objective = SelfFlow("double_blocks.0", "single_blocks.1", weight=0.7, mask_ratio=0.5, hidden=7)
    net, ema, (x0, conds) = prepared(objective), small(seed=1), objective_inputs()
    calls = []

    def recorded(name, network):
        def call(x_t, t, s, cond, features=()):
            calls.append((name, x_t, t, s, features))
            return network(x_t, t, s, cond, features)

        return call

    loss = objective(recorded("net", net), recorded("ema", ema), x0, conds, RNG, 5)
    (_, x_t, t, s, _), (_, x_lower, lower, _, _) = calls
    assert [(name, features) for name, *_, features in calls] == [
        ("net", ("self_flow",)),
        ("ema", ("single_blocks.1",)),
    ]
    assert torch.equal(t, s)

    # half of the tokens of a sample have one time, the others another one; the EMA denoiser gets the lower one
    noise = RNG.normal_like("noise", x0)
    for times, n, low in zip(x0.with_tokens(t).split(), x0.lens, lower, strict=True):
        values, counts = times.unique(return_counts=True)
        assert counts.tolist() == {6: [3, 3], 16: [8, 8], 1: [1]}[n]
        assert low <= values.min()
    torch.testing.assert_close(x_t.tokens, (1 - t)[:, None] * x0.tokens + t[:, None] * noise)
    each = lower[x0.owner][:, None]
    torch.testing.assert_close(x_lower.tokens, (1 - each) * x0.tokens + each * noise)

    # the loss from its parts
    v, features = net(x_t, t, t, conds["cond"], ["self_flow"])
    target = ema(x_lower, lower, lower, conds["cond"], ["single_blocks.1"])[1]["single_blocks.1"]
    expected = []
    for i in range(3):
        error, a, b = (
            x0.with_tokens(part).split()[i] for part in (v - noise + x0.tokens, features["self_flow"], target)
        )
        expected.append(error.square().mean() - 0.7 * F.cosine_similarity(a, b, dim=1).mean())
    torch.testing.assert_close(loss.per_sample, torch.stack(expected))

    loss.per_sample.sum().backward()
    assert net.heads["self_flow"].layers[0].weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in ema.parameters())


def test_the_validation_of_self_flow_is_flow_matching():
    objective = SelfFlow("double_blocks.0", "single_blocks.1", hidden=7)
    net, (x0, conds) = prepared(objective), objective_inputs()
    with torch.no_grad():
        expected = FlowMatching()(net, net, x0, conds, RNG, 5).per_sample
        assert torch.equal(objective(net, net, x0, conds, RNG, 5).per_sample, expected)


def test_the_mask_is_a_function_of_step_and_sample():
    x, _, _, _ = inputs()
    mask = mask_tokens(x, RNG, 0.25)
    assert [part.sum().item() for part in x.with_tokens(mask).split()] == [2, 4, 0]
    assert torch.equal(mask_tokens(x.select([1]), RNG.select([1]), 0.25), x.with_tokens(mask).split()[1])


# ---- two ranks ----


def sharded_aid(name: str) -> Tread | Repa | SelfFlow:
    encoder = HFVision("none", feature_dim=5, skip_pretrained=True)
    return {
        "tread": lambda: Tread(SelfEvaluation(tau_steps=5, aux_start_step=5), "double_blocks.0", "single_blocks.0"),
        "repa": lambda: Repa(SelfEvaluation(tau_steps=5, aux_start_step=5), encoder, "double_blocks.0", hidden=7),
        "irepa": lambda: Repa(FlowMatching(), encoder, "single_blocks.0", head="conv", spatial_norm=0.5),
        "self_flow": lambda: SelfFlow("double_blocks.0", "single_blocks.0", hidden=7),
    }[name]()


def aid_gradients(
    net: torch.nn.Module, ema: torch.nn.Module, aid, ranks: tuple[int, int], micro: int
) -> dict[str, Tensor]:
    """Gradients of the mean loss over a rank's share of eight samples, in micro-batches."""
    perturb(net, 0), perturb(ema, 1)
    rank, size = ranks
    share = len(GRIDS) // size
    for first in range(rank * share, (rank + 1) * share, micro):
        rows = range(first, first + micro)
        rng, x0 = SampleRNG.of_step(0, 5, rows), latents(rows)
        conds = {key: encode(c) for key, c in aid.captions([f"prompt {row}" for row in rows], rng, 5).items()}
        stored = {}
        if getattr(aid, "wants_features", False):
            values = [philox("y", row).standard_normal((n, 5), "float32") for row, n in zip(rows, x0.lens, strict=True)]
            stored = {"features": x0.with_tokens(torch.from_numpy(np.concatenate(values)))}
        loss = aid(net, ema, x0, conds, rng, 5, **stored)
        (loss.per_sample.mean() * micro / share).backward()
    gradients = {}
    for name, parameter in net.named_parameters():
        gradient = parameter.grad
        gradients[name] = gradient.full_tensor().clone() if isinstance(gradient, DTensor) else gradient
    return gradients


def gradients_of_aids(world: World, names: Sequence[str]) -> dict[str, Tensor]:
    gradients, mesh = {}, fsdp.make_mesh(world, None)
    for name in names:
        aid = sharded_aid(name)
        with torch.device("meta"):
            net = small_net()
            aid.prepare(net)
        net, ema = fsdp.build_model_and_ema(net, mesh, "fp32", 0, activation_checkpointing=name == "tread")
        found = aid_gradients(net, ema, aid, (world.rank, world.size), micro=2)
        gradients |= {f"{name} {parameter}": gradient for parameter, gradient in found.items()}
    return gradients


def test_gradients_of_aids_on_two_ranks_equal_those_of_one():
    names = ("tread", "repa", "irepa", "self_flow")
    sharded = on_ranks(2, gradients_of_aids, names)
    for name in names:
        aid, net = sharded_aid(name), small_net()
        aid.prepare(net)
        ema = small_net()
        aid.prepare(ema)
        single = aid_gradients(net, ema.requires_grad_(False), aid, (0, 1), micro=8)
        assert any(parameter.startswith("heads.") for parameter in single) == (name != "tread")
        for parameter, gradient in single.items():
            assert gradient.abs().max() > 0, (name, parameter)
            torch.testing.assert_close(sharded[f"{name} {parameter}"], gradient, rtol=0, atol=1e-6)


# ---- complete runs ----

ENCODER = {"module": "selfe.encoders.hf_vision.HFVision"}
ENCODER["params"] = {"model": "none", "skip_pretrained": True, "feature_dim": 6, "dtype": "fp32"}


def aid_config(folder: Path, aid: dict) -> Path:
    """The tiny system with an aid around its objective, or in its place."""
    path = folder / "aid.yaml"
    path.write_text(json.dumps({"base": str(TINY), "system": {"objective": aid}}))
    return path


def trained_on_two_ranks(folder: Path, path: Path) -> Path:
    """Three steps, and the last of them again from the checkpoint of the second; returns the last checkpoint."""
    finish(folder / "once", 2, "trainer.stop_step=3", config=path)
    copy_until(Path("checkpoints/step_00000002"), folder / "once", folder / "resumed")
    finish(folder / "resumed", 2, "trainer.stop_step=3", config=path)
    checkpoint = Path("checkpoints/step_00000003")
    assert files(folder / "once" / checkpoint) == files(folder / "resumed" / checkpoint)
    assert lines(folder / "once")[-1] == lines(folder / "resumed")[-1]
    return folder / "once" / checkpoint


def test_repa_and_tread_train_from_a_cache_resume_and_are_exported(tmp_path, monkeypatch, alone):
    monkeypatch.setenv("SELFE_SKIP_PRETRAINED", "1")
    monkeypatch.chdir(ROOT)
    inner = {"module": "selfe.objectives.self_evaluation.SelfEvaluation", "params": {"tau_steps": 4}}
    tread = {"objective": inner, "first": "double_blocks.0", "last": "double_blocks.0"}
    repa = {"objective": {"module": "selfe.objectives.tread.Tread", "params": tread}, "encoder": ENCODER}
    repa |= {"layer": "single_blocks.0", "hidden": 8}
    path = aid_config(tmp_path, {"module": "selfe.objectives.repa.Repa", "params": repa})

    # without a cache: one line
    plain = config.load(path)
    with torch.device("meta"):
        system = config.build(plain, "system")
    with pytest.raises(UserError, match=r"needs stored image features; run selfe precompute CONFIG --out FOLDER"):
        system.check_data(config.build(plain, "data"))

    options = argparse.Namespace(workers=0, batch_size=4, one_sample=False)
    precompute.encode_all(plain, tmp_path / "cache", options, alone)
    checkpoint = trained_on_two_ranks(tmp_path, tmp_path / "cache/config.yaml")
    assert 0 < abs(lines(tmp_path / "once")[-1]["train/repa_cosine"]) < 1
    stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    assert {name.split(".")[0] for name in stored if ".heads.repa.layers.0.weight" in name} == {
        "net",
        "ema",
        "optimizer",
    }

    # a cache of another encoder is stale
    settings = config.load(tmp_path / "cache/config.yaml")
    settings["data"]["params"]["features"]["params"]["feature_dim"] = 7
    with pytest.raises(UserError, match=r"the cache is stale: features.params.feature_dim was 6, is now 7"):
        config.build(settings, "data")

    # exported and sampled without the head
    cli.run(["export", str(checkpoint.parent), str(tmp_path / "exported"), "--dtype", "fp32"])
    exported = load_file(tmp_path / "exported/model.safetensors")
    assert not [name for name in exported if "head" in name]
    assert not [
        name for name, _ in Generator(checkpoint.parent, precision="fp32").net.named_parameters() if "head" in name
    ]

    # another run starts from it without the aid, and from a run without the aid with it
    start = "trainer.init_from={path: %s, parts: [model, ema]}", "trainer.stop_step=1", "trainer.num_workers=0"
    finish(tmp_path / "without", 1, start[0] % checkpoint, *start[1:], config=TINY)
    finish(
        tmp_path / "with",
        1,
        start[0] % (tmp_path / "without/checkpoints"),
        *start[1:],
        config=tmp_path / "cache/config.yaml",
    )


def test_the_configs_of_the_page_fit_the_shipped_config(tmp_path, monkeypatch):
    """Their layers exist, and the denoiser gets the heads that they need."""
    monkeypatch.setenv("SELFE_CACHE_DIR", str(tmp_path))
    heads = {}
    page = (ROOT / "docs/training_aids.md").read_text()
    for text in re.findall(r"^```yaml\n# (.*?)^```", page, re.DOTALL | re.MULTILINE):
        name, _, settings = text.partition("\n")
        path = tmp_path / name
        path.write_text(settings.replace("base: ", f"base: {ROOT}/"))
        with torch.device("meta"):
            backbone = config.build(config.load(path), "system").backbone
        heads[name] = {head: p.shape[0] for head, p in backbone.heads.named_parameters() if head.endswith("4.weight")}
    assert heads == {
        "tread.yaml": {},
        "repa.yaml": {"repa.layers.4.weight": 768},
        "self_flow.yaml": {"self_flow.layers.4.weight": 1024},
    }


def test_self_flow_around_self_e_is_one_line():
    """It has times per token in its only pass with gradient; Self-E follows it in a run of its own."""
    inner = "{module: selfe.objectives.self_evaluation.SelfEvaluation}"
    layers = f"student_layer: double_blocks.0, teacher_layer: single_blocks.0, objective: {inner}"
    objective = f"system.objective={{module: selfe.objectives.self_flow.SelfFlow, params: {{{layers}}}}}"
    with pytest.raises(UserError, match=r"system.objective.params.objective: unknown key; valid keys: student_layer"):
        config.load(TINY, [objective])


def test_self_flow_trains_and_resumes(tmp_path):
    layers = {"student_layer": "double_blocks.0", "teacher_layer": "single_blocks.0", "hidden": 8}
    path = aid_config(tmp_path, {"module": "selfe.objectives.self_flow.SelfFlow", "params": layers})
    trained_on_two_ranks(tmp_path, path)
    assert 0 < abs(lines(tmp_path / "once")[-1]["train/feature_cosine"]) < 1
