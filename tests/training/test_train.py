"""The trainer's arithmetic: schedule, accumulation, samples of each rank. The loop itself runs in `test_smoke.py`."""

import gzip
import json
import math
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from selfe import config, log, train
from selfe.checkpoint import verify
from selfe.data.loader import MicroBatches
from selfe.device import choose_precision
from selfe.distributed.collectives import World
from selfe.errors import UserError
from selfe.inference import job
from selfe.io.folder_lock import FolderLock
from selfe.optimizers.adamw import AdamW
from selfe.training import ema, grad_guard, run_info
from selfe.training.ema import ConstantDecay, PowerFunction
from selfe.training.profiling import ProfileConfig, Profiler
from selfe.training.schedules import WSD, Constant, Cosine, Linear
from selfe.training.settings import BatchPhase, TrainerConfig
from selfe.training.throughput import StepTimer
from selfe.training.visuals import SampleGridConfig
from selfe.types import Batch, TextCond, packed
from tests.helpers import train_processes
from tests.helpers.train_processes import QUICK


def trainer(**changes) -> TrainerConfig:
    return TrainerConfig(
        **{"output_dir": "x", "max_steps": 10_000, "total_batch_size": 16, "micro_batch_size": 2} | changes
    )


def test_schedule_of_the_paper():
    """1000 steps of warm-up, then linearly from 3e-4 to 1e-5 (S.2)."""
    paper = trainer(max_steps=710_000)
    assert paper.lr_at(0) == pytest.approx(3e-7)
    assert paper.lr_at(499) == pytest.approx(1.5e-4)
    assert paper.lr_at(999) == paper.lr_at(1000) == 3e-4
    assert paper.lr_at((1000 + 709_999) // 2) == pytest.approx((3e-4 + 1e-5) / 2, rel=1e-4)
    assert paper.lr_at(709_999) == pytest.approx(1e-5)
    assert all(trainer(warmup_steps=0, max_steps=n).lr_at(0) == 3e-4 for n in (1, 2, 5))


def test_other_schedules_share_warm_up_start_and_end():
    """`decay_start` and phases hold for all; only the way from `lr` to `min_lr` differs."""
    settings = {"lr": 1.0, "min_lr": 0.2, "warmup_steps": 10, "max_steps": 101, "decay_start": 50}
    cosine = trainer(schedule=Cosine(), **settings)
    assert [cosine.lr_at(step) for step in (4, 9, 49, 50)] == [0.5, 1.0, 1.0, 1.0]
    assert cosine.lr_at(75) == pytest.approx(0.6)
    assert cosine.lr_at(62) == pytest.approx(1 - 0.8 * (1 - math.cos(math.pi * 12 / 50)) / 2)
    assert cosine.lr_at(100) == pytest.approx(0.2)
    assert {trainer(schedule=Constant(), **settings).lr_at(step) for step in (9, 50, 100)} == {1.0}

    # the last quarter of the run; in a phase, from its own learning rate
    wsd = trainer(schedule=WSD(0.25), **settings | {"decay_start": 0, "max_steps": 100})
    assert wsd.lr_at(75) == 1.0
    assert wsd.lr_at(81) == pytest.approx(1 - 0.8 * math.sqrt(6 / 24))
    assert wsd.lr_at(99) == pytest.approx(0.2)
    assert trainer(schedule=WSD(0.25, "linear"), **settings | {"decay_start": 0}).lr_at(88) == pytest.approx(
        0.6, abs=0.02
    )
    phased = trainer(schedule=Cosine(), phases=(BatchPhase(60, lr=0.6),), **settings)
    assert phased.lr_at(60) == 0.6
    assert phased.lr_at(80) == pytest.approx(0.4)


def test_phases():
    phases = (BatchPhase(3000, total_batch_size=8), BatchPhase(5000, lr=1e-4), BatchPhase(8000, total_batch_size=32))
    phased = trainer(phases=phases)
    assert [len(phased.samples_at(step)) for step in (0, 2999, 3000, 7999, 8000)] == [16, 16, 8, 8, 32]
    assert phased.samples_at(3001) == range(3000 * 16 + 8, 3000 * 16 + 16)
    assert phased.samples_at(8000).start == phased.samples_at(7999).stop == 3000 * 16 + 5000 * 8
    assert [phased.micro_batches(2, 2, step) for step in (0, 3000, 8000)] == [4, 2, 8]
    assert phased.lr_at(4999) == trainer().lr_at(4999)
    assert phased.lr_at(5000) == 1e-4
    assert phased.lr_at(7500) == pytest.approx((1e-4 + 1e-5) / 2, rel=1e-3)
    assert phased.lr_at(9999) == pytest.approx(1e-5)
    with pytest.raises(ValueError, match=r"sorted by step, each step once, got \[5, 3\]"):
        trainer(phases=(BatchPhase(5), BatchPhase(3)))
    with pytest.raises(UserError, match=r"trainer.total_batch_size: 24 leaves 3 for each of 8 processes"):
        trainer(phases=(BatchPhase(5, total_batch_size=24),)).micro_batches(8, 2, 5)


def test_micro_batches_per_step():
    assert trainer().micro_batches(world_size=4, batch_multiple=2) == 2
    with pytest.raises(UserError, match=r"trainer.total_batch_size: 16 is not a multiple of the 3 processes"):
        trainer().micro_batches(3, 2)
    with pytest.raises(UserError, match=r"trainer.micro_batch_size: the objective needs a multiple of 4, got 2"):
        trainer().micro_batches(1, 4)


@pytest.mark.parametrize(
    ("most", "processes", "micro_batches"), [(32, 1, 24), (32, 8, 3), (32, 16, 2), (20, 8, 6), (1000, 2, 1), (7, 4, 32)]
)
def test_the_largest_micro_batch_that_divides_the_batch_is_taken(most, processes, micro_batches):
    """Of 768 samples: at most `most`, and even, so that every micro-batch has the same share of samples with s < t."""
    config = trainer(total_batch_size=768, micro_batch_size=most)
    assert config.micro_batches(processes, 2) == micro_batches


TRAINING = sorted(Path("configs").glob("train/*.yaml")) + sorted(Path("configs").glob("one_gpu/*.yaml"))


@pytest.mark.parametrize("path", TRAINING, ids=str)
def test_shipped_configs_start_on_any_number_of_gpus_that_divides_their_batch(path):
    settings = config.load(str(path))
    shipped = config.build(settings, "trainer")
    for phase in (0, *(phase.step for phase in shipped.phases)):
        total = len(shipped.samples_at(phase))
        for processes in range(1, 129):
            if total % (2 * processes):
                with pytest.raises(UserError, match=r"trainer.total_batch_size"):
                    shipped.micro_batches(processes, 2, phase)
            else:
                micro = total // processes // shipped.micro_batches(processes, 2, phase)
                assert 2 <= micro <= shipped.micro_batch_size
                assert micro * processes * shipped.micro_batches(processes, 2, phase) == total


@pytest.mark.parametrize("name", ["max_steps", "total_batch_size", "micro_batch_size"])
def test_values_out_of_range_are_named(name):
    with pytest.raises(ValueError, match=f"{name} must be between 1 and "):
        trainer(**{name: 0})


PERIODS = ("log_every", "checkpoint_every", "cells_every", "val_every")


@pytest.mark.parametrize("name", PERIODS)
def test_a_period_out_of_range_is_named_with_the_way_to_switch_it_off(name):
    assert getattr(trainer(**{name: None}), name) is None
    with pytest.raises(ValueError, match=rf"{name} must be between 1 and 1e\+09, got 0; null switches this off"):
        trainer(**{name: 0})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": -1.0}, "lr must be between 0 and 10, got -1.0"),
        ({"num_workers": -1}, "num_workers must be between 0 and 1024, got -1"),
        ({"betas": (0.9, 1.0)}, "betas must be in"),
        ({"ema_decay": 1.5}, "ema_decay must be between 0 and 1, got 1.5"),
        ({"ema": (PowerFunction(),), "ema_decay": 0.9}, "ema_decay and ema are both set; remove one of them"),
        ({"ema": (PowerFunction(),), "ema_warmup": False}, "ema_warmup and ema are both set"),
        ({"ema": (ConstantDecay(), PowerFunction(), PowerFunction())}, "ema: two tracks are ema_std_0.05"),
        ({"schedule": WSD(), "decay_start": 5}, "decay_start: 5 and a WSD schedule, .*; set 0"),
    ],
)
def test_values_that_would_fail_later_fail_at_once(changes, said):
    with pytest.raises(ValueError, match=said):
        trainer(**changes)


@pytest.mark.parametrize("changes", [{"every": 0}, {"num_steps": ()}, {"num_steps": (0,)}, {"size": (0, 64)}])
def test_samples_that_could_not_be_drawn(changes):
    with pytest.raises(ValueError, match=r"must be between 1 and|num_steps: the list is empty"):
        SampleGridConfig(**changes)


def test_pictures_that_cannot_be_cut_to_patches():
    settings = config.load("configs/mini/flow_matching.yaml", ["data.params.size=9"])
    system, data = config.build(settings, "system"), config.build(settings, "data")
    with pytest.raises(UserError, match=r"image sides are multiples of 9, but system.autoencoder needs .* of 2;"):
        system.check_data(data)


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    lock = FolderLock(tmp_path / "file" / "run", "trainer.output_dir", lost=pytest.fail)
    with pytest.raises(UserError, match=r"file/run: cannot be written to .*; set trainer.output_dir"), lock:
        pass
    said = r"file/run: cannot be written to .*; set inferencer.output_dir"
    with pytest.raises(UserError, match=said), job.opened(tmp_path / "file" / "run", {}, [], "flat", pytest.fail):
        pass


def test_the_score_of_a_checkpoint_depends_on_its_weights_alone(tmp_path):
    """With nothing learned, the objective changes its value over its phases; the score does not."""
    still = "trainer.lr=0", "trainer.min_lr=0", "trainer.weight_decay=0", "trainer.val_every=4"
    train_processes.finish(tmp_path, 1, *still)
    validated = [line for line in train_processes.lines(tmp_path) if "val/loss" in line]
    assert len(validated) == 3
    assert len({line["val_ema/loss"] for line in validated}) > 1
    assert len({line["val_plain/loss"] for line in validated}) == 1
    scores = {verify.read_marker(path)["score"] for path in verify.list_checkpoints(tmp_path / "checkpoints")}
    assert scores == {validated[0]["val_plain/loss"], None}


class Positions:
    """A data set whose samples are named after what was requested."""

    has_val, multiple = False, 1

    def resolution(self, step: int) -> tuple[int, ...]:
        return (1,)

    def costs(self, seed: int, step: int, samples: range, split: str) -> tuple[int, ...]:
        return tuple(1 + position // 5 for position in range(len(samples)))

    def batch(self, seed: int, step: int, samples: range, positions: Sequence[int], split: str) -> Batch:
        return Batch((), tuple(str(step) for _ in positions), tuple(positions), ())


@pytest.mark.parametrize(("size", "micro"), [(1, 16), (1, 2), (2, 4), (4, 2), (8, 2)])
def test_every_position_of_a_step_once_on_any_number_of_ranks(size, micro):
    accumulation = 16 // size // micro
    for step in range(3):
        seen = []
        for rank in range(size):
            world = World(rank, size, torch.device("cpu"))
            part = MicroBatches(Positions(), 0, trainer().samples_at, micro, 2, world, "train")
            for place in range(accumulation):
                batch = part[step, place]
                assert batch.prompts == (str(step),) * micro
                seen += batch.positions
        assert sorted(seen) == list(range(16))


class CountedNet:
    """A denoiser whose calls cost an operation per token."""

    def __call__(self, x_t, t, s, cond, features=(), route=None):
        return x_t.tokens

    def flops(self, image_lens: Sequence[int], text_lens: Sequence[int], token_times, features, route) -> int:
        assert (token_times, features, route) == (False, (), None)
        return sum(image_lens) + sum(text_lens)


def test_rates_count_every_call_by_its_own_lengths_and_samples_that_were_learned_from():
    timer = StepTimer(torch.device("cpu"), peak_tflops=1e-9)
    net, times = timer.around(CountedNet()), torch.zeros(1)
    for tokens, learns in ((100, True), (7, True), (50, False)):
        x = packed(torch.zeros(tokens, 1), [(1, tokens)])
        with torch.set_grad_enabled(learns):
            net(x, times, times, TextCond(packed(torch.zeros(1, 1), [(1, 1)]), torch.zeros(1, 1)))

    rates = timer.rates(num_steps=2, num_samples=8, num_tokens=64)
    assert rates["speed/tokens_per_second"] == pytest.approx(8 * rates["speed/images_per_second"])
    operations = 3 * (101 + 8) + 51  # a backward pass counts as two forward passes
    seconds = 2 * rates["speed/seconds_per_step"]
    assert rates["speed/images_per_second"] * seconds == pytest.approx(8)
    assert rates["speed/tflops"] * 1e12 * seconds == pytest.approx(operations)
    assert rates["speed/mfu"] == pytest.approx(rates["speed/tflops"] / 1e-9)
    assert timer.rates(0, 0, 0)["speed/tflops"] == 0


def test_a_profile_of_chosen_steps(tmp_path):
    profiler = Profiler(ProfileConfig((1, 3)), tmp_path, World(0, 1, torch.device("cpu")))
    for step, side in enumerate((2, 3, 4, 5)):
        profiler.before(step)
        torch.ones(side, side) @ torch.ones(side, side)
        profiler.after(step, last=step == 3)
    (path,) = tmp_path.rglob("trace.json.gz")
    assert path.parent == tmp_path / "profile" / "steps_00000001_00000003"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    shapes = [event["args"]["Input Dims"][0] for event in events if event.get("name") == "aten::mm"]
    assert shapes == [[3, 3], [4, 4]]


def test_a_profile_of_no_steps_is_refused():
    with pytest.raises(ValueError, match=r"steps must be \[first, end\] with 0 <= first < end, got \[3, 3\]"):
        ProfileConfig((3, 3))


def test_ema_decay():
    assert ConstantDecay().decay_at(0) == 0.9999
    assert ConstantDecay(warmup=True).decay_at(0) == 0.1
    assert ConstantDecay(warmup=True).decay_at(10**6) == 0.9999


def test_the_tracks_of_a_run_have_names_by_their_settings():
    assert list(trainer().ema_tracks) == ["ema"]
    assert trainer(ema_decay=0.99, ema_warmup=True).ema_tracks["ema"].decay_at(10**6) == 0.99
    tracks = trainer(ema=(PowerFunction(0.1), ConstantDecay(0.99), PowerFunction(0.05))).ema_tracks
    assert list(tracks) == ["ema", "ema_decay_0.99", "ema_std_0.05"]


def test_a_power_function_average_weights_steps_by_their_power():
    """The first step is the average; afterwards step t counts as t^gamma, up to the rounding of sums to integrals."""
    assert ema.gamma_of(0.05) == pytest.approx(16.97, abs=0.01)  # EDM2's values
    assert ema.gamma_of(0.1) == pytest.approx(6.94, abs=0.01)
    track, weights = PowerFunction(0.1), np.zeros(400)
    for step in range(400):
        decay = track.decay_at(step)
        weights = decay * weights
        weights[step] = 1 - decay
    assert weights.sum() == pytest.approx(1)
    assert track.decay_at(0) == 0
    steps = np.arange(1, 401) / 400
    mean = weights @ steps
    assert np.sqrt(weights @ (steps - mean) ** 2) == pytest.approx(0.1, rel=0.01)


def test_ema_stays_in_full_precision():
    """In bf16 a decay of 0.9999 would never move: one update is smaller than the rounding."""
    average, net = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    torch.nn.init.ones_(average.weight), torch.nn.init.constant_(net.weight, 1.01)
    ema.update(average, net, 0.9999)
    assert average.weight.item() == pytest.approx(1 + 1e-6, abs=2e-7)
    assert average.weight.item() != 1
    assert average.weight.to(torch.bfloat16) == 1


def test_configured_defaults_are_the_papers():
    settings = config.load("configs/train/selfe.yaml")
    paper = config.build(settings, "trainer")
    assert (paper.lr, paper.min_lr, paper.warmup_steps, paper.betas) == (3e-4, 1e-5, 1000, (0.9, 0.95))
    assert (paper.clip_norm, paper.ema_decay, paper.max_steps) == (1.0, 0.9999, 710_000)
    assert (type(paper.schedule), type(paper.optimizer), list(paper.ema_tracks)) == (Linear, AdamW, ["ema"])
    assert [len(paper.samples_at(step)) for step in (0, 499_999, 500_000)] == [1024, 1024, 768]


def test_a_run_in_which_every_step_was_skipped_is_a_failure(tmp_path):
    """It names the first tensor that is not finite, and saves nothing from which the next start would go on."""
    objective = "system.objective.module=tests.helpers.poisoned_objective.NanObjective"
    run = train_processes.Run(tmp_path, 2, objective, "trainer.stop_step=3", "trainer.checkpoint_every=1")
    assert run.wait() == [2, 2]
    message = run.failures[0]["message"]
    assert "nothing was learned, every step from 1 to 3 was skipped" in message
    assert "step 3, gradient norm nan, first non-finite: loss of " in message
    assert not list(tmp_path.glob("checkpoints/step_*"))


def test_the_first_tensor_that_is_not_finite(alone):
    """In the order in which they depend on each other: weights, losses, gradients."""
    net, average = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    samples = [(Batch((), ("a", "b"), (0, 1), ("a.png", "b.png")), torch.zeros(3, 2))]
    net(torch.ones(2)).sum().backward()

    def first() -> tuple[int, str] | None:
        return grad_guard.first_non_finite(net, average, samples)

    assert first() is None
    net.bias.grad[1] = float("nan")
    assert first() == (2, "gradient of bias")
    samples[0][1][0, 1] = float("inf")
    assert first() == (1, "loss of b.png")
    average.weight.data[0, 0] = float("nan")
    assert first() == (0, "EMA weight weight")


def test_revision_and_changes_are_recorded_for_our_own_checkout_only(tmp_path):
    """A package installed inside another project's repository records its version instead."""
    repository = tmp_path / "theirs"
    repository.mkdir()
    git = ["git", "-c", "user.name=a", "-c", "user.email=b"]
    subprocess.run([*git, "init", "-q"], cwd=repository, check=True)
    (repository / "private.txt").write_text("secret")
    subprocess.run([*git, "add", "."], cwd=repository, check=True)
    subprocess.run([*git, "commit", "-qm", "one"], cwd=repository, check=True)

    installed = repository / ".venv/lib/site-packages"
    (installed / "selfe/training").mkdir(parents=True)
    (installed / "selfe/training/run_info.py").write_text("")
    assert not run_info.is_checkout(installed)
    assert not run_info.is_checkout(repository)
    assert not run_info.is_checkout(tmp_path)

    # a checkout of this project
    (repository / "selfe/training").mkdir(parents=True)
    (repository / "selfe/training/run_info.py").write_text("")
    assert not run_info.is_checkout(repository)
    subprocess.run([*git, "add", "selfe"], cwd=repository, check=True)
    assert run_info.is_checkout(repository)


@pytest.mark.parametrize(
    ("capability", "avx512_bf16", "amx", "chosen"),
    [
        ("AVX512", True, False, "bf16"),
        ("AVX512_VNNI", False, True, "bf16"),
        ("AVX512", False, False, "fp32"),
        ("AVX2", True, True, "fp32"),  # ATEN_CPU_CAPABILITY=avx2
        ("DEFAULT", False, False, "fp32"),
    ],
)
def test_precision_auto_is_bf16_where_the_cpu_has_it(monkeypatch, capability, avx512_bf16, amx, chosen):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu) == chosen
    assert [choose_precision(given, cpu) for given in ("bf16", "fp32")] == ["bf16", "fp32"]


@pytest.mark.parametrize("supported", [True, False])
def test_precision_auto_on_accelerators_asks_the_device_without_emulation(monkeypatch, supported):
    backend = SimpleNamespace(is_bf16_supported=lambda including_emulation: supported and not including_emulation)
    monkeypatch.setattr(torch, "get_device_module", lambda device: backend)
    assert choose_precision("auto", torch.device("meta")) == ("bf16" if supported else "fp32")


def test_the_chosen_precision_is_recorded_and_a_change_on_resuming_is_shown(tmp_path, monkeypatch):
    """As when a run continues on a machine without bf16: it continues in fp32, and a line says so.

    With all periods switched off: only the last step of each start is logged and saved, and nothing is validated.
    """
    said, off = [], [f"trainer.{name}=null" for name in (*PERIODS, "samples.every")]
    monkeypatch.setattr(log, "print_line", said.append)
    for capability, chosen in (("AVX512", "bf16"), ("AVX2", "fp32")):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
        stop = f"trainer.stop_step={1 + (chosen == 'fp32')}"
        train.main([str(QUICK), f"trainer.output_dir={tmp_path}", "trainer.precision=auto", *off, stop])
        assert f"trainer.precision: auto is {chosen} on this machine (CPU with {capability})" in said
        assert config.load(tmp_path / "config.yaml")["trainer"]["precision"] == chosen
    assert "config differs from the run so far: trainer.precision: bf16 -> fp32" in said
    assert any("first:    checkpoint after step 1, no validation" in text for text in said)
    assert [line["step"] for line in train_processes.lines(tmp_path)] == [1, 2]
    assert not any("val/loss" in line for line in train_processes.lines(tmp_path))
    assert not (tmp_path / "cells").exists()
