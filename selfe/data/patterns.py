"""Names of several files: patterns with `*`, `?`, `[]` and braces, on this machine or in a store."""

from __future__ import annotations

import glob
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from selfe.errors import UserError
from selfe.io import storage
from selfe.io.storage import RemotePath

MAX_FILES = 1_000_000  # that a brace pattern may name
THREADS = 32  # requests for the sizes of files in a store


def matching(pattern: Path | RemotePath, what: str) -> list[Path] | list[RemotePath]:
    """The files of a pattern, sorted by name.

    Args:
        what: what the files are and an example, for the error if there is none.

    Raises:
        UserError: a name of the pattern has no file.
    """
    names = expand_braces(pattern.url if isinstance(pattern, RemotePath) else str(pattern))
    if isinstance(pattern, RemotePath):
        matches = remote_matches(names)
    else:
        matches = {name: [Path(path) for path in glob.glob(name)] for name in names}

    missing = [name for name in names if not matches[name]]
    if len(missing) == len(names):
        raise UserError(f"{pattern}: no such {what}")
    if missing:
        first = storage.shown(missing[0])
        raise UserError(f"{pattern}: {len(missing)} of {len(names)} files are missing, the first is {first}")
    return sorted({path for paths in matches.values() for path in paths})


def remote_matches(names: list[str]) -> dict[str, list[RemotePath]]:
    """The files of each name or pattern in a store, with their sizes known."""

    def files(name: str) -> list[RemotePath]:
        path = RemotePath(name)
        if not glob.has_magic(name.partition("?")[0] if name.startswith("http") else name):
            return [path] if path.is_file() else []
        return storage.matching(path)

    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(files, names), strict=True))


def expand_braces(pattern: str) -> list[str]:
    """part-{08..10}.tar -> part-08.tar, part-09.tar, part-10.tar; {a,b} is a or b."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]

    choices = match[1].split(",")
    if ends := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        first, last = int(ends[1]), int(ends[2])
        if not first <= last < first + MAX_FILES:
            raise UserError(f"{pattern}: {match[0]} must count up, over at most {MAX_FILES} files")
        choices = [str(number).zfill(len(ends[1])) for number in range(first, last + 1)]

    before, after = pattern[: match.start()], pattern[match.end() :]
    return [name for choice in choices for name in expand_braces(before + choice + after)]
