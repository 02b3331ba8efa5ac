"""The files of a run, and how `selfe report` reads them."""

import json
from pathlib import Path

import pytest

from selfe.tools.report import page
from selfe.tools.report.run_folder import RunFolder
from selfe.training.metrics import BINS
from tests.helpers.train_processes import finish

SHOW = (
    "trainer.samples.prompts=[a cat, a dog]",
    "trainer.samples.num_steps=[1, 2]",
    "trainer.samples.every=3",
    "trainer.cells_every=3",
    "trainer.val_every=3",
    "trainer.stop_step=6",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    finish(folder, 1, *SHOW)
    return folder


def test_a_run_shows_what_it_does(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last, shares = lines[-1], {name for line in lines for name in line if name.startswith("time/")}
    for line in lines:
        assert sum(value for name, value in line.items() if name.startswith("time/")) == pytest.approx(1)
    assert {"time/data", "time/encode", "time/forward", "time/self_evaluation", "time/backward"} <= shares
    assert {"time/optimizer", "time/validation", "time/samples"} <= shares
    measured = ("seconds_per_step", "images_per_second", "tokens_per_second", "tflops")
    assert all(last[f"speed/{name}"] > 0 for name in measured)
    assert last["memory/peak_gib"] > 0
    assert 0 < last["train/ema_distance"] < 1
    assert last["val/loss"] != last["val_ema/loss"]
    for name in ("samples", "samples_live", "cells"):
        assert [path.name for path in sorted((run / name).iterdir())] == ["step_00000003.png", "step_00000006.png"]
    assert (run / "samples/step_00000006.png").read_bytes() != (run / "samples_live/step_00000006.png").read_bytes()


def test_cells_hold_every_sample_at_its_times(run):
    (_, line) = [json.loads(line) for line in (run / "cells.jsonl").read_text().splitlines()]
    assert line.pop("step") == 6
    assert {"loss", "data_loss", "self_loss", "self_weight", "norm_ratio", "cosine"} <= line.keys()
    for name, table in line.items():
        assert [len(row) for row in table] == [BINS] * BINS
        known = {(t, s): value for t, row in enumerate(table) for s, value in enumerate(row) if value is not None}
        assert known
        assert all(s <= t for t, s in known)
        if name == "cosine":
            assert all(-1 <= value <= 1 for value in known.values())
        if name == "self_weight":
            assert all(0 <= value <= 1 for value in known.values())


def test_the_report_reads_what_a_run_writes(run):
    folder = RunFolder(run, "run")
    state, (described,) = folder.state(), page.static([folder], 40)["runs"]
    assert (state["state"], state["step"], state["end"], state["skipped"]) == ("finished", 6, 6, 0)
    assert state["checkpoint"]["step"] == 6
    assert state["memory_gib"] > 0
    assert state["images_per_second"] > 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name in set().union(*lines):
        missing = 0 if name.startswith("time/") else None
        assert described["columns"][name] == [line.get(name, missing) for line in lines]
    assert described["cells"]["steps"] == [3, 6]
    assert [sheet["step"] for sheet in described["sheets"]["live"]] == [3, 6]
    assert all(sheet["prompts"] == ["a cat", "a dog"] for sheet in described["sheets"]["ema"])
    assert [mark["text"] for mark in described["marks"]] == ["self-evaluation", "self-evaluation and auxiliary term"]
