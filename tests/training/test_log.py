"""Progress is plain lines in a log file."""

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
