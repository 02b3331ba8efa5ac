"""Index files: what a pass over a large file found, a record per sample, mapped into memory from then on.

An index lies beside its file (or in a folder of choice) as `NAME.STAMP.index`, raw records and nothing else. The stamp
changes with the file, so a stale index is never opened. It is written aside and renamed; of several processes that need
it, one builds and the others wait.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import mmap
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from selfe.types import BadSample, UserError

THREADS = 32  # that wait for storage most of the time
PATIENCE = 100  # bad pictures, after which no more are looked for
BAD = (0, 1)  # height and width of a picture that cannot be read; 0, 0 is one that nobody has looked at


class Mapped:
    """Records (n,) in a file, read-only."""

    def __init__(self, path: Path, dtype: np.dtype):
        with path.open("rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.records = np.frombuffer(self.map, dtype)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> np.void:
        return self.records[index]

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Copies (n,). The pages go back to the system at once, or random reading would in time make all resident."""
        found = self.records[indices]
        self.map.madvise(mmap.MADV_DONTNEED)
        return found

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        """(n, 2) heights and widths."""
        found = self.take(indices)
        return np.stack([found["height"], found["width"]], axis=1).astype(np.int64)


def stamp(*facts: object) -> str:
    return hashlib.blake2b(repr(facts).encode(), digest_size=6).hexdigest()


def load(
    path: Path,
    key: str,
    folder: Path | None,
    dtype: np.dtype,
    scan: Callable[[Path], None],
    measure: Callable[[np.ndarray], None],
) -> Mapped:
    """The records of a file.

    Args:
        key: the stamp.
        folder: where the index is kept, by default beside the file.
        scan: writes the records to a path.
        measure: fills in what records do not know yet; may be interrupted, and goes on where it was.
    """
    folder = folder or path.parent
    final = folder / f"{path.name}.{key}.index"
    if not final.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(final.with_suffix(".lock")):
                if not final.exists():
                    build(path.name, final, dtype, scan, measure)
        except OSError as error:
            raise UserError(
                f"{folder}: cannot write the index of {path.name} here ({error.strerror}); set data.params.index_dir "
                "to a folder of yours"
            ) from error
    return Mapped(final, dtype)


def build(
    name: str, final: Path, dtype: np.dtype, scan: Callable[[Path], None], measure: Callable[[np.ndarray], None]
) -> None:
    scanned, partial = (final.with_suffix(suffix) for suffix in (".scanned", ".partial"))
    if not scanned.exists():
        try:
            scan(partial)
            partial.rename(scanned)
        finally:
            partial.unlink(missing_ok=True)
    measure(np.memmap(scanned, dtype, "r+"))
    for suffix in ("index", "scanned"):
        for stale in set(final.parent.glob(f"{glob.escape(name)}.*.{suffix}")) - {scanned}:
            stale.unlink()
    scanned.rename(final)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time, on file systems that know locks."""
    try:
        with path.open("w") as file:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
    finally:
        path.unlink(missing_ok=True)  # whoever waited for it finds the work done


def measure(records: np.ndarray, header: Callable[[int], tuple[int, int]], name: str, strict: bool) -> None:
    """Fill in `height` and `width` of records that lack them, by many threads.

    Raises:
        BadSample: with `strict`, the first picture that cannot be read; otherwise its record says `BAD`.
    """

    def look(index: int) -> BadSample | None:
        try:
            size = header(index)
        except BadSample as problem:
            if strict:
                return problem
            size = BAD
        records["height"][index], records["width"][index] = np.clip(size, 0, 65535)
        return None

    todo = np.flatnonzero((records["height"] == 0) & (records["width"] == 0))
    problems = []
    with ThreadPoolExecutor(THREADS) as pool:
        bar = tqdm(total=len(todo), desc=f"sizes of {name}", disable=not sys.stderr.isatty() or not len(todo))
        for first in range(0, len(todo), 4096):
            found = list(pool.map(look, todo[first : first + 4096].tolist()))
            problems += [problem for problem in found if problem]
            bar.update(len(found))
            if len(problems) >= PATIENCE:
                break
        bar.close()
    if problems:
        more = f" ({len(problems) - 1} more like it; selfe check-data lists them)" if len(problems) > 1 else ""
        raise BadSample(problems[0].kind, f"{problems[0]}{more}")
