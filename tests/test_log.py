"""Metrics read as one run after a resume; progress is plain lines in a log file."""

import json

from selfe.log import Metrics, Progress


def test_metrics_of_steps_that_run_again_are_replaced(tmp_path):
    first = Metrics(tmp_path, 0, "disabled", "selfe")
    for step in range(4):
        first.write(step, {"loss": float(step)})
    with first.path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    second = Metrics(tmp_path, 2, "disabled", "selfe")
    second.write(2, {"loss": 20.0})
    lines = [json.loads(line) for line in second.path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(0, 0.0), (1, 1.0), (2, 20.0)]


def test_wandb_offline_needs_no_key(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    metrics = Metrics(tmp_path, 0, "offline", "selfe")
    metrics.write(0, {"loss": 1.0})
    metrics.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_progress_in_a_log_file_is_plain_lines(capsys):
    progress = Progress("training", 3)
    for loss in (3, 2, 1):
        progress.advance(1, f"loss {loss}")
    progress.close()
    assert capsys.readouterr().out.splitlines() == ["training 1/3 loss 3", "training 3/3 loss 1"]
    quiet = Progress("training", 1, quiet=True)
    quiet.advance()
    assert capsys.readouterr().out == ""
