"""Errors that end a command with one line: what, where, how to fix it. Also those of the operating system."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """An error the user can fix. The message is one line: where, what, how to fix it. Exit code 2."""


class PeerFailure(RuntimeError):
    """Another process of the job has failed, so this one cannot go on. The message is one line. Exit code 1."""


class BadSample(UserError):
    """An image or a manifest line that cannot be used; `kind` is a short category for counting."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple:
        return BadSample, (self.kind, str(self))


REMEDIES = {
    errno.ENOSPC: "free some space, or choose another folder; then run the same command again",
    errno.EDQUOT: "free some space, or choose another folder; then run the same command again",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "check owner and permissions, or choose another path",
    errno.EPERM: "check owner and permissions, or choose another path",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file; check the path",
    errno.EISDIR: "give a file, not a folder",
    errno.EEXIST: "remove it, or choose another path",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EMFILE: "raise the limit of this shell: ulimit -n 65536",
    errno.ENFILE: "the machine has too many files open; close other programs",
    errno.EADDRINUSE: "choose another port, or end the program that uses this one",
    errno.EIO: "the disk or the network storage fails; look at the system's log",
    errno.ESTALE: "the network storage has lost the file; mount it again",
    errno.EFBIG: "the file system or ulimit -f allows smaller files only",
}


def one_line(error: BaseException) -> str | None:
    """The message for an error of the operating system, None for any other error.

    Libraries written in Rust raise their own exceptions, with the number in the text: `(os error 28)`.
    """
    number = getattr(error, "errno", None)
    # of a copy from one path to another, the second is the one that cannot be written to
    path = getattr(error, "filename2", None) or getattr(error, "filename", None)
    if number is None and (match := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(match[1])
    if number not in REMEDIES:
        return None
    where = f"{os.fsdecode(path)}: " if isinstance(path, (str, bytes, os.PathLike)) else ""
    return f"{where}{os.strerror(number)}; {REMEDIES[number]}"


@contextmanager
def writing_to(path: Path | None) -> Iterator[None]:
    """Name `path` in errors of the operating system that have no path, such as those of `file.write` on a full disk."""
    try:
        yield
    except Exception as error:
        if path is not None and getattr(error, "filename", None) is None and one_line(error):
            error.filename = str(path)
        raise
