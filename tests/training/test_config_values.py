"""Every number and path that a config can set: what no run can use is refused, the rest has a meaning."""

import math
import types
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
import torch

from selfe import config
from selfe.backbones.mmdit import MMDiT
from selfe.checkpoint import verify
from selfe.checkpoint.manager import RetentionPolicy
from selfe.checkpoint.state import InitFromConfig
from selfe.data.buckets import ResolutionPhase
from selfe.data.dataset import WeightedManifest
from selfe.data.manifest import ManifestData
from selfe.data.shapes import ShapesData
from selfe.distributed.fsdp import GatherConfig
from selfe.encoders.flux_vae import FluxVAE
from selfe.encoders.hf_text import HFText
from selfe.encoders.identity import Identity
from selfe.encoders.t5_clip import ClipSize, T5Clip, T5Size
from selfe.encoders.words import Words
from selfe.errors import UserError
from selfe.infer import Inferencer
from selfe.inference.prompts import SamplingDefaults, from_file
from selfe.io.sampling_limits import RANGES
from selfe.objectives.flow_matching import FlowMatching
from selfe.objectives.self_evaluation import SelfEvaluation
from selfe.optimizers.groups import GroupConfig
from selfe.optimizers.muon import Muon
from selfe.samplers.renoise import Renoise
from selfe.training.ema import ConstantDecay, PowerFunction
from selfe.training.grad_guard import GradGuardConfig
from selfe.training.schedules import WSD
from selfe.training.settings import BatchPhase, TrainerConfig
from selfe.training.val_metrics import LossAtTimes
from selfe.training.visuals import SampleGridConfig

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "debug_data/t2i_smoke/manifest.tsv"
HUGE = 10**15

# everything that a config can build, with the values that have no default
SHIPPED: dict[type, dict[str, Any]] = {
    TrainerConfig: {"output_dir": "run", "max_steps": 10, "total_batch_size": 4, "micro_batch_size": 2},
    BatchPhase: {"step": 5},
    GatherConfig: {},
    GradGuardConfig: {},
    RetentionPolicy: {},
    SampleGridConfig: {},
    InitFromConfig: {"path": "run/checkpoints"},
    Inferencer: {"ckpt_dir": "run/checkpoints", "output_dir": "images"},
    SamplingDefaults: {},
    MMDiT: {"width": 48, "num_heads": 2, "rope_axes": [4, 8, 12], "num_double_blocks": 1, "num_single_blocks": 1},
    T5Clip: {},
    T5Size: {},
    ClipSize: {},
    FluxVAE: {"width": 32},
    HFText: {"model": "owner/name", "text_dim": 64},
    Words: {},
    Identity: {},
    FlowMatching: {},
    SelfEvaluation: {},
    Renoise: {},
    Muon: {},
    GroupConfig: {"names": ["*"]},
    WSD: {},
    ConstantDecay: {},
    PowerFunction: {},
    LossAtTimes: {},
    ManifestData: {"train_manifest": str(MANIFEST), "base_dir": str(MANIFEST.parent), "pixels": 9216},
    ShapesData: {},
    ResolutionPhase: {"step": 0, "pixels": [65536]},
    WeightedManifest: {"manifest": str(MANIFEST)},
}


def leaves(wanted: Any) -> Iterator[type]:
    """The plain types that an annotation contains."""
    if get_origin(wanted) in (Union, types.UnionType, tuple, list):
        for argument in get_args(wanted):
            yield from leaves(argument)
    elif isinstance(wanted, type) and not is_dataclass(wanted):
        yield wanted


def parameters(*kinds: type) -> list[tuple[type, str, Any]]:
    """(class, parameter, annotation) of all parameters that contain one of these types."""
    chosen = []
    for owner in SHIPPED:
        hints = get_type_hints(owner if is_dataclass(owner) else owner.__init__)
        chosen += [(owner, name, hint) for name, hint in hints.items() if set(leaves(hint)) & set(kinds)]
    return [(owner, name, hint) for owner, name, hint in chosen if name != "return"]


def build(owner: type, **values: Any) -> Any:
    with torch.device("meta"):
        return config.call(owner, SHIPPED[owner] | values, "params", build=True)


def with_value(owner: type, name: str, hint: Any, value: Any) -> Any:
    """The value as the parameter holds it: for a sequence, in its first place."""
    sequence = next((arm for arm in (hint, *get_args(hint)) if get_origin(arm) is tuple), None)
    if sequence is None or int in get_args(hint) or (float in get_args(hint) and get_origin(hint) is not tuple):
        return value
    length = 1 if Ellipsis in get_args(sequence) else len(get_args(sequence))
    return [value] * length


NOTHING_REGULARISED = "the term is off"
PHASE_ZERO = "from the first step on"
ACCEPTED: dict[str, dict[float, str]] = {
    "HFText.layers": {-1: "the last one", 0: "the embedding"},
    "TrainerConfig.lr": {0: "the weights stay as they are"},
    "TrainerConfig.min_lr": {0: "decays to zero"},
    "TrainerConfig.warmup_steps": {0: "no warm-up"},
    "TrainerConfig.decay_start": {0: PHASE_ZERO},
    "TrainerConfig.betas": {0: "no momentum"},
    "TrainerConfig.weight_decay": {0: NOTHING_REGULARISED},
    "TrainerConfig.clip_norm": {HUGE: "never reached"},
    "TrainerConfig.ema_decay": {0: "the EMA weights are the live weights"},
    "TrainerConfig.activation_checkpointing": {0: "false"},
    "TrainerConfig.num_workers": {0: "images are read by the training process"},
    "BatchPhase.step": {0: PHASE_ZERO},
    "BatchPhase.lr": {0: "the weights stay as they are"},
    "GatherConfig.reshard_after_forward": {0: "false"},
    "GatherConfig.prefetch": {0: "no explicit prefetching"},
    "RetentionPolicy.keep_best": {0: "none is kept for its validation loss"},
    "SampleGridConfig.cfg_scale": {0: "the null prompt"},
    "SampleGridConfig.s_ratio": {0: "s = t_{k+1}"},
    "SampleGridConfig.guidance_interval": {0: "no guidance, because steps start above time 0"},
    "SamplingDefaults.first_sample": {0: "the first"},
    "SamplingDefaults.seed": {0: "a seed", HUGE: "a seed"},
    "SamplingDefaults.cfg_scale": {0: "the null prompt"},
    "SamplingDefaults.s_ratio": {0: "s = t_{k+1}"},
    "SamplingDefaults.guidance_interval": {0: "no guidance, because steps start above time 0"},
    "MMDiT.num_double_blocks": {0: "single blocks only"},
    "MMDiT.num_single_blocks": {0: "double blocks only"},
    "FlowMatching.p_drop": {0: "no prompt is dropped"},
    "FlowMatching.t_std": {0: "the same time for all images of a size"},
    "FlowMatching.t_mean": {-1: "more times close to 0", 0: "as many times close to 0 as to 1"},
    "FlowMatching.t_warp": {-1: "more times close to 0", 0: "no warp"},
    "SelfEvaluation.p_drop": {0: "no prompt is dropped"},
    "SelfEvaluation.p_equal": {0: "every sample is self-evaluated"},
    "SelfEvaluation.t_std": {0: "the same time for all images of a size"},
    "SelfEvaluation.t_mean": {-1: "more times close to 0", 0: "as many times close to 0 as to 1"},
    "SelfEvaluation.t_warp": {-1: "more times close to 0", 0: "no warp"},
    "SelfEvaluation.start_step": {0: PHASE_ZERO},
    "SelfEvaluation.k_cls": {-1: "evaluation reversed, a control of the miniature", 0: NOTHING_REGULARISED},
    "SelfEvaluation.aux_start_step": {0: PHASE_ZERO},
    "SelfEvaluation.aux_k_cls": {-1: "evaluation reversed", 0: NOTHING_REGULARISED},
    "SelfEvaluation.aux_k_fake": {-1: "evaluation reversed", 0: NOTHING_REGULARISED},
    "SelfEvaluation.aux_loss_weight": {0: NOTHING_REGULARISED},
    "SelfEvaluation.lam_max": {0: "flow matching", math.inf: "the paper's lambda", HUGE: "never reached"},
    "SelfEvaluation.eval_floor": {0: "evaluation at s, as in the paper"},
    "Renoise.eta": {0: "deterministic"},
    "Muon.momentum": {0: "the gradient of the step alone"},
    "Muon.lr_scale": {0: "the matrices stay as they are"},
    "GroupConfig.weight_decay": {0: NOTHING_REGULARISED},
    "GroupConfig.lr_scale": {0: "these weights stay as they are"},
    "ConstantDecay.decay": {0: "the average is the live weights"},
    "LossAtTimes.times": {0: "data"},
    "ManifestData.max_pixels": {HUGE: "no image is too large"},
    "ShapesData.held_out": {0: "validation on the training combinations"},
    "ResolutionPhase.step": {0: PHASE_ZERO},
}


@pytest.mark.parametrize(
    ("owner", "name", "hint"), parameters(int, float), ids=lambda value: getattr(value, "__name__", str(value))
)
def test_numbers_are_refused_or_have_a_meaning(owner, name, hint):
    accepted = ACCEPTED.get(f"{owner.__name__}.{name}", {})
    for number in (-1, 0, math.inf, HUGE):
        value = with_value(owner, name, hint, number)
        if number in accepted:
            build(owner, **{name: value})
        else:
            with pytest.raises((config.Problem, ValueError), match=rf"{name}|shares|unit|{number}") as caught:
                build(owner, **{name: value})
            assert "\n" not in str(caught.value)


def test_training_and_sampling_accept_the_same_seeds():
    low, high = RANGES["seed"]
    for seed in (low, high):
        assert config.visit_root("seed", seed, build=False) == seed
    for seed in (low - 1, high + 1):
        with pytest.raises(config.Problem, match="seed: must be between"):
            config.visit_root("seed", seed, build=False)


def test_zero_is_a_value_of_a_phase():
    trainer = build(TrainerConfig, lr=1.0, warmup_steps=0, phases=[{"step": 4, "lr": 0.0}], min_lr=0.0)
    assert [trainer.lr_at(step) for step in (3, 4, 9)] == [pytest.approx(1 - 3 / 9), 0.0, 0.0]
    with pytest.raises(config.Problem, match="stop_step must be between 1"):
        build(TrainerConfig, stop_step=0)
    with pytest.raises(config.Problem, match=r"phases\[0\]: total_batch_size must be between 1"):
        build(TrainerConfig, phases=[{"step": 4, "total_batch_size": 0}])


@pytest.mark.parametrize(
    ("owner", "name", "hint"), parameters(Path), ids=lambda value: getattr(value, "__name__", str(value))
)
def test_paths_are_expanded_and_not_empty(owner, name, hint, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    given = {"~": "/home/someone", "~/runs/a": "/home/someone/runs/a", "runs/~a": "runs/~a", "/a b": "/a b"}
    for text, expected in given.items():
        assert config.call(owner, SHIPPED[owner] | {name: text}, "", build=False)[name] == Path(expected)
    for wrong in ("~nobody-of-this-name/a", *([] if type(None) in get_args(hint) else [""])):
        with pytest.raises(config.Problem, match=f"params.{name}: "):
            config.call(owner, SHIPPED[owner] | {name: wrong}, "params", build=False)


@pytest.mark.parametrize("missing", [True, False], ids=["missing", "a file or a folder in its place"])
def test_paths_that_lead_nowhere_are_one_line(tmp_path, missing):
    file, folder = tmp_path / "file", tmp_path / "folder"
    if not missing:
        file.mkdir()
        folder.write_text("")
    uses = {
        "train_manifest": lambda: build(ManifestData, train_manifest=str(file)),
        "val_manifest": lambda: build(ManifestData, val_manifest=str(file)),
        "prompt_file": lambda: from_file(tmp_path / "file.txt" if missing else folder, SamplingDefaults(), 16),
        "t5 cache_dir": lambda: build(T5Clip, cache_dir=str(folder)).load(torch.device("cpu")),
        "vae cache_dir": lambda: build(FluxVAE, cache_dir=str(folder)).load(torch.device("cpu")),
        "ckpt_dir": lambda: verify.find(folder),
    }
    for name, use in uses.items():
        with pytest.raises((UserError, config.Problem)) as caught:
            use()
        assert "\n" not in str(caught.value), name
        assert str(tmp_path) in str(caught.value), name
