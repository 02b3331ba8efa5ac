"""A flow matching model, from files or from a run, becomes a model of two times: what it predicts at the start."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from selfe import config
from selfe.backbones.mmdit import MMDiT
from selfe.checkpoint import flux, second_time, verify
from selfe.distributed import fsdp
from selfe.distributed.collectives import World
from selfe.errors import UserError
from selfe.rng import SampleRNG
from selfe.tools import replay
from selfe.train import Trainer
from selfe.training.metrics import MetricAccumulator
from selfe.types import TextCond, packed
from tests.helpers.ranks import on_ranks
from tests.helpers.train_processes import TINY

RANDOM = [f"system.{part}.params.skip_pretrained=true" for part in ("text_encoder", "autoencoder")]
RANDOM_WORDS = ["system.text_encoder.params.encoder.params.skip_pretrained=true"]
FINE_TUNING = TINY.parents[2] / "docs/fine_tuning.md"
TIMES = ((0.9, 0.9), (0.9, 0.5), (0.9, 0.0), (0.3, 0.1))


@pytest.fixture(autouse=True)
def at_root(monkeypatch) -> None:
    monkeypatch.chdir(TINY.parents[2])


def tiny(**changes) -> MMDiT:
    """The denoiser of the tiny run, with random weights everywhere."""
    settings = config.load(TINY, RANDOM)["system"]["backbone"]
    net = MMDiT(**settings["params"] | changes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return net


@torch.no_grad()
def prediction(net: torch.nn.Module, t: float, s: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = packed(torch.randn(10, 64, generator=generator), [(2, 2), (2, 3)])
    text = packed(torch.randn(7, 16, generator=generator), [(1, 3), (1, 4)])
    times = (torch.full((2,), time) for time in (t, s))
    return net(x, *times, TextCond(text, torch.randn(2, 8, generator=generator)))


def as_file(net: MMDiT, style: str, path: Path) -> Path:
    """The denoiser's weights with the names of another program."""
    tensors = {}
    for name, parameter in net.named_parameters():
        tensors |= flux.split(style, name, parameter.detach(), net.width)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return path


def as_run(net: MMDiT, folder: Path) -> Path:
    """A complete checkpoint that holds the denoiser and its average."""
    checkpoint = folder / "step_00000008"
    weights = {name: parameter.detach() for name, parameter in net.named_parameters()}
    dcp.save({"net": weights, "ema": weights}, checkpoint_id=checkpoint, no_dist=True)
    files = {path.name: [path.stat().st_size, verify.checksum(path)] for path in checkpoint.iterdir()}
    verify.write_marker(checkpoint, {"step": 8, "samples": 64, "elapsed": 1.0, "guard": None, "files": files})
    return folder


def source(kind: str, folder: Path) -> tuple[MMDiT, str]:
    """A flow matching model, and the value of `trainer.init_from` that names it."""
    trained_at_s_equal_t = kind.startswith("s = t")
    net = tiny(s_branch=trained_at_s_equal_t)
    if kind == "black-forest-labs":
        return net, str(as_file(net, "bfl", folder / "flux.safetensors"))
    if kind == "diffusers pipeline":
        as_file(net, "diffusers", folder / "transformer/diffusion_pytorch_model.safetensors")
        (folder / "model_index.json").write_text("{}")
        return net, str(folder)
    if kind == "run without s":
        return net, str(as_run(net, folder))
    path = as_run(net, folder) if kind == "s = t, run" else as_file(net, "bfl", folder / "model.safetensors")
    return net, f"{{path: {path}, reset_s: true}}"


def started(world: World, folder: Path, *overrides: str) -> Trainer:
    folder.mkdir(parents=True, exist_ok=True)
    settings = config.load(TINY, [*RANDOM, f"trainer.output_dir={folder}", *overrides])
    with torch.device("meta"):
        system = config.build(settings, "system")
    return Trainer(config.build(settings, "trainer"), system, config.build(settings, "data"), settings["seed"], world)


@pytest.mark.parametrize(
    "kind", ["black-forest-labs", "diffusers pipeline", "run without s", "s = t, run", "s = t, exported"]
)
def test_at_the_start_every_s_gives_the_prediction_of_flow_matching(kind, tmp_path, alone):
    """Of the live weights and of the average; the first steps then train the second time."""
    net, origin = source(kind, tmp_path / "origin")
    run = started(alone, tmp_path / "run", f"trainer.init_from={origin}", "trainer.lr=1e-2", "trainer.warmup_steps=0")
    for t, s in TIMES:
        expected = prediction(net, t, t)
        assert expected.std() > 0.5
        for converted in (run.net, run.ema):
            torch.testing.assert_close(prediction(converted, t, s), expected, rtol=1e-5, atol=5e-5)

    for step in range(2):
        batches = [run.part("train")[step, place] for place in range(run.num_micro(step))]
        run.step(step, iter(batches), lambda: 0)
    assert (prediction(run.net, 0.9, 0.0) - prediction(run.net, 0.9, 0.9)).abs().max() > 1e-3


def test_without_reset_a_model_trained_at_s_equal_t_starts_elsewhere(tmp_path, alone):
    """Its embedding of t - s is random away from 0, which is what reset_s is for."""
    net = tiny()
    run = started(alone, tmp_path / "run", f"trainer.init_from={as_run(net, tmp_path / 'origin')}")
    torch.testing.assert_close(prediction(run.net, 0.9, 0.9), prediction(net, 0.9, 0.9), rtol=0, atol=2e-5)
    assert (prediction(run.net, 0.9, 0.0) - prediction(net, 0.9, 0.9)).abs().max() > 0.1


def test_the_script_of_the_page_reads_a_checkpoint_of_minfm(tmp_path, monkeypatch, alone):
    """Its tensors have FLUX's names, in groups of a distributed checkpoint."""
    net = tiny(s_branch=False)
    tensors = {}
    for name, parameter in net.named_parameters():
        tensors |= flux.split("bfl", name, parameter.detach(), net.width)
    other = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp.save({"model": other, "ema": tensors}, checkpoint_id=tmp_path / "step_00100000", no_dist=True)

    (script,) = re.findall(r"^```python\n(import torch.*?)^```", FINE_TUNING.read_text(), re.DOTALL | re.MULTILINE)
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        exec(script, {})
    run = started(alone, tmp_path / "run", f"trainer.init_from={tmp_path / 'minfm.safetensors'}")
    torch.testing.assert_close(prediction(run.net, 0.9, 0.0), prediction(net, 0.9, 0.9), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("config_file", "own"),
    [
        ("emoji/tune_selfe_lora", {"p_equal": 0.5, "adapt": True}),
        ("emoji/tune_flow_matching_lora", {"p_equal": 1.0, "adapt": True}),
        ("emoji/tune_selfe_full", {"p_equal": 0.5, "adapt": False}),
        ("emoji/tune_flow_matching_full", {"p_equal": 1.0, "adapt": False}),
        ("emoji/convert", {"p_equal": 0.5, "adapt": False}),
        ("mini/convert", {"p_equal": 0.5, "adapt": False}),
    ],
)
def test_shipped_configs_differ_in_what_their_names_say(config_file, own):
    settings = config.load(f"configs/{config_file}.yaml", [] if "mini" in config_file else RANDOM_WORDS)
    with torch.device("meta"):
        system = config.build(settings, "system")
    trainer = config.build(settings, "trainer")
    p_equal = settings["system"]["objective"]["params"].get("p_equal", 0.5)
    assert (p_equal, trainer.adapt is not None) == (own["p_equal"], own["adapt"])
    assert trainer.output_dir.name == Path(config_file).name
    assert getattr(trainer.init_from, "reset_s", False) == ("convert" in config_file)
    assert system.objective.start_step == 0
    if "tune" in config_file:
        inferencer = config.build(settings, "inferencer")
        assert inferencer.ckpt_dir == trainer.output_dir / "checkpoints"
        assert inferencer.output_dir == trainer.output_dir / "images"


def test_a_batch_skipped_before_the_first_checkpoint_is_replayed_with_the_weights_of_init_from(tmp_path, alone, capsys):
    _, origin = source("s = t, run", tmp_path / "origin")
    start = f"trainer.init_from={origin}"
    run, measured = started(alone, tmp_path / "run", start), MetricAccumulator()
    for place in range(run.num_micro(0)):
        batch = run.part("train")[0, place].to(alone.device)
        loss = run.system.loss(run.net, run.ema, batch, SampleRNG.of_step(run.seed, 0, batch.positions), 0)
        measured.add(loss, batch)
    record = {"step": 1, "micro_batches": measured.describe(), "grad_norm": 1.0, "limit": 2.0}

    settings = config.load(TINY, [*RANDOM, f"trainer.output_dir={tmp_path / 'run'}", start])
    capsys.readouterr()
    replay.replay(settings, record, None, alone)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    losses = [(float(row[3]), float(row[4])) for row in rows if row[0].isdigit()]
    assert len(losses) == 8
    for then, now in losses:
        assert then == pytest.approx(now, rel=1e-5)


def reset_on_ranks(world: World, path: str) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        net = MMDiT(**config.load(TINY, RANDOM)["system"]["backbone"]["params"])
    fsdp.shard(net, fsdp.make_mesh(world, None), precision="fp32", activation_checkpointing=False)
    fsdp.materialise(net, world.device, seed=0)
    flux.warm_start(Path(path), net)
    second_time.reset(net)
    return {name: fsdp.unsharded(p.detach()) for name, p in net.named_parameters()}


def test_the_reset_is_the_same_on_two_ranks(tmp_path, alone):
    path = str(as_file(tiny(), "bfl", tmp_path / "model.safetensors"))
    one, two = reset_on_ranks(alone, path), on_ranks(2, reset_on_ranks, path)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-6, msg=name)


def test_settings_that_do_not_fit_are_one_line(tmp_path, alone):
    file = as_file(tiny(), "bfl", tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="reset_s changes weights, whose optimizer state would not fit; remove optimi"):
        started(alone, tmp_path, "trainer.init_from={path: x, parts: [ema, optimizer], reset_s: true}")
    with pytest.raises(UserError, match=r"init_from.parts: .*model.safetensors holds weights only, no step; remove it"):
        started(alone, tmp_path / "a", f"trainer.init_from={{path: {file}, parts: [model, step]}}")
    with pytest.raises(UserError, match=r"init_from\.reset_s: changes weights that adapt freezes; convert all weights"):
        started(alone, tmp_path, f"trainer.init_from={{path: {file}, reset_s: true}}", "trainer.adapt={rank: 2}")
    origin = f"trainer.init_from={{path: {file}, reset_s: true}}"
    with pytest.raises(UserError, match=r"reset_s: system.backbone has no embedding of t - s; set s_branch: true"):
        started(alone, tmp_path / "b", origin, "system.backbone.params.s_branch=false")
