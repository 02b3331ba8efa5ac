"""Metrics read as one run after a resume, wherever they go."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from selfe.io.image_encode import heat_maps
from selfe.training.loggers import JsonLines, Loggers, WandbConfig


def test_metrics_of_steps_that_run_again_are_replaced(tmp_path):
    first = JsonLines(tmp_path, 0)
    for step in range(4):
        first.numbers(step, {"loss": float(step)})
    with first.path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    second = JsonLines(tmp_path, 2)
    second.numbers(2, {"loss": 20.0})
    lines = [json.loads(line) for line in second.path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(0, 0.0), (1, 1.0), (2, 20.0)]


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    heat_maps({"loss": torch.eye(3, dtype=torch.float64)}).save(path)
    return path


def test_wandb_offline_needs_no_key_and_keeps_its_run(tmp_path, image, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for start in range(2):
        loggers = Loggers(tmp_path, start, WandbConfig("offline"), False, is_main=True)
        loggers.numbers(start, {"loss": 1.0})
        loggers.image(start, "cells", image)
        loggers.close()
    runs = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len({path.stem for path in runs}) == 1
    assert runs[0].stem == "run-" + (tmp_path / "wandb_run.txt").read_text().strip()


def test_tensorboard(tmp_path, image):
    for start, loss in ((0, 1.0), (1, 2.0)):
        loggers = Loggers(tmp_path, start, WandbConfig(), True, is_main=True)
        for step in range(start, 3):
            loggers.numbers(step, {"loss": loss})
        loggers.image(2, "cells", image)
        loggers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 1.0), (1, 2.0), (2, 2.0)]
    assert events.Images("cells")[0].step == 2
    assert Loggers(tmp_path, 0, WandbConfig("offline"), True, is_main=False).loggers == []
