"""Index files: one fixed-size record per sample of a large file, built in one pass and memory-mapped afterwards.

An index is stored next to its file (or in `index_dir`) as `NAME.STAMP.index` and contains raw records only. The stamp
changes with the file, so a stale index is never opened. It is written under a temporary name and renamed. When several
processes need the same index, one builds it and the others wait.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import mmap
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from selfe.errors import BadSample, UserError

THREADS = 32  # mostly waiting for storage
PATIENCE = 100  # number of unreadable images after which the scan stops
MAX_SIDE = 65535  # pixels; larger sides are stored as this
CAPTIONS, PIECES = ".captions", ".pieces"  # suffixes beside an index: captions; what a scan has done so far
BAD = (0, 1)  # height and width of an unreadable image; (0, 0) means not measured yet


class Mapped:
    """Records (n,) of a file, memory-mapped and read-only."""

    def __init__(self, path: Path, dtype: np.dtype):
        with path.open("rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.records = np.frombuffer(self.map, dtype)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> np.void:
        return self.records[index]

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Copies of records (n,). Releases mapped pages, because random reads would make all of them resident."""
        copies = self.records[indices]
        self.map.madvise(mmap.MADV_DONTNEED)
        return copies

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        """Heights and widths (n, 2) in pixels."""
        records = self.take(indices)
        return np.stack([records["height"], records["width"]], axis=1).astype(np.int64)


def stamp(*facts: object) -> str:
    """A short digest of everything that an index depends on."""
    return hashlib.blake2b(repr(facts).encode(), digest_size=6).hexdigest()


def load(
    path: Path,
    key: str,
    folder: Path | None,
    dtype: np.dtype,
    scan: Callable[[Path], None],
    measure: Callable[[np.ndarray], None],
) -> Mapped:
    """The records of a file, indexed on first use.

    Args:
        key: the stamp of the index.
        folder: directory of the index; default: next to the file.
        scan: writes all records to a path.
        measure: fills in missing image sizes in place; resumes after an interruption.

    Raises:
        UserError: the index cannot be written.
    """
    final = location(path, key, folder)
    folder = final.parent
    if not final.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(final.with_suffix(".lock")):
                if not final.exists():
                    build(path.name, final, dtype, scan, measure)
        except OSError as error:
            raise UserError(
                f"{folder}: cannot write the index of {path.name} ({error.strerror}); set data.params.index_dir "
                "to a writable directory"
            ) from error
    return Mapped(final, dtype)


def location(path: Path, key: str, folder: Path | None) -> Path:
    """The file of an index; see `load`."""
    return (folder or path.parent) / f"{path.name}.{key}.index"


def build(
    name: str, final: Path, dtype: np.dtype, scan: Callable[[Path], None], measure: Callable[[np.ndarray], None]
) -> None:
    """Scan, measure and rename to `final`; an interrupted build resumes after the scan."""
    scanned, partial = (final.with_suffix(suffix) for suffix in (".scanned", ".partial"))

    if not scanned.exists():
        try:
            scan(partial)
            partial.rename(scanned)
        finally:
            partial.unlink(missing_ok=True)

    # sizes are written into the file, so that an interrupted measurement resumes
    measure(np.memmap(scanned, dtype, "r+"))

    # remove indices of earlier versions of the file
    for suffix in (".index", ".scanned", CAPTIONS):
        current = {scanned, final.with_suffix(CAPTIONS)}
        for stale in set(final.parent.glob(f"{glob.escape(name)}.*{suffix}")) - current:
            stale.unlink()
    for stale in final.parent.glob(f"{glob.escape(name)}.*{PIECES}"):
        shutil.rmtree(stale)
    scanned.rename(final)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time, on file systems that support locks."""
    try:
        with path.open("w") as file:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
    finally:
        path.unlink(missing_ok=True)  # waiting processes find the index complete


def measure(records: np.ndarray, header: Callable[[int], tuple[int, int]], name: str, strict: bool) -> None:
    """Fill in missing `height` and `width` of records in place, with a thread pool.

    Raises:
        BadSample: with `strict`, the first unreadable image; without it, unreadable images are recorded as `BAD`.
    """

    def look(index: int) -> BadSample | None:
        try:
            size = header(index)
        except BadSample as problem:
            if strict:
                return problem
            size = BAD
        records["height"][index], records["width"][index] = np.clip(size, 0, MAX_SIDE)
        return None

    todo = np.flatnonzero((records["height"] == 0) & (records["width"] == 0))
    problems = []

    with ThreadPoolExecutor(THREADS) as pool:
        bar = tqdm(total=len(todo), desc=f"sizes of {name}", disable=not sys.stderr.isatty() or not len(todo))
        for first in range(0, len(todo), 4096):
            results = list(pool.map(look, todo[first : first + 4096].tolist()))
            problems += [problem for problem in results if problem]
            bar.update(len(results))
            if len(problems) >= PATIENCE:
                break
        bar.close()

    if problems:
        more = f" ({len(problems) - 1} more; selfe check-data lists them)" if len(problems) > 1 else ""
        raise BadSample(problems[0].kind, f"{problems[0]}{more}")
