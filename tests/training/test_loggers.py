"""Metrics read as one run after a resume, in every logger, with the same names and steps."""

import json
import math

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from selfe.io.image_encode import heat, heat_maps
from selfe.training.loggers import JsonLines, Loggers, WandbConfig

RECORD = {"seed": 0, "trainer": {"lr": 1e-3, "output_dir": "run"}}


def test_a_heat_map_has_its_axes_and_range():
    table = torch.linspace(0, 1, 64, dtype=torch.float64).view(8, 8)
    table[0, 7] = math.nan
    sheet = heat_maps({"loss": table, "other": table + 1, "none": table * math.nan}, columns=2)
    assert sheet.size == (2 * 284, 2 * 226)
    pixels = np.asarray(sheet)
    cells = pixels[26 + 10 : 26 + 160 : 20, 32 + 10 : 32 + 160 : 20]
    assert (cells == np.asarray(heat(table.T, 8))).all()
    assert (cells[0, 0] == 255).all()  # t to the right, s upwards: t = 0, s = 7 / 8 has no samples
    assert (
        pixels[26 + 159, 32 + 160 + 15] == heat(torch.tensor([[0.0, 1.0]]).double(), 2).getpixel((0, 0))
    ).all()  # colour bar
    assert (pixels[26, 32 + 160 + 15] == heat(torch.tensor([[0.0, 1.0]]).double(), 2).getpixel((1, 0))).all()
    assert (pixels[:226, 284:] != pixels[:226, :284]).any()


def test_metrics_of_steps_that_run_again_are_replaced(tmp_path):
    first = JsonLines(tmp_path, 0)
    for step in range(1, 5):
        first.numbers(step, {"train/loss": float(step)})
    with first.path.open("a") as file:
        file.write('{"step": 5, "tr')  # killed while writing
    second = JsonLines(tmp_path, 2)
    second.numbers(3, {"train/loss": 30.0})
    lines = [json.loads(line) for line in second.path.read_text().splitlines()]
    assert [(line["step"], line["train/loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert all(list(line) == ["step", "time", "train/loss"] for line in lines)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    heat_maps({"loss": torch.eye(3, dtype=torch.float64)}).save(path)
    return path


def test_wandb_offline_needs_no_key_and_keeps_its_run(tmp_path, image, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for start in range(2):
        loggers = Loggers(tmp_path, start, WandbConfig("offline"), False, (), RECORD, is_main=True)
        loggers.numbers(start + 1, {"train/loss": 1.0})
        loggers.image(start + 1, "cells", image)
        loggers.close()
    runs = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len({path.stem for path in runs}) == 1
    assert runs[0].stem == "run-" + (tmp_path / "wandb_run.txt").read_text().strip()


def test_wandb_gets_the_config_and_every_key_of_its_section(tmp_path, monkeypatch):
    calls, logged = {}, []

    class WandbRun:
        def log(self, values: dict, step: int) -> None:
            logged.append((step, values))

    monkeypatch.setattr("wandb.init", lambda **arguments: calls.update(arguments) or WandbRun())
    settings = WandbConfig("online", "anystep", entity="lab", group="ablation", tags=("a", "b"), name="first")
    loggers = Loggers(tmp_path, 3, settings, False, (), RECORD, is_main=True)
    loggers.numbers(4, {"train/loss": 1.0})
    assert logged == [(4, {"train/loss": 1.0})]
    assert calls.pop("id") == (tmp_path / "wandb_run.txt").read_text().strip()
    assert calls == {
        "mode": "online",
        "project": "anystep",
        "entity": "lab",
        "group": "ablation",
        "tags": ("a", "b"),
        "name": "first",
        "resume": "allow",
        "dir": tmp_path,
        "config": RECORD,
    }


def test_tensorboard_drops_steps_that_run_again_and_holds_the_config(tmp_path, image):
    for start, loss in ((0, 1.0), (1, 2.0)):
        loggers = Loggers(tmp_path, start, WandbConfig(), True, (), RECORD, is_main=True)
        for step in range(start + 1, 4):
            loggers.numbers(step, {"train/loss": loss})
        loggers.image(3, "cells", image)
        loggers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    values = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert values == [(1, 1.0), (2, 2.0), (3, 2.0)]
    assert events.Images("cells")[0].step == 3
    (text,) = {event.tensor_proto.string_val[0].decode() for event in events.Tensors("config/text_summary")}
    assert "    seed: 0\n" in text
    assert "      lr: 0.001\n" in text
    assert Loggers(tmp_path, 0, WandbConfig("offline"), True, (), RECORD, is_main=False).loggers == []
