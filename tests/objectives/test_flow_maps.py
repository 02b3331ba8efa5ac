"""Objectives of flow maps: against a NumPy reference, at the ends of the path, on two ranks, and in complete runs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from selfe import cli, config, flow
from selfe.distributed import collectives, fsdp
from selfe.distributed.collectives import World
from selfe.encoders.hf_vision import HFVision
from selfe.errors import UserError
from selfe.generator import Generator
from selfe.infer import Inferencer
from selfe.inference.prompts import SamplingDefaults
from selfe.objectives.alpha_flow import AlphaFlow
from selfe.objectives.any_flow import AnyFlow
from selfe.objectives.flow_map import FlowMap, PairTimes, time_derivative
from selfe.objectives.flow_matching import FlowMatching
from selfe.objectives.mean_flow import MeanFlow
from selfe.objectives.repa import Repa
from selfe.objectives.so_flow import SoFlow
from selfe.objectives.terminal_velocity import TerminalVelocity
from selfe.objectives.transition_model import TransitionModel
from selfe.objectives.tread import Tread
from selfe.rng import SampleRNG
from selfe.samplers.euler import Euler
from selfe.samplers.renoise import Renoise
from selfe.system import System
from selfe.tools.export.command import sampling_settings
from selfe.train import Trainer
from selfe.training.visuals import SampleGridConfig
from selfe.types import TextCond
from tests.distributed.test_fsdp import small_net
from tests.helpers import flow_map_reference as plain
from tests.helpers import reference
from tests.helpers.flow_map_reference import Sample
from tests.helpers.ranks import on_ranks
from tests.helpers.train_processes import ROOT, files
from tests.method.test_mmdit import inputs, small
from tests.method.test_self_evaluation import (
    CAPTIONS,
    NETS,
    PROMPTS,
    GaussianNet,
    clean,
    gradients,
    reference_gradients,
    run,
)
from tests.method.test_training_aids import aid_gradients, image_features, prepared

OBJECTIVES: dict[str, Callable[..., FlowMap]] = {
    "iMF": MeanFlow,
    "MeanFlow": lambda **options: MeanFlow(**{"tangent": "data"} | options),
    "alpha-Flow": lambda **options: AlphaFlow(**{"alpha_end_step": 20} | options),
    "SoFlow": lambda **options: SoFlow(**{"r_steps": 20} | options),
    "SoFlow, Self-E": lambda **options: SoFlow(**{"r_steps": 20, "k_cls": 0.7} | options),
    "TiM": TransitionModel,
    "AnyFlow": AnyFlow,
    "TVM": TerminalVelocity,
}
STEP = 10  # alpha is 0.5 there


# ---- against the reference ----


def samples(seed: int, p_drop: float, share: float, p_zero: float, std: float, uniform: bool, names) -> list[Sample]:
    """The samples of `run` as the objectives draw them."""
    rng, x0 = SampleRNG.of_step(seed, STEP, range(8)), clean()
    noise = x0.with_tokens(rng.normal_like("noise", x0)).split()
    renoise = x0.with_tokens(rng.normal_like("renoise", x0)).split()
    draw = rng.uniform if uniform else rng.normal
    times = {name: draw(name, x0.tokens) for name in names}
    drop, zero = rng.uniform("drop", x0.tokens), rng.uniform("zero", x0.tokens)

    drawn = []
    for i, x in enumerate(x0.split()):
        pair = int((i + 1) * share) > int(i * share)
        t, second = (
            reference.warp(float(values[i]) if uniform else 1 / (1 + np.exp(-std * float(values[i]))), len(x))
            for values in times.values()
        )
        t, s = (max(t, second), min(t, second)) if pair else (t, t)
        s = 0.0 if pair and zero[i] < p_zero / share else s
        prompt = "" if drop[i] < p_drop else PROMPTS[i]
        codes = [np.eye(6)[CAPTIONS.index(caption)] for caption in (prompt, "")]
        drawn.append(Sample(x.numpy(), noise[i].numpy(), t, s, pair, prompt == "", *codes, renoise[i].numpy()))
    return drawn


def expected(name: str, drawn: list[Sample], live, frozen, ema, scale: float, power: float, times) -> np.ndarray:
    """The losses (B,) of the reference."""
    shared = {"scale": scale, "mix": 1 - 1 / scale, "power": power}
    of_sample = {
        "iMF": (plain.mean_flow, shared | {"width": 0.005, "tangent": "network", "offset": 0.01}),
        "MeanFlow": (plain.mean_flow, shared | {"width": 0.005, "tangent": "data", "offset": 0.01}),
        "alpha-Flow": (plain.alpha_flow, shared | {"alpha": 0.5, "offset": 0.001}),
        "SoFlow": (plain.so_flow, shared | {"ratio": 0.1 * 0.02**0.5, "offset": 0.01}),
        "SoFlow, Self-E": (
            plain.so_flow,
            shared | {"ratio": 0.1 * 0.02**0.5, "offset": 0.01, "k_cls": 0.7, "floor": 0.5},
        ),
        "TiM": (plain.transition_model, shared | {"width": 0.005, "offset": 1e-5}),
        "TVM": (plain.terminal_velocity, {"scale": scale, "width": 0.005}),
    }
    if name == "AnyFlow":
        groups = [drawn[first : first + 2] for first in range(0, len(drawn), 2)]
        return np.concatenate([plain.any_flow(g, live, frozen, ema, scale=scale, width=0.005) for g in groups])
    loss, options = of_sample[name]
    each = [{"u": u} for u in times] if name == "TVM" else [{}] * len(drawn)
    return np.array([loss(x, live, frozen, ema, **options, **own) for x, own in zip(drawn, each, strict=True)])


@pytest.mark.parametrize(("scale", "power", "seed"), [(1, 1, 0), (2.5, 0.5, 1), (1.5, 0, 2)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_gradients_equal_the_reference(name, scale, power, seed):
    net, ema = NETS
    options = {"p_equal": 0.5, "p_drop": 0.4, "guidance": scale, "p_zero": 0.2, "t_std": 1.0}
    if name not in ("AnyFlow", "TVM"):
        options["adaptive_power"] = power
    loss = run(OBJECTIVES[name](**options), net, ema, STEP, seed=seed)

    names = ("second t", "third t") if name == "TVM" else ("t", "second t")
    drawn = samples(seed, 0.4, 0.5, 0.2, 1.0, name == "AnyFlow", names)
    assert {(x.pair, x.dropped, x.s == 0) for x in drawn} >= {(True, False, False), (False, False, False)}
    times = flow.draw_t(SampleRNG.of_step(seed, STEP, range(8)), clean()).tolist()

    def losses(live, frozen):
        return expected(name, drawn, live, frozen, ema.plain(), scale, power, times)

    np.testing.assert_allclose(loss.per_sample.detach(), losses(net.plain(), net.plain()), rtol=1e-10, atol=1e-10)
    slopes, grads = reference_gradients(net, lambda live: losses(live, net.plain())), gradients(loss, net)
    for parameter, slope in slopes.items():
        np.testing.assert_allclose(grads[parameter], slope, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_with_equal_times_it_is_flow_matching_to_the_bit(name):
    net, ema = NETS
    options = {"p_equal": 1, "p_zero": 0, "p_drop": 0.3, "t_std": 1.0, "t_distribution": "logit-normal"}
    options |= {"time_weight": False} if name == "AnyFlow" else {} if name == "TVM" else {"adaptive_power": 0}
    a, b = run(OBJECTIVES[name](**options), net, ema, STEP), run(FlowMatching(0.3), net, ema, STEP)
    assert torch.equal(a.per_sample, b.per_sample)
    for one, other in zip(gradients(a, net).values(), gradients(b, net).values(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_validation_is_flow_matching(name):
    net, ema = NETS
    objective = OBJECTIVES[name](guidance=2.0, t_std=1.0, t_distribution="logit-normal")
    with torch.no_grad():
        loss = run(objective, net, ema, STEP).per_sample
        assert torch.equal(loss, run(FlowMatching(), net, ema, STEP).per_sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_finite_at_the_ends_of_the_path(name, dtype, monkeypatch):
    """t = 0, t = 1, s = t, s = 0 and s nearly t, for rows that are trained as pairs too."""
    net, ema = GaussianNet(0, dtype), GaussianNet(1, dtype)
    near = 1 - torch.finfo(dtype).eps
    times = [(0, 0), (0, 0), (1, 1), (1, 1), (1, 0), (1, near), (0.5, 0.5), (near, 0)]
    t, s = torch.tensor(times, dtype=dtype).T
    monkeypatch.setattr(PairTimes, "draw", lambda *arguments: (t, s))
    monkeypatch.setattr(flow, "draw_t", lambda *arguments: t)

    objective = OBJECTIVES[name](p_equal=0.5, guidance=2.0, p_drop=0.2)
    monkeypatch.setattr("selfe.objectives.flow_map.spread_rows", lambda share, size: [1, 3, 5, 7])
    loss = run(objective, net, ema, STEP, dtype)
    numbers = [loss.per_sample.detach(), *loss.metrics.values(), *map(torch.from_numpy, gradients(loss, net).values())]
    assert all(number.isfinite().all() for number in numbers)


# ---- network calls ----

LEARN, FIXED = ("live", 8, True), ("live", 8, False)
CALLS = {
    "iMF": ({}, [LEARN, ("live", 4, False), FIXED]),
    "iMF, guided": ({"guidance": 2.0}, [FIXED, FIXED, LEARN, FIXED]),
    "MeanFlow": ({}, [LEARN, FIXED]),
    "alpha-Flow": ({}, [LEARN, ("live", 4, False)]),
    "alpha-Flow, before": ({"alpha_start_step": 15}, [LEARN]),
    "SoFlow": ({"p_equal": 0.5}, [LEARN, ("live", 4, False)]),
    "SoFlow, Self-E, as often": ({"p_equal": 0.5}, [LEARN, *[(w, 4, False) for w in ("live", "ema", "live")]]),
    "SoFlow, guided without mix": ({"guidance": 2.0, "guidance_mix": 0.0}, [FIXED, LEARN, ("live", 2, False)]),
    "TiM": ({}, [LEARN, FIXED]),
    "TiM, guided": ({"guidance": 2.0}, [("ema", 8, False)] * 2 + [LEARN, FIXED]),
    "AnyFlow": ({}, [LEARN, FIXED]),
    "AnyFlow, guided": ({"guidance": 2.0}, [LEARN, FIXED, FIXED]),
    "TVM": ({}, [LEARN, ("live", 16, True), ("ema", 8, False)]),
    "TVM, guided": ({"guidance": 2.0, "p_equal": 0.5}, [("ema", 8, False), LEARN, LEARN, ("ema", 4, False)]),
}


@pytest.mark.parametrize("case", CALLS)
def test_network_calls(case):
    """(weights, rows, with gradient); the two ends of a difference are one call."""
    options, calls = CALLS[case]
    made = []

    def recorded(name: str, net: GaussianNet):
        def call(x_t, t, s, cond):
            v = net(x_t, t, s, cond)
            made.append((name, len(x_t), v.requires_grad))
            assert len(cond.text) == len(cond.pooled) == len(t) == len(s) == len(x_t)
            assert (s <= t).all()
            return v

        return call

    name = next(name for name in reversed(OBJECTIVES) if case.startswith(name))
    run(OBJECTIVES[name](**options), recorded("live", NETS[0]), recorded("ema", NETS[1]), STEP)
    assert made == calls
    assert not any(p.grad is not None for p in NETS[1].parameters())


def test_alpha_falls_from_one_by_a_sigmoid():
    objective = AlphaFlow(alpha_start_step=100, alpha_end_step=300)
    values = [objective.alpha(step) for step in (0, 100, 200, 250, 300, 10_000)]
    np.testing.assert_allclose(values, [1, 1, 0.5, 0.005, 0.005, 0.005])
    assert 0.005 < objective.alpha(225) == pytest.approx(1 / (1 + np.exp(25 / 8)))
    (start,) = objective.starts
    assert objective.alpha(start - 1) == 1 > objective.alpha(start)
    assert [objective.phase(step) for step in (start - 1, start)] == ["trajectory flow matching", "flow map"]


def test_mistakes_are_one_line():
    for make, words in (
        (lambda: MeanFlow(p_equal=0.9, p_zero=0.2), "p_equal 0.9 and p_zero 0.2 are shares of a batch; lower one"),
        (lambda: MeanFlow(guidance=0.5), "guidance must be between 1 and 100, got 0.5"),
        (lambda: AlphaFlow(alpha_start_step=9, alpha_end_step=9), "alpha_end_step 9 must be above alpha_start_step 9"),
        (lambda: AnyFlow(p_equal=0), "balance: needs rows with s = t; raise p_equal above 0, or set balance to false"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


@pytest.mark.parametrize(
    ("scale", "errors"),
    [
        (1000.0, (1.1, 1.1, 1.1)),
        (100.0, (0.15, 0.15, 0.15)),
        (10.0, (4.2e-3, 4.2e-3, 0.23)),
        (1.0, (1.4e-4, 1.7e-4, 1.8)),
    ],
)
def test_a_difference_needs_a_small_time_scale_and_enough_digits(scale, errors):
    """Errors of half width 0.005 in float64, float32 and bfloat16, relative to a half width of 1e-7 in float64."""
    x, _, _, cond = inputs()
    t, s = torch.tensor([[0.8, 0.5, 0.3], [0.1, 0.2, 0.0]], dtype=torch.float64)
    tangent = torch.randn(x.tokens.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = time_derivative(small(time_scale=scale), x, t, s, cond, tangent, 1e-7)

    # times and latents are never in half precision
    for dtype, error in zip((torch.float64, torch.float32, torch.bfloat16), errors, strict=True):
        wide = torch.promote_types(dtype, torch.float32)
        text = TextCond(cond.text.with_tokens(cond.text.tokens.to(wide)), cond.pooled.to(wide))
        tensors = x.with_tokens(x.tokens.to(wide)), t.to(wide), s.to(wide), text, tangent.to(wide)
        difference = time_derivative(small(time_scale=scale).to(dtype), *tensors, 0.005)
        assert ((difference.double() - exact).norm() / exact.norm()).item() == pytest.approx(error, rel=0.5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_aids_go_around_them(name):
    """REPA adds its term, and TREAD without skipped tokens changes nothing."""
    objective, rows = OBJECTIVES[name](p_equal=0.5), [0, 1, 2, 0]
    x, _, _, cond = inputs()
    x0, rng = x.select(rows), SampleRNG.of_step(0, STEP, range(4))
    conds = {"cond": cond.select(rows), "null": cond.select([2, 2, 2, 2])}
    encoder = HFVision("none", feature_dim=5, skip_pretrained=True)
    repa = Repa(objective, encoder, "double_blocks.0", weight=0.3, hidden=7)
    net = prepared(repa)

    plain_loss = objective(net, net, x0, conds, rng, STEP).per_sample
    loss = repa(net, net, x0, conds, rng, STEP, features=image_features(x0))
    torch.testing.assert_close(loss.per_sample, plain_loss - 0.3 * loss.metrics["repa_cosine"])
    if name != "TVM":  # refused
        routed = Tread(objective, "double_blocks.0", "single_blocks.0", skip=0.0)(net, net, x0, conds, rng, STEP)
        torch.testing.assert_close(routed.per_sample, plain_loss)


# ---- two ranks ----


def sharded(name: str) -> FlowMap:
    return OBJECTIVES[name](p_equal=0.5, guidance=2.0)


def gradients_on_ranks(world: World, names: list[str]) -> dict[str, Tensor]:
    """With activation checkpointing of every block."""
    mesh, collected = fsdp.make_mesh(world, None), {}
    for name in names:
        with torch.device("meta"):
            net = small_net()
        net, ema = fsdp.build_model_and_ema(net, mesh, "fp32", 0, activation_checkpointing=True)
        own = aid_gradients(net, ema, sharded(name), (world.rank, world.size), micro=2)
        collected |= {f"{name} {parameter}": gradient for parameter, gradient in own.items()}
    return collected


def test_gradients_on_two_ranks_equal_those_of_one():
    collected = on_ranks(2, gradients_on_ranks, list(OBJECTIVES))
    for name in OBJECTIVES:
        single = aid_gradients(small_net(), small_net().requires_grad_(False), sharded(name), (0, 1), micro=8)
        scale = max(gradient.abs().max() for gradient in single.values())
        for parameter, gradient in single.items():
            assert gradient.abs().max() > 0, (name, parameter)
            torch.testing.assert_close(collected[f"{name} {parameter}"], gradient, rtol=0, atol=2e-5 * scale.item())


# ---- complete runs ----


def part(name: str) -> dict:
    """The objective of a config."""
    objective = OBJECTIVES[name]()
    params = {"alpha-Flow": {"alpha_end_step": 2}, "SoFlow, Self-E": {"k_cls": 0.7}}.get(name, {})
    return {"module": f"{type(objective).__module__}.{type(objective).__qualname__}", "params": params}


BACKBONE = {"width": 48, "num_heads": 2, "num_double_blocks": 1, "num_single_blocks": 1, "rope_axes": [4, 8, 12]}
SMALL = [f"system.backbone.params.{name}={json.dumps(value)}" for name, value in BACKBONE.items()]
SMALL += ["system.backbone.params.learned_grid=null", "system.backbone.params.time_scale=1.0"]
SMALL += ["trainer.total_batch_size=8", "trainer.micro_batch_size=4", "trainer.checkpoint_every=2"]


def train(world: World, objective: dict, folder: str) -> None:
    own = f"system.objective={json.dumps(objective)}", f"trainer.output_dir={folder}", "trainer.stop_step=3"
    settings = config.load(ROOT / "configs/mini/base.yaml", [*SMALL, *own])
    with torch.device("meta"):
        system = config.build(settings, "system")
    data, trainer = config.build(settings, "data"), config.build(settings, "trainer")
    if world.is_main:
        Path(folder).mkdir(parents=True, exist_ok=True)
        config.save(settings, Path(folder) / "config.yaml")
    Trainer(trainer, system, data, settings["seed"], world).run(settings)


def train_and_resume(world: World, parts: dict[str, dict], folder: str) -> dict:
    """Three steps, and the last of them again from the checkpoint of the second."""
    for name, objective in parts.items():
        once, resumed = Path(folder, name, "once"), Path(folder, name, "resumed")
        train(world, objective, str(once))
        if world.is_main:
            shutil.copytree(once / "checkpoints/step_00000002", resumed / "checkpoints/step_00000002")
        collectives.barrier()
        train(world, objective, str(resumed))
    return {}


def test_each_trains_on_two_ranks_and_resumes_bitwise(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = [name for name in OBJECTIVES if name != "MeanFlow"]  # the class of iMF
    on_ranks(2, train_and_resume, {name: part(name) for name in names}, str(tmp_path))
    checkpoint = Path("checkpoints/step_00000003")
    for name in names:
        once, resumed = (files(tmp_path / name / folder / checkpoint) for folder in ("once", "resumed"))
        assert once == resumed, name
        (line,) = (json.loads(text) for text in (tmp_path / name / "once/metrics.jsonl").read_text().splitlines()[-1:])
        assert np.isfinite([line["train/loss"], line["train/map_loss"], line["train/data_loss"]]).all()

    # exported as safetensors, with a sampler that follows the map
    checkpoints = tmp_path / "iMF/once/checkpoints"
    cli.run(["export", str(checkpoints), str(tmp_path / "exported"), "--dtype", "fp32"])
    settings = config.load(tmp_path / "exported/config.yaml")
    assert settings["inferencer"]["defaults"]["sampler"]["module"] == "selfe.samplers.euler.Euler"
    with pytest.raises(UserError, match="samples with fresh noise, which a flow map does not take; export it as safet"):
        cli.run(["export", str(checkpoints), str(tmp_path / "pipeline"), "--format", "diffusers"])

    # sampled by steps along the map, from the checkpoint and from the export
    images = []
    for folder in (checkpoints, tmp_path / "exported"):
        generator = Generator(folder, precision="fp32", size=(8, 8))
        (image,) = generator.generate(["red cross on blue"], num_steps=2, cfg_scale=1, sampler=Euler())
        images.append(np.asarray(image))
        with pytest.raises(UserError, match=r"sampler Renoise with eta: 1.0: a model that was trained by the flow map"):
            generator.generate(["red cross on blue"], num_steps=2)
    np.testing.assert_array_equal(*images)


# ---- samplers ----


class OtherSampler(Renoise):
    """A sampler that does not declare what it does with a flow map."""

    follows_flow_map = False


def tiny_system(objective: dict) -> System:
    settings = config.load(ROOT / "configs/mini/base.yaml", [f"system.objective={json.dumps(objective)}"])
    with torch.device("meta"):
        return config.build(settings, "system")


def test_only_samplers_that_follow_a_flow_map_are_taken(alone):
    tread = {"objective": part("SoFlow"), "first": "double_blocks.0", "last": "double_blocks.1"}
    self_evaluation = {"module": "selfe.objectives.self_evaluation.SelfEvaluation", "params": {}}
    for objective in (part("iMF"), {"module": "selfe.objectives.tread.Tread", "params": tread}):
        system = tiny_system(objective)
        for sampler, s_ratio in ((Euler(), 0), (Euler(), 0.5), (Renoise(0), 0), (Renoise(1), 1)):
            system.check_sampling(sampler, s_ratio)
        for sampler in (Renoise(1), Renoise(0.3), OtherSampler(0)):
            with pytest.raises(UserError, match=r"take selfe.samplers.euler.Euler, Renoise with eta: 0, or s_ratio: 1"):
                system.check_sampling(sampler, 0)
            tiny_system(self_evaluation).check_sampling(sampler, 0)

    # before anything is loaded: there is no checkpoint, and no text encoder
    system = tiny_system(part("iMF"))
    inferencer = Inferencer(Path("none"), Path("none"), SamplingDefaults(num_steps=1, s_ratio=(1.0, 0.0)), ("a cat",))
    with pytest.raises(UserError, match=r"sampler Renoise with eta: 1.0"):
        inferencer.run(system, alone, {})
    with pytest.raises(UserError, match=r"sampler Renoise with eta: 1.0"):
        SampleGridConfig(prompts=("a cat",)).check(system)
    with pytest.raises(ValueError, match="TerminalVelocity has each sample twice in a pass, which TREAD"):
        Tread(TerminalVelocity(), "double_blocks.0", "double_blocks.1")


def test_flow_matching_is_sampled_with_s_equal_to_t_only():
    flow_matching = {"module": "selfe.objectives.flow_matching.FlowMatching", "params": {}}
    without_pairs = {"module": "selfe.objectives.self_evaluation.SelfEvaluation", "params": {"p_equal": 1.0}}
    tread = {"objective": flow_matching, "first": "double_blocks.0", "last": "double_blocks.1"}
    for objective in (flow_matching, without_pairs, {"module": "selfe.objectives.tread.Tread", "params": tread}):
        system = tiny_system(objective)
        system.check_sampling(Renoise(), 1)
        for s_ratio in (0, 0.5):
            with pytest.raises(UserError, match=rf"s_ratio {s_ratio}: .* s = t only .* set s_ratio to 1"):
                system.check_sampling(Renoise(), s_ratio)

    # exported with the s ratio that images need
    settings = config.load(ROOT / "configs/mini/base.yaml")
    defaults = sampling_settings(settings, Path("exported"), system.objective)["inferencer"]["defaults"]
    assert defaults["s_ratio"] == 1
