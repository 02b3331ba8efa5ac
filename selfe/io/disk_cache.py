"""A folder of files that were read from elsewhere, of bounded size: those that were not used for longest are removed.

Any number of processes share it. A file is written under a temporary name and renamed; its modification time is when it
was last used.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from selfe.errors import UserError

SLOTS = 16  # sub-folders, each with an equal part of the size
CHECKS = 256  # a slot is measured after each of this many parts of its size that a process writes
FILLED = 0.9  # of a slot, after files were removed


class DiskCache:
    """Files by key. Their total size is at most `max_bytes`, and 1/256 of it for each process."""

    def __init__(self, folder: Path | None = None, max_bytes: int = 50 * 10**9):
        """`folder`: default: one of this user in the system's folder of temporary files."""
        self.folder = folder or Path(tempfile.gettempdir()) / f"selfe-{os.getuid()}"
        self.max_bytes = max_bytes
        self.written = [max_bytes] * SLOTS  # bytes since a slot was measured; at first, it never was

    def read(self, key: str, fetch: Callable[[], bytes]) -> bytes:
        """The bytes of a key."""
        with self.open(key, lambda file: file.write(fetch())) as file:
            return file.read()

    def open(self, key: str, write: Callable[[BinaryIO], object]) -> BinaryIO:
        """The file of a key, open for reading; `write` writes it if it is not there.

        Raises:
            UserError: the folder cannot be written to.
        """
        path = self.path(key)
        with suppress(FileNotFoundError, NotADirectoryError):
            file = path.open("rb")
            os.utime(file.fileno())
            return file

        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, partial = tempfile.mkstemp(prefix=".", dir=path.parent)
        except OSError as error:
            raise self.not_writable(error) from error
        try:
            with os.fdopen(descriptor, "wb") as file:
                self.write(file, write)
            file = Path(partial).open("rb")  # noqa: SIM115 - handed to the caller
            os.rename(partial, path)
        finally:
            Path(partial).unlink(missing_ok=True)  # unless it was renamed
        self.account(path, os.fstat(file.fileno()).st_size)
        return file

    def write(self, file: BinaryIO, write: Callable[[BinaryIO], object]) -> None:
        """As `write`, with the name of this folder in errors of the disk."""
        try:
            write(file)
            file.flush()
        except OSError as error:
            if error.filename is None and error.errno is not None:
                raise self.not_writable(error) from error
            raise

    def remove(self, key: str) -> None:
        self.path(key).unlink(missing_ok=True)

    def path(self, key: str) -> Path:
        digest = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        return self.folder / "files" / f"{int(digest[:2], 16) % SLOTS:02d}" / digest

    def account(self, path: Path, size: int) -> None:
        """Measure the slot of a new file now and then, and remove its oldest files if it is too large."""
        slot, room = int(path.parent.name), self.max_bytes // SLOTS
        self.written[slot] += size
        if self.written[slot] < room // CHECKS:
            return
        self.written[slot] = 0

        files = []
        for entry in os.scandir(path.parent):
            with suppress(FileNotFoundError):
                facts = entry.stat()
                files.append((facts.st_mtime_ns, facts.st_size, entry.path))
        total = sum(size for _, size, _ in files)
        if total <= room:
            return
        for _, size, name in sorted(files):
            if total <= FILLED * room:
                break
            with suppress(FileNotFoundError):
                os.unlink(name)
            total -= size

    def not_writable(self, error: OSError) -> UserError:
        reason = error.strerror or type(error).__name__
        remedy = "set data.params.cache_dir to a folder with more space, or lower data.params.cache_gb"
        return UserError(f"{self.folder}: the cache of remote data cannot be written ({reason}); {remedy}")
