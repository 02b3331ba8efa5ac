"""Non-finite gradients and spikes: what counts as a spike, and a run with one of each."""

import json
import math
from itertools import chain
from pathlib import Path

import pytest

from selfe.errors import UserError
from selfe.training.grad_guard import GradGuard, GradGuardConfig
from tests.helpers import poisoned_objective
from tests.helpers.poisoned_objective import HUGE, NAN
from tests.helpers.train_processes import Run, command, finish, lines

POISONED = (
    "system.objective.module=tests.helpers.poisoned_objective.PoisonedObjective",
    "system.objective.params={start_step: 0, tau_steps: 4, aux_start_step: 4}",
    "trainer.health={warmup: 3}",
    "trainer.warmup_steps=1",
    "trainer.checkpoints={keep_last: 9}",
)


def test_a_spike_is_judged_by_what_is_usual():
    guard = GradGuard(GradGuardConfig(warmup=10, window=20, sigmas=6, factor=5))
    usual = [1 + 0.1 * math.sin(n) for n in range(30)]
    assert all(guard.accepts(norm, 1.0) for norm in usual[:9])
    assert guard.limit() == math.inf  # too early to know
    assert guard.accepts(1e3, 1.0)
    assert all(guard.accepts(norm, 1.0) for norm in usual)  # one outlier does not move a median
    assert 4.5 < guard.limit() < 5.5
    assert not guard.accepts(6.0, 1.0)
    assert not guard.accepts(math.nan, 1.0)
    assert not guard.accepts(math.inf, 1.0)
    assert guard.in_a_row == 3
    twin = GradGuard(guard.health, json.loads(json.dumps(guard.memory)))
    assert (twin.limit(), twin.in_a_row) == (guard.limit(), 3)
    assert guard.accepts(4.0, 1.0)
    assert guard.in_a_row == 0
    assert len(guard.norms) == 20


def test_wide_spread_makes_a_wide_limit():
    guard = GradGuard(GradGuardConfig(warmup=10))
    for n in range(100):
        assert guard.accepts(math.exp(n % 7 - 3), 1.0)  # norms over a factor of 400
    assert guard.limit() > 1e3
    assert GradGuard(GradGuardConfig(sigmas=None), {"norms": [1.0] * 200, "in_a_row": 0}).limit() == math.inf


def again(guard: GradGuard) -> GradGuard:
    """The guard as a resumed run has it."""
    return GradGuard(guard.health, json.loads(json.dumps(guard.memory)))


@pytest.mark.parametrize("jump", [8.0, 1 / 8])
def test_a_planned_change_of_level_costs_no_step(jump):
    """And a spike is still one as soon as the new level is known; the same after resuming at every step."""
    guard = GradGuard(GradGuardConfig(warmup=10))
    for number, level in enumerate((1.0, jump, 1.0)):
        assert (guard.enter(f"phase {number}") is None) == (number == 0)
        for step in range(20):
            assert guard.accepts(level * (1 + 0.1 * math.sin(step)), 1.0)
            guard = again(guard)
            assert guard.enter(f"phase {number}") is None
        assert not guard.accepts(6 * level, 1.0)
    assert guard.skipped == 3


def test_an_unplanned_level_that_lasts_is_adopted():
    guard = GradGuard(GradGuardConfig(warmup=10, adopt_after=5, max_skips=8))
    assert all(guard.accepts(1.0, 0.5) for _ in range(20))
    taken = []
    for step in range(10):
        taken.append(guard.accepts(8 + 0.1 * step, 0.6))
        guard.check(step, 8.0, None)
        guard = again(guard)
    assert taken == [False] * 4 + [True] * 6
    assert guard.skipped == 4


def test_only_the_norms_that_agree_become_the_new_level():
    guard = GradGuard(GradGuardConfig(warmup=10, adopt_after=5, max_skips=20))
    assert all(guard.accepts(1.0, 0.5) for _ in range(20))
    assert not any(guard.accepts(norm, 0.5) for norm in (1e3, 1e5, 1e4))  # spikes, then a level that lasts
    assert [guard.accepts(8.0, 0.5) for _ in range(6)] == [False] * 4 + [True] * 2
    assert max(guard.norms) == 8.0


def test_memory_is_a_snapshot():
    """A checkpoint is written in the background, while later steps change the guard."""
    guard = GradGuard(GradGuardConfig(warmup=10))
    assert all(guard.accepts(1.0, 0.5) for _ in range(20))
    assert not guard.accepts(9.0, 0.5)
    memory = guard.memory
    saved = json.dumps(memory)
    resumed = GradGuard(guard.health, memory)
    assert not guard.accepts(9.0, 0.5)
    assert not resumed.accepts(7.0, 0.5)
    assert json.dumps(memory) == saved


@pytest.mark.parametrize("kind", ["risen loss", "growing norms", "not finite"])
def test_divergence_ends_the_run(kind):
    guard = GradGuard(GradGuardConfig(warmup=10, adopt_after=5, max_skips=8))
    assert all(guard.accepts(1.0, 0.5) for _ in range(20))
    outcomes = {
        "risen loss": lambda step: (8.0, 3.0),
        "growing norms": lambda step: (8.0 * 3**step, 0.5),
        "not finite": lambda step: (8.0, math.nan),
    }
    for step in range(8):
        guard.check(step, 8.0, None)
        assert not guard.accepts(*outcomes[kind](step))
    with pytest.raises(UserError, match="8 steps in a row were skipped"):
        guard.check(8, 8.0, None)


CHANGES = (
    "system.objective.module=tests.helpers.poisoned_objective.JumpingObjective",
    "system.objective.params={start_step: 3, tau_steps: 2, aux_start_step: 8}",
    "trainer.total_batch_size=4",
    "trainer.phases=[{step: 12, total_batch_size: 8}]",
    "data.params.phases=[{step: 16, pixels: [2304]}]",
    "trainer.health={warmup: 2, max_skips: 1}",
    "trainer.max_steps=20",
    "trainer.log_every=1",
    "trainer.checkpoint_every=100",  # and where a run stops
)


@pytest.mark.parametrize(("jump", "size", "stops"), [(8.0, 2, [20]), (0.125, 1, [5, 9, 13, 17, 20])])
def test_a_run_whose_loss_batch_and_resolution_change_takes_every_step(tmp_path, jump, size, stops):
    """On two processes, and on one that is resumed in the middle of the warm-up of every phase."""
    changes = (*CHANGES, f"system.objective.params.jump={jump}")
    printed = "".join(finish(tmp_path, size, *changes, f"trainer.stop_step={stop}") for stop in stops)
    assert [line["train/skipped"] for line in lines(tmp_path)] == [0] * 20
    assert not (tmp_path / "skipped").exists()
    for step in poisoned_objective.CHANGES:
        assert printed.count(f"step {step}: now ") == 1


def test_a_spike_within_a_phase_is_skipped(tmp_path):
    changes = (*CHANGES, "system.objective.params.spike=11", "trainer.health={warmup: 2, max_skips: 3}")
    finish(tmp_path, 1, *changes, "trainer.stop_step=12")
    assert [path.name for path in (tmp_path / "skipped").iterdir()] == ["step_00000012.json"]


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("poisoned")
    finish(folder, 2, *POISONED)
    return folder


def test_a_run_skips_both_and_continues(poisoned, tmp_path):
    assert [int(path.stem[5:]) - 1 for path in sorted((poisoned / "skipped").iterdir())] == [NAN[0], HUGE[0]]
    by_step = {line["step"] - 1: line for line in lines(poisoned)}
    assert sorted(by_step) == list(range(12))
    assert "train/loss" not in by_step[NAN[0]]
    learned = {step: line for step, line in by_step.items() if step not in (NAN[0], HUGE[0])}
    assert all(math.isfinite(line["train/loss"]) for line in learned.values())
    assert by_step[11]["train/skipped"] == 2

    # one process decides the same, and a resumed run remembers the usual norms
    finish(tmp_path, 1, *POISONED, "trainer.checkpoint_every=8", "trainer.stop_step=8")
    finish(tmp_path, 1, *POISONED, "trainer.checkpoint_every=8")
    for one, two in zip(lines(tmp_path), lines(poisoned), strict=True):
        assert ("train/loss" in one) == ("train/loss" in two)
        assert one.get("train/loss", 0) == pytest.approx(two.get("train/loss", 0), rel=1e-4)


def test_replay(poisoned):
    """Losses of the skipped batch again, the one that is not a number included."""
    for step in (NAN[0], HUGE[0]):
        head, _, *rows, norms = command("replay", str(poisoned), str(step + 1)).splitlines()
        record = json.loads((poisoned / "skipped" / f"step_{step + 1:08d}.json").read_text())
        samples = list(chain(*record["micro_batches"]))
        assert sorted(sample["position"] for sample in samples) == list(range(8))
        for row, sample in zip(rows, samples, strict=True):
            position, _, _, then, now = row.split()[:5]
            assert int(position) == sample["position"]
            if step == NAN[0]:  # there is a checkpoint just before this step
                assert float(then) == pytest.approx(float(now), rel=1e-5, nan_ok=True)
                assert math.isnan(float(now)) == (sample["position"] == NAN[1])
        assert f"weights after {step // 2 * 2} steps" in head
        assert f"recorded {record['grad_norm']:.7g}" in norms


def test_too_many_in_a_row_stop_the_run(tmp_path):
    run = Run(tmp_path, 1, *POISONED, "trainer.health={warmup: 3, max_skips: 1}")
    assert run.wait() == [2]
    assert "step 7: 1 steps in a row were skipped, first non-finite: loss of " in run.failures[0]["message"]
