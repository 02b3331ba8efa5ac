"""Find checkpoints and verify them: completeness, file sizes, checksums."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

from selfe import log
from selfe.distributed import collectives
from selfe.distributed.collectives import World
from selfe.errors import UserError

MARKER = "progress.json"  # written last: a folder without it is not a checkpoint
CHUNK = 1 << 22  # bytes per read or write


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def newest_valid(folder: Path, world: World) -> Path | None:
    """The newest intact checkpoint of a run (checksums verified), or None if there are none; call it on every rank.

    Damaged checkpoints are logged and skipped.

    Raises:
        UserError: there are checkpoints, but all are damaged. The run must not silently restart from scratch.
    """
    paths = collectives.broadcast(list_checkpoints(folder), world)
    for path in paths:
        # Each rank verifies its share of the files.
        problems = collectives.gather_on_all(damage(path, world.rank, world.size), world)
        problem = next(filter(None, problems), None)
        if problem is None:
            return path
        if world.is_main:
            log.print_line(f"{path}: damaged, skipped ({problem}); trying the previous checkpoint")

    if paths:
        raise UserError(f"{folder}: all checkpoints are damaged; move them away to restart from the first step")
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first, including incomplete ones."""
    return sorted((path for path in folder.glob("step_*") if path.name[5:].isdecimal()), reverse=True)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, by file sizes (checksums are not verified)."""
    return next((path for path in list_checkpoints(folder) if is_complete(path)), None)


def find(path: Path) -> Path:
    """Resolve a user's path: a checkpoint directory, or a parent directory (newest complete checkpoint is used).

    Raises:
        UserError: there is no complete checkpoint.
    """
    checkpoint = path if is_complete(path) else latest(path)
    if checkpoint is None:
        remedy = "give a checkpoint directory (step_...) or its parent directory"
        if not path.is_dir():
            raise UserError(f"{path}: no such checkpoint directory; {remedy}")
        if path.name.startswith("step_"):
            raise UserError(f"{path}: incomplete checkpoint ({damage(path, contents=False)}); {remedy}")
        raise UserError(f"{path}: contains no complete checkpoint; {remedy}")
    return checkpoint


def is_complete(path: Path) -> bool:
    """Whether all files are present with the right sizes (checksums are not verified)."""
    return damage(path, contents=False) is None


def damage(path: Path, rank: int = 0, size: int = 1, contents: bool = True) -> str | None:
    """Describe what is wrong with a checkpoint, or return None if it is intact.

    Checks every `size`-th file, starting at `rank`: its size and, with `contents`, its checksum.
    """
    try:
        marker = read_marker(path)
        if path.name[5:].isdecimal() and marker["step"] != int(path.name[5:]):
            return f"{MARKER} is for step {marker['step']}"
        for name, (length, crc) in sorted(marker["files"].items())[rank::size]:
            if (actual := (path / name).stat().st_size) != length:
                return f"{name} has {actual} of {length} bytes"
            if contents and checksum(path / name) != crc:
                return f"the checksum of {name} is wrong"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except ValueError as error:
        return f"{MARKER} cannot be read: {error}"
    return None


def read_marker(path: Path) -> dict:
    """Contents of a checkpoint's marker file. Raises ValueError if it is damaged."""
    entries = json.loads((path / MARKER).read_text())
    if not isinstance(entries, dict) or entries.pop("checksum", None) != checksum_of(entries):
        raise ValueError("its checksum is wrong")
    return entries


def write_marker(path: Path, entries: dict) -> None:
    """Write and sync a checkpoint's marker file: the entries, which are JSON values, and their checksum."""
    with (path / MARKER).open("w") as file:
        file.write(json.dumps(entries | {"checksum": checksum_of(entries)}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def checksum_of(entries: dict) -> int:
    """CRC-32 of JSON values, the same before they are written and after they are read."""
    return zlib.crc32(json.dumps(entries).encode())


def read_step(path: Path) -> int:
    """Number of finished steps of a checkpoint."""
    return read_marker(path)["step"]
