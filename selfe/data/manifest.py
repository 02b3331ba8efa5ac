"""TSV manifests: one image per line, as path, tab, prompt, optionally followed by tab, width, tab, height."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from selfe import log
from selfe.data import index
from selfe.data.dataset import BucketedDataset
from selfe.io import image_decode, text_files
from selfe.types import BadSample, UserError

RECORD = np.dtype([("offset", "<u8"), ("height", "<u2"), ("width", "<u2")])  # 12 bytes per line; sizes as in `index`
CONVERT = "convert the file with selfe make-manifest"
ENCLOSED = f"captions are enclosed in quotes, which stay part of them; if these are the quotes of CSV, {CONVERT}"
BLOCK = 1 << 16  # records written at once
CHUNK = 1 << 24  # bytes read at once to count lines


class ManifestData(BucketedDataset):
    """UTF-8 manifests, with or without byte order mark, with LF or CRLF line ends; blank lines are skipped."""

    def open(self, path: Path, base_dir: Path) -> Manifest:
        strict = self.on_bad_image == "error"
        return Manifest(path, base_dir, self.max_pixels, self.index_dir, strict, self.convert_icc)


class Line(NamedTuple):
    """The fields of a line."""

    path: str
    prompt: str
    size: tuple[int, int] | None  # height, width in pixels


class Manifest:
    """The non-blank lines of a file by index, read through a memory-mapped table of their offsets."""

    def __init__(
        self,
        path: Path,
        base_dir: Path,
        max_pixels: int,
        index_dir: Path | None = None,
        strict: bool = True,
        convert_icc: bool = True,
    ):
        if not path.is_file():
            raise UserError(f"{path}: no such manifest; set data.params.train_manifest (or val_manifest) to a TSV file")
        self.path, self.base_dir, self.max_pixels = path, base_dir, max_pixels
        self.index_dir, self.strict, self.convert_icc = index_dir, strict, convert_icc

        facts = path.stat()
        if not facts.st_size:
            raise empty(path)

        self.file, self.num_bytes = path.open("rb", buffering=0), facts.st_size
        key = index.stamp(RECORD, facts.st_size, facts.st_mtime_ns, str(base_dir.resolve()), max_pixels)
        self.records = index.load(path, key, index_dir, RECORD, self.scan, self.measure)

    def __reduce__(self) -> tuple:
        return Manifest, (self.path, self.base_dir, self.max_pixels, self.index_dir, self.strict, self.convert_icc)

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

    def location(self, index: int) -> tuple[Path, int, int | None]:
        return Path(self.name(index)), 0, None

    def image(self, index: int, enough: int | None) -> Image.Image:
        with self.naming_line(index):
            name = self.name(index)
            return image_decode.read(Path(name), name, self.max_pixels, enough, self.convert_icc)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) in pixels, from the header of the image file."""
        with self.naming_line(index):
            name = self.name(index)
            return image_decode.size(Path(name), name, self.max_pixels)

    def digest(self) -> str:
        """Digest of the file size and of up to 1024 evenly spaced lines with their image sizes."""
        some = np.unique(np.linspace(0, len(self) - 1, 1024).astype(np.int64))
        lines = [self.text_at(int(offset)) for offset in self.records.take(some)["offset"]]
        return index.stamp(len(self), self.num_bytes, lines, self.sizes(some).tolist())

    def line(self, index: int) -> Line:
        with self.naming_line(index):
            return parse(self.text_at(int(self.records[index]["offset"])))

    def text_at(self, offset: int) -> bytes:
        """The line that starts at `offset`. Read, not mapped: a mapping would make the complete file resident."""
        line = b""
        while b"\n" not in line and (more := os.pread(self.file.fileno(), 4096, offset + len(line))):
            line += more
        return line.partition(b"\n")[0]

    def where(self, offset: int) -> str:
        """`FILE, line N`, as used in error messages. Counts line breaks on every call, because only errors need it."""
        before = sum(
            os.pread(self.file.fileno(), min(CHUNK, offset - i), i).count(b"\n") for i in range(0, offset, CHUNK)
        )
        return f"{self.path}, line {before + 1}"

    @contextmanager
    def naming_line(self, index: int) -> Iterator[None]:
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
        """Write one record per non-blank line.

        Raises:
            BadSample: the first invalid line, kinds as `parse`; lines in CSV quotes are counted first.
            UserError: the file is empty, or not UTF-8 text.
        """
        text_files.check_encoding(self.path)
        rows, previous = [], b""  # records to write; the last non-blank line
        first_quoted, num_quoted, num_enclosed = None, 0, 0

        bar = tqdm(
            total=self.num_bytes, desc=self.path.name, unit="B", unit_scale=True, disable=not sys.stderr.isatty()
        )
        with out.open("wb") as records, self.path.open("rb") as file, bar:
            end = skip_bom(file)
            for number, line in enumerate(file, start=1):
                start, end = end, end + len(line)
                if not line.strip():
                    continue

                try:
                    _, prompt, size = parse(line, previous)
                    rows.append((start, *(size or (0, 0))))
                    num_enclosed += prompt[0] == '"' and text_files.in_csv_quotes(prompt)
                except BadSample as problem:
                    located = BadSample(problem.kind, f"{self.path}, line {number}: {problem}")
                    if problem.kind != "CSV quotes":
                        raise located from problem
                    first_quoted, num_quoted = first_quoted or located, num_quoted + 1

                previous = line
                if len(rows) == BLOCK:
                    records_of(rows).tofile(records)
                    rows.clear()
                    bar.update(end - bar.n)
            records_of(rows).tofile(records)

        if first_quoted:
            raise BadSample("CSV quotes", f"{first_quoted} ({num_quoted} such lines)")
        if not out.stat().st_size:
            raise empty(self.path)
        if num_enclosed:
            log.print_line(f"{self.path}: {num_enclosed} {ENCLOSED}")


def records_of(rows: list[tuple[int, int, int]]) -> np.ndarray:
    """(offset, height, width) of lines -> records (n,)."""
    columns = np.array(rows, np.int64).reshape(-1, 3)
    records = np.empty(len(rows), RECORD)
    records["offset"] = columns[:, 0]
    records["height"], records["width"] = columns[:, 1:].clip(max=index.MAX_SIDE).T
    return records


def skip_bom(file: BinaryIO) -> int:
    """Position a file that was just opened behind its byte order mark, if it has one; returns the position."""
    return file.seek(len(text_files.BOM) if file.read(len(text_files.BOM)) == text_files.BOM else 0)


def parse(line: bytes, previous: bytes = b"") -> Line:
    """The fields of a line. `previous` is the line before it, which explains some errors.

    Raises:
        BadSample: kind `invalid UTF-8`, `carriage return`, `no tab`, `too many tabs`, `empty path`, `empty caption`,
            `control character`, `CSV quotes` or `bad size`. The message does not name file and line.
    """
    try:
        decoded = line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        message = f"not UTF-8 at byte {error.start} of the line; save the file as UTF-8"
        raise BadSample("invalid UTF-8", message) from error

    path, *rest = decoded.split("\t")
    if len(rest) not in (1, 3) or "\r" in decoded:
        raise wrong_columns(decoded, previous)

    path, prompt = path.strip(), rest[0].strip()
    if not path or not prompt:
        kind = "empty caption" if path else "empty path"
        raise BadSample(kind, f"path or prompt is empty in {decoded[:60]!r}; give both")
    if not (path + prompt).isprintable() and (control := text_files.CONTROL.search(path + prompt)):
        raise BadSample("control character", f"contains the control character U+{ord(control[0]):04X}; remove it")
    if (path[0] == '"' and text_files.in_csv_quotes(path)) or ('""' in prompt and text_files.in_csv_quotes(prompt)):
        raise BadSample("CSV quotes", f"{decoded[:60]!r} has the quotes of CSV files; {CONVERT}")

    if len(rest) == 1:
        return Line(path, prompt, None)
    width, height = rest[1].strip(), rest[2].strip()
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise BadSample("bad size", f"width and height must be positive integers (pixels) in {decoded[:60]!r}")
    return Line(path, prompt, (int(height), int(width)))


def wrong_columns(line: str, previous: bytes) -> BadSample:
    """The error for a line that does not have two or four columns, with the cause if it can be seen."""
    if "\r" in line:
        return BadSample("carriage return", f"a carriage return alone (U+000D) does not end a line; {CONVERT}")

    num_tabs = line.count("\t")
    message = f"expected path, one tab, prompt; found {num_tabs} tabs in {line[:60]!r}"
    opened = previous.rpartition(b"\t")[2].strip()
    if opened.startswith(b'"') and opened.count(b'"') % 2:
        message += f"; the caption that begins in the line before has a line break in CSV quotes: {CONVERT}"
    return BadSample("too many tabs" if num_tabs else "no tab", message)


def empty(path: Path) -> UserError:
    return UserError(f"{path}: the manifest is empty; write one line per image: path, tab, prompt")
