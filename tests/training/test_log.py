"""Progress is plain lines in a log file."""

import re

from selfe import log
from selfe.log import Progress


def test_progress_in_a_log_file_is_plain_lines(capsys):
    progress = Progress("training", 3)
    for loss in (3, 2, 1):
        progress.advance(1, f"loss {loss}")
    progress.close()
    assert capsys.readouterr().out.splitlines() == ["training 1/3 loss 3", "training 3/3 loss 1"]
    quiet = Progress("training", 1, quiet=True)
    quiet.advance()
    assert capsys.readouterr().out == ""


def test_every_line_has_the_last_note_and_the_pace_of_the_steps_after_the_first(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("selfe.log.time.monotonic", lambda: now[0])
    progress = Progress("training", 5, seconds=0, unit="step")
    for now[0], note in ((100.0, "loss 3"), (104.0, ""), (106.0, "loss 2"), (109.0, ""), (112.0, "")):
        progress.advance(1, note)
    progress.close()
    assert capsys.readouterr().out.splitlines() == [
        "training 1/5 loss 3, 100 s/step, 6 min 40 s left",
        "training 2/5 loss 3, 4 s/step, 12 s left",
        "training 3/5 loss 2, 3 s/step, 6 s left",
        "training 4/5 loss 2, 3 s/step, 3 s left",
        "training 5/5 loss 2, 3 s/step",
    ]


def test_a_bar_keeps_the_last_note(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = Progress("training", 2, unit="step")
    progress.advance(1, "loss 3")
    progress.advance(1)
    progress.close()
    assert re.search(r"training: 100%.* 2/2 .*, loss 3\]", capsys.readouterr().err)


def test_one_and_many():
    assert [log.count(number, "step", "steps") for number in (0, 1, 1000)] == ["0 steps", "1 step", "1,000 steps"]
