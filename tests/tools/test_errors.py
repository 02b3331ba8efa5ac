"""Errors of the operating system are one line with path and remedy, for every verb that writes."""

import errno
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import SafetensorError

from selfe import cli, errors, launch
from selfe.errors import UserError

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "debug_data/t2i_smoke/manifest.tsv"
DATA = ("--base-dir", str(MANIFEST.parent))


@pytest.fixture(params=["full", "read-only"])
def disk(request, tmp_path) -> Iterator[tuple[Path, str]]:
    """A disk of its own that is full or read-only, and what the system says about it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        if request.param == "full":
            (folder / "ballast").write_bytes(bytes(48 * 1024))  # a few small files still fit
        else:
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        yield folder, "No space left on device" if request.param == "full" else "Read-only file system"
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def refused(arguments: list[str], capfd) -> str:
    """Run a verb as `selfe` does; the line it prints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
        with pytest.raises(SystemExit) as exit:
            cli.main(arguments)
    assert exit.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    "verb",
    [
        lambda folder: ["make-shards", str(MANIFEST), *DATA, "--out", str(folder / "shards")],
        lambda folder: ["check-data", str(MANIFEST), *DATA, "--workers", "0", "--write-clean", str(folder / "a.tsv")],
        lambda folder: ["make-manifest", str(folder.parent / "table.csv"), "--out", str(folder / "a.tsv")],
    ],
    ids=["make-shards", "check-data", "make-manifest"],
)
def test_a_disk_that_cannot_be_written_to_is_one_line(disk, verb, tmp_path, capfd):
    folder, reason = disk
    rows = "".join(f"image_{number:05}.jpg,a photo of the thing with number {number}\n" for number in range(2000))
    (tmp_path / "table.csv").write_text("path,caption\n" + rows)
    if "check-data" in verb(folder)[0]:
        (folder / "more").write_bytes(bytes(15 * 1024)) if reason.startswith("No") else None
    line = refused(verb(folder), capfd)
    assert line.startswith(f"selfe: error: {folder}")
    assert reason in line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.ENOSPC, "x", "a/b"),
            "a/b: No space left on device; free some space, or choose another folder; then run the same command again",
        ),
        (
            PermissionError(errno.EACCES, "x", "a"),
            "a: Permission denied; check owner",
        ),
        (
            OSError(errno.ENOSPC, "x", "the source", None, "the copy"),
            "the copy: No space left on device; free some",
        ),
        (OSError(errno.EMFILE, "x"), "Too many open files; raise the limit of this shell: ulimit -n 65536"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left on device; free some"),
        (OSError("no number"), None),
        (ValueError("a mistake of this program"), None),
    ],
)
def test_messages_name_path_and_remedy(error, line):
    found = errors.one_line(error)
    assert found == line if line is None else found.startswith(line)


def test_an_error_without_a_path_gets_that_of_the_output():
    with pytest.raises(OSError, match="full") as caught, errors.writing_to(Path("out")):
        raise OSError(errno.ENOSPC, "full")
    assert errors.one_line(caught.value).startswith("out: No space left on device;")
    with pytest.raises(KeyError), errors.writing_to(Path("out")):
        raise KeyError("a mistake of this program")


def test_a_port_in_use_is_refused_before_weights_are_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: cannot be listened on .*; choose another port"):
            cli.run(["demo", "no such checkpoint", "--port", str(port)])


def test_a_tilde_in_an_argument_is_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert cli.parse(["report", "~/run", "--out=~/a.html"]).out == Path("/home/someone/a.html")
    assert cli.parse(["report", "~/run", "--out=~/a.html"]).runs == [Path("/home/someone/run")]
