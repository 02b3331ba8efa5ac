"""TSV manifests: one image per line, as path, tab, prompt, optionally followed by tab, width, tab, height."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from selfe.data import index
from selfe.data.dataset import BucketedDataset
from selfe.io import image_decode
from selfe.types import BadSample, UserError

RECORD = np.dtype([("offset", "<u8"), ("height", "<u2"), ("width", "<u2")])  # 12 bytes per line; sizes as in `index`
CHUNK = 1 << 24  # bytes of a manifest that are scanned at once
BOM = b"\xef\xbb\xbf"


class ManifestData(BucketedDataset):
    """UTF-8 manifests, with or without byte order mark, with LF or CRLF line ends; blank lines are skipped."""

    def open(self, path: Path, base_dir: Path) -> Manifest:
        return Manifest(path, base_dir, self.max_pixels, self.index_dir, strict=self.on_bad_image == "error")


@dataclass(frozen=True)
class Line:
    """The fields of a line."""

    path: str
    prompt: str
    size: tuple[int, int] | None  # height, width in pixels


class Manifest:
    """The non-blank lines of a file by index, read through a memory-mapped table of their offsets."""

    def __init__(self, path: Path, base_dir: Path, max_pixels: int, index_dir: Path | None = None, strict: bool = True):
        if not path.is_file():
            raise UserError(f"{path}: no such manifest; set data.params.train_manifest (or val_manifest) to a TSV file")
        self.path, self.base_dir, self.max_pixels = path, base_dir, max_pixels
        self.index_dir, self.strict = index_dir, strict

        facts = path.stat()
        if not facts.st_size:
            raise empty(path)

        self.file, self.num_bytes = path.open("rb", buffering=0), facts.st_size
        key = index.stamp(RECORD, facts.st_size, facts.st_mtime_ns, str(base_dir.resolve()), max_pixels)
        self.records = index.load(path, key, index_dir, RECORD, self.scan, self.measure)

    def __reduce__(self) -> tuple:
        return Manifest, (self.path, self.base_dir, self.max_pixels, self.index_dir, self.strict)

    def __len__(self) -> int:
        return len(self.records)

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        return self.records.sizes(indices)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Line lengths (n,) in bytes, as an approximation of caption lengths; the paths add nearly the same to each."""
        last = len(self) - 1
        ends = self.records.take(np.minimum(indices + 1, last))["offset"]
        ends = np.where(indices == last, self.num_bytes, ends).astype(np.int64)
        return ends - self.records.take(indices)["offset"].astype(np.int64)

    def prompt(self, index: int) -> str:
        return self.line(index).prompt

    def name(self, index: int) -> str:
        return str(self.base_dir / self.line(index).path)

    def image(self, index: int, enough: int | None) -> Image.Image:
        with self.telling_line(index):
            name = self.name(index)
            return image_decode.read(Path(name), name, self.max_pixels, enough)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) in pixels, from the header of the image file."""
        with self.telling_line(index):
            name = self.name(index)
            return image_decode.size(Path(name), name, self.max_pixels)

    def digest(self) -> str:
        """Digest of the file size and of up to 1024 evenly spaced lines with their image sizes."""
        some = np.unique(np.linspace(0, len(self) - 1, 1024).astype(np.int64))
        lines = [self.text_at(int(offset)) for offset in self.records.take(some)["offset"]]
        return index.stamp(len(self), self.num_bytes, lines, self.sizes(some).tolist())

    def line(self, index: int) -> Line:
        offset = int(self.records[index]["offset"])
        return parse(self.text_at(offset), lambda: self.where(offset))

    def text_at(self, offset: int) -> bytes:
        """The line that starts at `offset`. Read, not mapped: a mapping would make the complete file resident."""
        found = b""
        while b"\n" not in found and (more := os.pread(self.file.fileno(), 4096, offset + len(found))):
            found += more
        return found.partition(b"\n")[0]

    def where(self, offset: int) -> str:
        """`FILE, line N`, as used in error messages. Counts line breaks on every call, because only errors need it."""
        before = sum(
            os.pread(self.file.fileno(), min(CHUNK, offset - i), i).count(b"\n") for i in range(0, offset, CHUNK)
        )
        return f"{self.path}, line {before + 1}"

    @contextmanager
    def telling_line(self, index: int) -> Iterator[None]:
        """Add file and line number to a `BadSample`."""
        try:
            yield
        except BadSample as problem:
            where = self.where(int(self.records[index]["offset"]))
            raise BadSample(problem.kind, str(problem) if where in str(problem) else f"{where}: {problem}") from problem

    def measure(self, records: np.ndarray) -> None:
        self.records = records  # needed by `size`, which reads lines by index
        index.measure(records, self.size, self.path.name, self.strict)

    def scan(self, out: Path) -> None:
        """Write one record per line and check the format of every line."""
        found = 0
        with out.open("wb") as file, mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            first = len(BOM) if text[: len(BOM)] == BOM else 0

            while first < len(text):
                end = text.find(b"\n", min(first + CHUNK, len(text)) - 1) + 1 or len(text)
                records = self.scan_block(text[first:end], first)
                records.tofile(file)
                found, first = found + len(records), end

        if not found:
            raise empty(self.path)

    def scan_block(self, block: bytes, first: int) -> np.ndarray:
        """The records of a block of complete lines that starts at offset `first`, vectorized over lines."""
        try:
            block.decode()
        except UnicodeDecodeError as error:
            start = first + block.rfind(b"\n", 0, error.start) + 1
            parse(self.text_at(start), lambda: self.where(start))

        # start and end of every line, without line break; empty lines are dropped
        data = np.frombuffer(block, np.uint8)
        ends = np.flatnonzero(data == ord("\n"))
        if not block.endswith(b"\n"):
            ends = np.append(ends, len(data))
        starts = np.insert(ends[:-1] + 1, 0, 0)
        ends = ends - ((ends > starts) & (data[ends - 1] == ord("\r")))
        starts, ends = (edges[ends > starts] for edges in (starts, ends))

        # first tab and number of tabs of every line
        tabs = np.append(np.flatnonzero(data == ord("\t")), len(data))
        tab = np.searchsorted(tabs, starts)
        num_tabs = np.searchsorted(tabs, ends) - tab

        records = np.zeros(len(starts), RECORD)
        records["offset"] = first + starts.astype(np.uint64)

        # valid: path and prompt are not empty, width and height (if present) are numbers
        one, three = num_tabs == 1, num_tabs == 3
        second = np.where(three, tabs[np.minimum(tab + 1, len(tabs) - 1)], ends)  # end of the prompt
        fine = (one | three) & (tabs[tab] > starts) & (second > tabs[tab] + 1)
        third = tabs[np.minimum(tab + 2, len(tabs) - 1)][three]

        for name, begin, stop in (("width", second[three] + 1, third), ("height", third + 1, ends[three])):
            records[name][three], legible = numbers(data, begin, stop)
            fine[three] &= legible

        return self.settle(records, fine)

    def settle(self, records: np.ndarray, fine: np.ndarray) -> np.ndarray:
        """Parse the lines that `scan_block` did not accept one by one: drop blank lines, raise for invalid ones."""
        keep = np.ones(len(records), bool)

        for i in np.flatnonzero(~fine):
            offset = int(records["offset"][i])
            if not self.text_at(offset).strip():
                keep[i] = False
            elif size := parse(self.text_at(offset), partial(self.where, offset)).size:
                records["height"][i], records["width"][i] = np.clip(size, 1, 65535)

        return records[keep]


def numbers(data: np.ndarray, begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Parse decimal numbers between byte offsets (n,) -> values (n,), mask (n,) of numbers from 1 to 65535."""
    values, legible = np.zeros(len(begin), np.int64), (end > begin) & (end - begin <= 5)

    # from the last digit to the first
    for place in range(5):
        at = end - 1 - place
        digits = data[at.clip(0)] - np.uint8(ord("0"))  # uint8 wraps around for characters below "0"
        inside = at >= begin
        legible &= (digits <= 9) | ~inside
        values += np.where(inside, digits.astype(np.int64) * 10**place, 0)

    legible &= (values >= 1) & (values <= 65535)
    return np.where(legible, values, 0), legible


def parse(line: bytes, where: Callable[[], str]) -> Line:
    """The fields of a line.

    Raises:
        BadSample: kind `invalid UTF-8`, `no tab`, `too many tabs`, `empty path`, `empty caption` or `bad size`.
    """
    try:
        path, *rest = (field.strip() for field in line.decode().split("\t"))
    except UnicodeDecodeError as error:
        message = f"{where()}: not UTF-8 at byte {error.start} of the line; save the file as UTF-8"
        raise BadSample("invalid UTF-8", message) from error

    shown = repr(line[:60].decode(errors="replace"))
    if len(rest) not in (1, 3):
        kind = "too many tabs" if rest else "no tab"
        raise BadSample(kind, f"{where()}: expected path, one tab, prompt; found {len(rest)} tabs in {shown}")

    prompt, *size = rest
    if not path or not prompt:
        kind = "empty caption" if path else "empty path"
        raise BadSample(kind, f"{where()}: path or prompt is empty in {shown}; give both")

    if not size:
        return Line(path, prompt, None)
    if not all(number.isdecimal() and int(number) for number in size):
        raise BadSample("bad size", f"{where()}: width and height must be positive integers (pixels) in {shown}")
    return Line(path, prompt, (int(size[1]), int(size[0])))


def empty(path: Path) -> UserError:
    return UserError(f"{path}: the manifest is empty; write one line per image: path, tab, prompt")
