"""Sick gradients: what counts as a spike, and a run that meets two of them."""

import json
import math
from itertools import chain
from pathlib import Path

import pytest
from poison import HUGE, NAN
from runs import Run, finish, lines, script

from selfe.health import Guard, Health

POISONED = (
    "system.objective.module=poison.Poisoned",
    "system.objective.params={start_step: 0, tau_steps: 4, aux_start_step: 4}",
    "trainer.health={warmup: 3}",
    "trainer.warmup_steps=1",
    "trainer.checkpoints={keep_last: 9}",
)


def test_a_spike_is_judged_by_what_is_usual():
    guard = Guard(Health(warmup=10, window=20, sigmas=6, factor=5))
    usual = [1 + 0.1 * math.sin(n) for n in range(30)]
    assert all(guard.accepts(norm) for norm in usual[:9])
    assert guard.limit() == math.inf  # too early to know
    assert guard.accepts(1e3)
    assert all(guard.accepts(norm) for norm in usual)  # one outlier does not move a median
    assert 4.5 < guard.limit() < 5.5
    assert not guard.accepts(6.0)
    assert not guard.accepts(math.nan)
    assert not guard.accepts(math.inf)
    assert guard.in_a_row == 3
    twin = Guard(guard.health, json.loads(json.dumps(guard.memory)))
    assert (twin.limit(), twin.in_a_row) == (guard.limit(), 3)
    assert guard.accepts(4.0)
    assert guard.in_a_row == 0
    assert len(guard.norms) == 20


def test_wide_spread_makes_a_wide_limit():
    guard = Guard(Health(warmup=10))
    for n in range(100):
        assert guard.accepts(math.exp(n % 7 - 3))  # norms over a factor of 400
    assert guard.limit() > 1e3
    assert Guard(Health(sigmas=None), {"norms": [1.0] * 200, "in_a_row": 0}).limit() == math.inf


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("poisoned")
    finish(folder, 2, *POISONED)
    return folder


def test_a_run_skips_both_and_goes_on(poisoned, tmp_path):
    assert [int(path.stem[5:]) for path in sorted((poisoned / "skipped").iterdir())] == [NAN[0], HUGE[0]]
    found = {line["step"]: line for line in lines(poisoned)}
    assert sorted(found) == list(range(12))
    assert "loss" not in found[NAN[0]]
    assert all(math.isfinite(line["loss"]) for step, line in found.items() if step not in (NAN[0], HUGE[0]))
    assert found[11]["skipped"] == 2
    # the same verdicts by one process, and a resumed run remembers what is usual
    finish(tmp_path, 1, *POISONED, "trainer.stop_step=8")
    finish(tmp_path, 1, *POISONED)
    for one, two in zip(lines(tmp_path), lines(poisoned), strict=True):
        assert ("loss" in one) == ("loss" in two)
        assert one.get("loss", 0) == pytest.approx(two.get("loss", 0), rel=1e-4)


def test_replay(poisoned):
    """Losses of the skipped batch again, the one that is not a number included."""
    for step in (NAN[0], HUGE[0]):
        head, _, *rows, norms = script("replay.py", str(poisoned), str(step)).splitlines()
        told = json.loads((poisoned / "skipped" / f"step_{step:08d}.json").read_text())
        samples = list(chain(*told["micro_batches"]))
        assert sorted(sample["position"] for sample in samples) == list(range(8))
        for row, sample in zip(rows, samples, strict=True):
            position, _, _, then, now = row.split()[:5]
            assert int(position) == sample["position"]
            if step == NAN[0]:  # a checkpoint lies just before this step
                assert float(then) == pytest.approx(float(now), rel=1e-5, nan_ok=True)
                assert math.isnan(float(now)) == (sample["position"] == NAN[1])
        assert f"weights after {step // 2 * 2} steps" in head
        assert f"recorded {told['grad_norm']:.7g}" in norms


def test_too_many_in_a_row_stop_the_run(tmp_path):
    run = Run(tmp_path, 1, *POISONED, "trainer.health={warmup: 3, max_skips: 1}")
    assert run.wait() == [2]
    assert "step 6: 1 steps in a row were skipped, gradient norm nan" in run.failures[0]["message"]
