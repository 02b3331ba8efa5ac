"""The command: help that imports no torch, errors for wrong usage, and defaults that it shares with the tools."""

import subprocess
import sys

import pytest

from selfe import cli
from selfe.errors import UserError
from selfe.gallery import build
from selfe.io import image_decode


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.parse([verb, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: selfe {verb}")


def test_help_imports_no_torch():
    code = """if True:
        import atexit, sys
        from selfe import cli
        atexit.register(lambda: print("torch" in sys.modules))
        cli.main(["plan", "--help"])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: selfe plan")
    assert done.stdout.endswith("\nFalse\n")


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0), (["trian"], 2), (["report"], 2)])
def test_usage(arguments, code, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.parse(arguments)
    assert ended.value.code == code
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert ("selfe: error: unknown verb 'trian'; choose one of train, infer" in printed.err) == (arguments == ["trian"])


def test_repeated_defaults_are_those_of_the_tools():
    assert cli.parse(["check-data", "a.tsv"]).max_pixels == image_decode.MAX_PIXELS
    assert cli.parse(["gallery", "folder"]).embed_mb * 2**20 == build.EMBED_BYTES


@pytest.mark.parametrize(
    "arguments",
    [
        ["precompute", "a.yaml", "--out", "b", "--batch-size", "0"],
        ["precompute", "a.yaml", "--out", "b", "--workers", "-1"],
        ["make-shards", "a.tsv", "--out", "b", "--samples", "0"],
        ["check-data", "a.tsv", "--workers", "-1"],
        ["check-data", "a.tsv", "--pixels", "0"],
    ],
)
def test_numbers_out_of_range_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.parse(arguments)
    assert ended.value.code == 2
    assert f"argument {arguments[-2]}: must be at least" in capsys.readouterr().err


def test_buckets_that_cannot_be_are_refused_before_any_image_is_read():
    with pytest.raises(UserError, match=r"--pixels, --multiple, --max-aspect: pixels 100 is less than 16 x 16"):
        cli.run(["check-data", "none.tsv", "--pixels", "100"])
