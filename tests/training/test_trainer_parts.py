"""Parts of the trainer, all at once: optimizer, schedule, averages, validation metrics and loggers."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from selfe import config
from selfe.checkpoint import flux, state
from selfe.errors import UserError
from tests.helpers.ranks import on_ranks
from tests.helpers.short_runs import assert_resumed, train_and_resume
from tests.helpers.train_processes import QUICK, ROOT, Run, command, copy_until, files, finish, lines

TRACKS = (
    "trainer.ema=[{module: selfe.training.ema.ConstantDecay, params: {decay: 0.9}},"
    "{module: selfe.training.ema.PowerFunction, params: {std: 0.1}}]"
)
OTHERS = (
    "trainer.optimizer={module: selfe.optimizers.muon.Muon, params: {groups: [{names: ['*.bias'], weight_decay: 0}]}}",
    "trainer.schedule.module=selfe.training.schedules.Cosine",
    "trainer.ema_warmup=null",
    "trainer.val_metrics=[{module: selfe.training.val_metrics.LossAtTimes, params: {times: [0.5]}}]",
    "trainer.loggers=[{module: examples.csv_logger.CsvLogger}]",
    "system.objective.params.t_distribution=uniform",
    "trainer.val_every=2",
)
GRIDS = (
    "trainer.samples={every: 4, prompts: [a cat], num_steps: [1, 2], size: [32, 32], weights: [ema, live, ema_std_0.1]}"
)
HALF, LAST = Path("checkpoints/step_00000002"), Path("checkpoints/step_00000004")


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    finish(folder, 2, *OTHERS, TRACKS, GRIDS, "trainer.stop_step=4")
    return folder


@pytest.fixture
def half(straight, tmp_path) -> Path:
    """The run as it was after two steps."""
    copy_until(HALF, straight, tmp_path)
    shutil.copy(straight / "metrics.csv", tmp_path)
    return tmp_path


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(straight, half):
    """And the logger has every step once."""
    finish(half, 2, *OTHERS, TRACKS, "trainer.stop_step=4")
    assert files(half / LAST) == files(straight / LAST)
    assert lines(half) == lines(straight)

    rows = [row for row in csv.reader((half / "metrics.csv").open()) if row[1] == "train/loss"]
    assert [(int(step), float(loss)) for step, _, loss in rows] == [
        (line["step"], line["train/loss"]) for line in lines(straight)
    ]


def test_the_same_on_one_process(straight, tmp_path):
    finish(tmp_path, 1, *OTHERS, TRACKS, "trainer.stop_step=4")
    for one, two in zip(lines(tmp_path), lines(straight), strict=True):
        assert one.keys() == two.keys()
        for name in ("train/loss", "val/loss", "val_ema/loss", "val_ema_std_0.1/loss", "val/loss_at_0.5"):
            assert one.get(name) == pytest.approx(two.get(name), abs=1e-5)


def test_every_average_is_validated_and_every_metric_logged(straight):
    validated = lines(straight)[-1]
    losses = [validated[f"{prefix}/loss"] for prefix in ("val", "val_ema", "val_ema_std_0.1")]
    assert len(set(losses)) == 3
    assert all(f"{prefix}/loss_at_0.5" in validated for prefix in ("val", "val_ema", "val_ema_std_0.1"))
    assert "val_plain/loss_at_0.5" not in validated


def test_every_average_that_is_listed_has_its_sample_grid(straight):
    sheets = [straight / name / "step_00000004.png" for name in ("samples", "samples_live", "samples_ema_std_0.1")]
    assert len({sheet.read_bytes() for sheet in sheets}) == 3
    settings = config.load(QUICK, [TRACKS, "trainer.ema_warmup=null", "trainer.samples.weights=[ema, ema_std_0.2]"])
    with pytest.raises(UserError, match=r"samples.weights: ema_std_0.2 is not one of live, ema, ema_std_0.1"):
        config.build(settings, "trainer")


def test_another_optimizer_or_average_is_refused_or_starts_anew(half):
    single = "trainer.ema=[{module: selfe.training.ema.ConstantDecay, params: {decay: 0.9}}]"
    adamw = "trainer.optimizer={module: selfe.optimizers.adamw.AdamW}"
    run = Run(half, 1, *OTHERS, single, adamw)
    assert run.wait() == [2]
    message = run.failures[0]["message"]
    assert (
        "the trainer differs from the run's: trainer.optimizer.module was selfe.optimizers.muon.Muon, is now" in message
    )
    assert "trainer.ema was ['ema', 'ema_std_0.1'], is now ['ema']" in message
    assert "trainer.allow_changes=[trainer.optimizer.module,trainer.ema]" in message

    wider = TRACKS[:-1] + ", {module: selfe.training.ema.PowerFunction, params: {std: 0.2}}]"
    allowed = "trainer.allow_changes=[trainer.optimizer.module,trainer.ema]"
    output = finish(half, 1, *OTHERS, wider, adamw, allowed, "trainer.stop_step=3")
    assert f"not in {half / HALF}, so started anew: ema_std_0.2, state of the optimizer" in output
    assert [line["step"] for line in lines(half)] == [1, 2, 3]


def parameters_of(checkpoint: Path, weights: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint under the names of an exported folder."""
    with torch.device("meta"):
        net = config.build(config.load(QUICK), "system").backbone
    net = net.to_empty(device="cpu").requires_grad_(False)
    assert state.load_weights(checkpoint, net, weights) == 4
    width = net.width
    named = [flux.split("bfl", name, p.detach(), width) for name, p in net.named_parameters()]
    return {name: tensor for tensors in named for name, tensor in tensors.items()}


@pytest.mark.parametrize("chosen", [("--weights", "ema_std_0.1"), ("--ema-std", "0.1")], ids=["saved", "reconstructed"])
def test_an_average_is_exported_by_its_name_or_width(chosen, straight, tmp_path, monkeypatch):
    monkeypatch.setenv("SELFE_SKIP_PRETRAINED", "1")
    output = command("export", str(straight / LAST), str(tmp_path / "out"), "--dtype", "fp32", "--trust", *chosen)
    assert "(ema_std_0.1 weights, fp32) exported to" in output
    assert json.loads((tmp_path / "out/config.json").read_text())["weights"] == "ema_std_0.1"
    (path,) = (tmp_path / "out").glob("*.safetensors")
    exported, expected = load_file(path), parameters_of(straight / LAST, "ema_std_0.1")
    assert exported.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(exported[name], tensor, rtol=0, atol=1e-6 if "--ema-std" in chosen else 0)
    with pytest.raises(UserError, match=r"has no weights 'ema_std_0.2'; those that it has are .*live"):
        parameters_of(straight / LAST, "ema_std_0.2")


OTHER_PARTS = {
    "moments in bf16": ["trainer.optimizer={module: selfe.optimizers.adamw.AdamW, params: {moments: bf16}}"],
    "wsd": ["trainer.schedule={module: selfe.training.schedules.WSD, params: {decay_share: 0.9}}"],
}


def test_other_optimizers_and_schedules_train_on_two_ranks_and_resume_bitwise(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    runs = {name: ["trainer.lr=1e-2", "trainer.warmup_steps=0", *own] for name, own in OTHER_PARTS.items()}
    on_ranks(2, train_and_resume, runs, str(tmp_path))
    for name in runs:
        assert_resumed(tmp_path / name)
    one, two = (lines(tmp_path / name / "once")[-1] for name in runs)
    assert one["train/lr"] != two["train/lr"]
    assert one["train/loss"] != two["train/loss"]


@pytest.mark.parametrize("page", ["training", "fine_tuning"])
def test_the_configs_of_the_pages_fit_the_shipped_config(page, tmp_path, monkeypatch):
    monkeypatch.setenv("SELFE_CACHE_DIR", str(tmp_path))
    texts = re.findall(r"^```yaml\n(.*?)^```", (ROOT / f"docs/{page}.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(texts) >= 2
    for text in texts:
        path = tmp_path / "config.yaml"
        path.write_text(f"base: {ROOT}/configs/train/selfe_0.5b.yaml\n{text}")
        config.build(config.load(path), "trainer")
