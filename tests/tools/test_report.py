"""The page that compares runs, and what a run folder holds for it."""

import base64
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from selfe.tools import report
from selfe.training.metrics import BINS
from tests.helpers.train_processes import command, finish

SHOW = (
    "trainer.samples.prompts=[a cat, a dog]",
    "trainer.samples.num_steps=[1, 2]",
    "trainer.samples.every=3",
    "trainer.cells_every=3",
    "trainer.val_every=3",
    "trainer.stop_step=6",
)


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory) -> list[Path]:
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    for folder, lr in zip(folders, ("1e-3", "2e-3"), strict=True):
        finish(folder, 1, *SHOW, f"trainer.lr={lr}")
    return folders


def test_a_run_shows_what_it_does(two_runs):
    run = two_runs[0]
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


def test_only_a_line_feed_ends_a_line_of_json(tmp_path):
    command = ["train", "x.yaml", "trainer.samples.prompts=[a\x85cat \u2028]"]
    text = json.dumps({"step": 0, "command": command}, ensure_ascii=False)
    (tmp_path / "starts.jsonl").write_text(f'{text}\n{{"step": 1', encoding="utf-8")
    assert report.read(tmp_path / "starts.jsonl") == [{"step": 0, "command": command}]


def test_cells_hold_every_sample_at_its_times(two_runs):
    (_, line) = [json.loads(line) for line in (two_runs[0] / "cells.jsonl").read_text().splitlines()]
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


def test_one_page_without_network(two_runs, tmp_path):
    page = tmp_path / "report.html"
    command("report", *map(str, two_runs), "--out", str(page))
    text = page.read_text()
    assert not re.search(r"(?:src|href)=\"(?!data:)|https?://|@import", text)
    images = [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", text)]
    assert len(images) == 2 * (1 + 2)  # heat-maps, and two sheets
    assert all(Image.open(io.BytesIO(data)).width > 10 for data in images)
    (loss,) = re.findall(r"<figcaption>train/loss</figcaption>(.*?)</figure>", text)
    assert loss.count("<polyline") == 2
    assert all(line.count(",") == 6 for line in re.findall(r'points="([^"]*)"', loss))
    assert all(str(run) in text for run in two_runs)
