"""Fine-tuning: what is trained, its checkpoints, and the models that follow from them."""

import shutil
from pathlib import Path

import pytest
import torch

from selfe import cli, config
from selfe.backbones import lora
from selfe.backbones.mmdit import MMDiT
from selfe.checkpoint import adapter, state, verify
from selfe.checkpoint.flux import FluxStateDict
from selfe.checkpoint.weights import load_weights
from selfe.distributed import fsdp
from selfe.distributed.collectives import World
from selfe.errors import UserError
from selfe.generator import Generator
from selfe.train import Trainer
from selfe.training.adapt import AdaptConfig
from selfe.types import TextCond, packed
from tests.distributed.test_fsdp import perturb, small_net
from tests.helpers.ranks import on_ranks
from tests.helpers.train_processes import QUICK, Run, copy_until, files, finish, lines

ADAPT = "trainer.adapt={rank: 3, alpha: 6, trainable: ['s_in.*']}"
LORA = "trainer.adapt={rank: 3, alpha: 6}"
STEPS = 4
# a learning rate at which the low-rank matrices count in the images
SETTINGS = ("trainer.lr=2e-2", "trainer.warmup_steps=0", "trainer.ema_decay=0.5", "trainer.ema_warmup=null")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Checkpoints of a run that has trained all weights, until no gate of a block is zero."""
    folder = tmp_path_factory.mktemp("base")
    finish(folder, 1, *SETTINGS, "trainer.stop_step=4")
    return folder / "checkpoints"


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory) -> Path:
    """A run that fine-tunes it on two processes, with a checkpoint every two steps."""
    folder = tmp_path_factory.mktemp("adapted")
    output = finish(folder, 2, *SETTINGS, ADAPT, f"trainer.init_from={base}", f"trainer.stop_step={STEPS}")
    assert f"fine-tuning the ema weights of {base / 'step_00000004'}" in output
    assert "M of them trained in fp32" in output
    return folder


def backbone(folder: Path) -> MMDiT:
    with torch.device("meta"):
        return config.build(config.load(folder / "config.yaml"), "system").backbone


def tensors_of(checkpoint: Path, weights: str) -> dict[str, torch.Tensor]:
    """What a checkpoint stores of some weights."""
    shapes = state.stored_parameters(checkpoint, state.group_of(weights))
    return {name: state.read_parameter(checkpoint, name, shape, weights) for name, shape in shapes.items()}


# ---- what is trained ----


def test_low_rank_matrices_have_the_names_and_shapes_of_peft():
    net = small_net()
    AdaptConfig(rank=3, alpha=6.0).apply(net)
    trained = {name: tuple(p.shape) for name, p in net.named_parameters() if p.requires_grad}
    assert trained["double_blocks.0.text.qkv_in.lora_A.weight"] == (3, 48)
    assert trained["double_blocks.0.text.qkv_in.lora_B.weight"] == (144, 3)
    assert trained["single_blocks.0.qkv_mlp_in.lora_B.weight"] == (144 + 192, 3)
    assert trained["single_blocks.0.attention_mlp_out.lora_A.weight"] == (3, 48 + 192)
    assert len(trained) == 2 * (2 * 4 + 2)
    assert {name for name in dict(net.named_parameters()) if not lora.is_low_rank(name)} == {
        name for name, _ in small_net().named_parameters()
    }

    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(
        small_net(),
        peft.LoraConfig(
            r=3,
            lora_alpha=6,
            target_modules=[name for name, module in net.named_modules() if isinstance(module, lora.LoRALinear)],
        ),
    )
    expected = {name: tuple(t.shape) for name, t in peft.get_peft_model_state_dict(theirs).items()}
    assert {f"base_model.model.{name}": shape for name, shape in trained.items()} == expected


def inputs() -> tuple:
    generator = torch.Generator().manual_seed(0)
    x_t = packed(torch.randn(10, 8, generator=generator), [(2, 2), (2, 3)])
    text = packed(torch.randn(7, 12, generator=generator), [(1, 3), (1, 4)])
    times = torch.tensor([0.9, 0.4]), torch.tensor([0.5, 0.4])
    return x_t, *times, TextCond(text, torch.randn(2, 6, generator=generator))


def test_an_adapted_denoiser_computes_what_its_merged_weights_compute():
    """In double precision, for all linear layers; at the start it computes the denoiser without matrices."""
    net, plain = small_net(), small_net()
    perturb(plain, 0)
    net.load_state_dict(plain.state_dict())
    AdaptConfig(rank=3, alpha=6.0, layers=("*",)).apply(net)
    assert torch.equal(net(*inputs()), plain(*inputs()))

    perturb(net, 1)
    matrices = dict(net.named_parameters())
    merged = small_net()
    for name, p in merged.named_parameters():
        p.data = matrices[name].detach().clone()
        layer = name.removesuffix(".weight")
        if layer + lora.A in matrices:
            p.data += 2.0 * matrices[layer + lora.B].detach() @ matrices[layer + lora.A].detach()
    assert not torch.allclose(net(*inputs()), plain(*inputs()), atol=0.1)
    torch.testing.assert_close(net(*inputs()), merged(*inputs()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 2, "layers": ("*.qkv",)}, r"trainer.adapt.layers: '\*.qkv' matches no linear layer; .* image_in, "),
        ({"trainable": ("s_out.*",)}, r"trainer.adapt.trainable: 's_out.\*' matches no parameter"),
        ({"rank": 2, "trainable": ("*.qkv_in.weight",)}, "qkv_in.weight is trained itself, and .* adds matrices to it"),
    ],
    ids=["layers", "trainable", "both"],
)
def test_patterns_that_fit_nothing_or_twice_are_one_line(settings, words):
    with pytest.raises(UserError, match=words):
        AdaptConfig(**settings).apply(small_net())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["trainer.adapt={rank: 3}"],
            "trainer: adapt: init_from is not set; set it to the weights that are fine-tuned",
        ),
        (
            ["trainer.adapt={}", "trainer.init_from=x"],
            "trainer.adapt: nothing would be trained; set rank, for LoRA, or",
        ),
        (
            ["trainer.adapt={rank: 3}", "trainer.init_from={path: x, parts: [model, step]}"],
            "step is that of another run",
        ),
    ],
    ids=["no weights", "nothing to train", "step"],
)
def test_settings_that_do_not_fit_together_are_one_line(overrides, words, monkeypatch):
    monkeypatch.chdir(QUICK.parents[2])
    with pytest.raises(UserError, match=words):
        config.build(config.load(QUICK, overrides), "trainer")


# ---- training ----


def trained_on(world: World, folder: str, base: str, *changes: str) -> dict[str, torch.Tensor]:
    """Weights, EMA and shared memory after some steps of the real trainer."""
    overrides = [ADAPT, f"trainer.output_dir={folder}", f"trainer.init_from={base}"]
    settings = config.load(QUICK, [*overrides, *changes])
    with torch.device("meta"):
        system = config.build(settings, "system")
    run = Trainer(config.build(settings, "trainer"), system, config.build(settings, "data"), settings["seed"], world)
    before = {name: fsdp.unsharded(p.detach()).clone() for name, p in run.net.named_parameters()}
    for step in range(3):
        batches = [run.part("train")[step, place] for place in range(run.num_micro(step))]
        run.step(step, iter(batches), lambda: 0)

    result = {f"net {name}": fsdp.unsharded(p.detach()) for name, p in run.net.named_parameters()}
    result |= {f"ema {name}": fsdp.unsharded(p.detach()) for name, p in run.ema.named_parameters()}
    frozen = [name for name, p in run.net.named_parameters() if not p.requires_grad]
    for name in frozen:
        assert torch.equal(result[f"net {name}"], before[name])
        assert torch.equal(result[f"ema {name}"], before[name])
        assert run.net.get_parameter(name).grad is None
        own, theirs = (fsdp.local(net.get_parameter(name).detach()) for net in (run.ema, run.net))
        assert own.data_ptr() == theirs.data_ptr(), name  # one copy in memory
    assert {id(p) for p in run.optimizer.state} == {id(p) for p in run.net.parameters() if p.requires_grad}
    return result


def test_weights_are_the_same_on_any_number_of_ranks(base, tmp_path, monkeypatch, alone):
    monkeypatch.chdir(QUICK.parents[2])
    one = trained_on(alone, str(tmp_path / "1"), str(base))
    moved = [name for name, value in one.items() if name.startswith("net ") and lora.B in name and value.any()]
    assert len(moved) == 10
    for size in (2, 4):
        other = on_ranks(size, trained_on, str(tmp_path / str(size)), str(base))
        assert other.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ["mean_flow.MeanFlow", "any_flow.AnyFlow"])
def test_flow_maps_are_fine_tuned_as_self_e_is(name, base, tmp_path, monkeypatch, alone):
    """One with a time derivative, one with the EMA as its target; the same on two ranks."""
    monkeypatch.chdir(QUICK.parents[2])
    objective = f"system.objective={{module: selfe.objectives.{name}}}"
    one = trained_on(alone, str(tmp_path / "1"), str(base), objective)
    moved = [name for name, value in one.items() if name.startswith("net ") and lora.B in name and value.any()]
    assert len(moved) == 10
    two = on_ranks(2, trained_on, str(tmp_path / "2"), str(base), objective)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-6, msg=name)


def test_a_checkpoint_holds_only_what_was_trained_and_resumes_bitwise(adapted, base, tmp_path):
    last = Path("checkpoints") / f"step_{STEPS:08d}"
    stored = state.stored_tensors(adapted / last)
    groups = {key.partition(".")[0] for key in stored}
    assert groups == {"net", "ema", "optimizer"}
    assert all(lora.is_low_rank(key) or ".s_in." in key for key in stored if not key.startswith("optimizer"))
    assert not [key for key in stored if "image_in" in key]

    start = f"trainer.init_from={base}"
    copy_until(Path("checkpoints/step_00000002"), adapted, tmp_path)
    output = finish(tmp_path, 2, *SETTINGS, ADAPT, start, f"trainer.stop_step={STEPS}")
    assert f"resuming from {tmp_path / 'checkpoints/step_00000002'}" in output
    assert lines(tmp_path) == lines(adapted)
    assert files(tmp_path / last) == files(adapted / last)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.init_from={path: BASE, parts: [model]}", ADAPT], "are not those that this run fine-tunes; set"),
        (["trainer.init_from=BASE", "trainer.adapt={rank: 4, trainable: ['s_in.*']}"], "adapt.rank was 3, is now 4"),
        (["trainer.init_from=BASE", LORA], "has s_in.0.bias, unlike this config; set trainer.adapt.layers and"),
        (["trainer.init_from=BASE"], "is of a fine-tuning run, but trainer.adapt is not set"),
    ],
    ids=["another base", "another rank", "other parameters", "all weights"],
)
def test_a_run_resumes_only_with_its_base_and_settings(overrides, words, adapted, base):
    run = Run(adapted, 1, *SETTINGS, *(text.replace("BASE", str(base)) for text in overrides))
    assert run.wait() == [2]
    assert words in run.failures[0]["message"]


def test_a_resumed_run_takes_the_checkpoint_that_it_started_from(adapted, base, tmp_path):
    checkpoint = tmp_path / "step_00000004"
    shutil.copytree(adapted / "checkpoints/step_00000004", checkpoint)
    assert adapter.find_checkpoint(base, checkpoint) == base / "step_00000004"
    marker = verify.read_marker(checkpoint)
    marker["adapter"]["base"] = str(base / "step_00000002")
    verify.write_marker(checkpoint, marker)
    assert adapter.find_checkpoint(base, checkpoint) == base / "step_00000002"
    assert adapter.find_checkpoint(base / "step_00000004", checkpoint) == base / "step_00000004"
    assert adapter.find_checkpoint(base, None) == base / "step_00000004"


def test_complete_weights_and_adapters_are_not_mistaken_for_each_other(adapted, base, tmp_path):
    run = Run(base.parent, 1, *SETTINGS, ADAPT, f"trainer.init_from={base}", "trainer.stop_step=6")
    assert run.wait() == [2]
    assert "holds complete weights, but trainer.adapt is set" in run.failures[0]["message"]
    run = Run(tmp_path, 1, *SETTINGS, f"trainer.init_from={adapted / 'checkpoints'}")
    assert run.wait() == [2]
    assert "has trained; merge it with selfe export" in run.failures[0]["message"]


# ---- sampling and export ----


@pytest.mark.parametrize("weights", ["ema", "live"])
def test_merged_weights_are_the_base_plus_the_product(weights, adapted, base, tmp_path):
    """Loaded for sampling, and exported; in float32."""
    checkpoint = verify.find(adapted / "checkpoints")
    net = backbone(adapted).to_empty(device="cpu").requires_grad_(False)
    assert load_weights(checkpoint, net, weights) == STEPS
    before, trained = tensors_of(verify.find(base), "ema"), tensors_of(checkpoint, weights)
    for name, p in net.named_parameters():
        layer = name.removesuffix(".weight")
        expected = trained.get(name, before[name]).double()
        if layer + lora.A in trained:
            assert trained[layer + lora.B].any()
            expected = expected + 2.0 * trained[layer + lora.B].double() @ trained[layer + lora.A].double()
        torch.testing.assert_close(p.double(), expected, rtol=0, atol=2e-7, msg=name)

    cli.run(["export", str(checkpoint), str(tmp_path / "out"), "--weights", weights, "--dtype", "fp32"])
    exported = FluxStateDict.of(tmp_path / "out", {name: p.shape for name, p in net.named_parameters()})
    for name, p in net.named_parameters():
        assert torch.equal(exported.read(name), p), name


def test_images_of_the_run_and_of_its_merged_export_are_equal(adapted, base, tmp_path):
    cli.run(["export", str(adapted / "checkpoints"), str(tmp_path / "out"), "--dtype", "fp32"])
    images = []
    for folder in (adapted / "checkpoints", tmp_path / "out", base):
        generator = Generator(folder, precision="fp32")
        images += generator.generate(["a cup of coffee"], num_steps=2, height=32, width=32)
    assert images[0].tobytes() == images[1].tobytes()
    assert images[0].tobytes() != images[2].tobytes()


def test_a_base_that_is_gone_or_another_is_named(adapted, base, tmp_path):
    checkpoint = verify.find(adapted / "checkpoints")
    net = backbone(adapted).to_empty(device="cpu")
    place = verify.find(base)
    moved = place.rename(place.with_name("away"))
    try:
        with pytest.raises(
            UserError, match=f"fine-tunes {place}, which does not exist; restore it, or link it .* ln -s"
        ):
            load_weights(checkpoint, net, "ema")
        finish(tmp_path, 1, *SETTINGS, "trainer.stop_step=4", "seed=7")
        place.symlink_to(tmp_path / "checkpoints/step_00000004")
        with pytest.raises(UserError, match=f"the weights of {place} are no longer those that it fine-tunes"):
            load_weights(checkpoint, net, "ema")
        with pytest.raises(UserError, match="are no longer those that it fine-tunes"):
            cli.run(["export", str(checkpoint), str(tmp_path / "out")])
    finally:
        place.unlink(missing_ok=True)
        moved.rename(place)
