"""Manifests: text files that list images and captions (see `manifest_formats`), read through an index."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from selfe import log
from selfe.data import index
from selfe.data.captions import Captions
from selfe.data.dataset import BucketedDataset, Source
from selfe.data.manifest_formats import ENCLOSED, Line, Tsv, detect, empty, records
from selfe.errors import BadSample
from selfe.io import image_decode, storage, text_files
from selfe.io.disk_cache import DiskCache
from selfe.io.storage import RemotePath

RECORD = np.dtype([("offset", "<u8"), ("height", "<u2"), ("width", "<u2")])  # 12 bytes per line; sizes as in `index`
# with columns of names, a record may have others or several captions, so that its length is not that of a caption
TABLE_RECORD = np.dtype([*RECORD.descr, ("caption_bytes", "<u2")])
LONGEST = 65535  # bytes of a caption; longer ones are stored as this
BLOCK = 1 << 16  # records written at once
CHUNK = 1 << 24  # bytes read at once to count lines


class ManifestData(BucketedDataset):
    """Manifests in UTF-8: TSV, CSV (.csv) or JSON lines (.jsonl). Blank lines are skipped."""

    def open(self, path: Path | RemotePath, base_dir: Path | RemotePath) -> Manifest:
        reading = self.reading(base_dir)
        columns = {"image_column": self.image_column, "caption_column": self.caption_column}
        options = (reading.max_pixels, reading.index_dir, reading.strict, reading.convert_icc, reading.cache)
        return Manifest(path, base_dir, *options, **columns)


class Manifest(Source):
    """The records of a file by index, read through a memory-mapped table of their offsets."""

    def __init__(
        self,
        path: Path | RemotePath,
        base_dir: Path | RemotePath,
        max_pixels: int,
        index_dir: Path | None = None,
        strict: bool = True,
        convert_icc: bool = True,
        cache: DiskCache | None = None,
        image_column: str | None = None,
        caption_column: str | None = None,
    ):
        columns = (image_column, caption_column)
        self.format = detect(path, *columns)
        self.in_table = not isinstance(self.format, Tsv) or bool(self.format.header)
        self.path, self.base_dir, self.max_pixels = path, base_dir, max_pixels
        self.index_dir, self.strict, self.convert_icc = index_dir, strict, convert_icc

        self.cache = cache or DiskCache()
        self.arguments = (path, base_dir, max_pixels, index_dir, strict, convert_icc, self.cache, *columns)

        # of a manifest in a store, a copy is read; the index has a name of its own in the folder of copies
        facts = path.stat()
        self.version, self.num_bytes = f"{path} {facts.st_size} {facts.st_mtime_ns}", facts.st_size
        if isinstance(path, RemotePath):
            folder, listed = index_dir or self.cache.folder / "indices", Path(f"{index.stamp(path.url)}-{path.name}")
            folder.mkdir(parents=True, exist_ok=True)
            with index.locked(folder / f"{listed}.lock"):
                self.file = self.cache.open(f"{path.url} {self.version}", lambda file: storage.download(path, file))
        else:
            self.file, folder, listed = path.open("rb", buffering=0), index_dir, path

        dtype = TABLE_RECORD if self.in_table else RECORD
        root = str(base_dir.resolve()) if isinstance(base_dir, Path) else base_dir.url
        chosen = columns if any(columns) else ()
        key = index.stamp(dtype, facts.st_size, facts.st_mtime_ns, root, max_pixels, *chosen)
        self.records = index.load(listed, key, folder, dtype, self.scan, self.measure)

    def __reduce__(self) -> tuple:
        return Manifest, self.arguments

    def __len__(self) -> int:
        return len(self.records)

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        return self.records.sizes(indices)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Mean caption lengths (n,) in bytes; for TSV without a header those of lines, which paths change little."""
        if self.in_table:
            return self.records.take(indices)["caption_bytes"].astype(np.int64)

        last = len(self) - 1
        ends = self.records.take(np.minimum(indices + 1, last))["offset"]
        ends = np.where(indices == last, self.num_bytes, ends).astype(np.int64)
        return ends - self.records.take(indices)["offset"].astype(np.int64)

    def captions(self, index: int) -> Captions:
        return self.line(index).captions

    def name(self, index: int) -> str:
        return str(self.image_path(index))

    def image_path(self, index: int) -> Path | RemotePath:
        return storage.join(self.base_dir, self.line(index).path)

    def location(self, index: int) -> tuple[Path | RemotePath, int, int | None]:
        return self.image_path(index), 0, None

    def image(self, index: int, enough: int | None) -> Image.Image:
        with self.naming_line(index):
            path = self.image_path(index)
            file = storage.image_file(path, self.cache, self.version)
            return image_decode.read(file, str(path), self.max_pixels, enough, self.convert_icc)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) in pixels, from the header of the image file."""
        with self.naming_line(index):
            path = self.image_path(index)
            return image_decode.size(storage.image_file(path, self.cache, self.version), str(path), self.max_pixels)

    def digest(self) -> str:
        """Digest of the file size and of up to 1024 evenly spaced lines with their image sizes."""
        some = np.unique(np.linspace(0, len(self) - 1, 1024).astype(np.int64))
        lines = [self.text_at(int(offset)) for offset in self.records.take(some)["offset"]]
        return index.stamp(len(self), self.num_bytes, lines, self.sizes(some).tolist())

    def line(self, index: int) -> Line:
        with self.naming_line(index):
            return self.format.parse(self.text_at(int(self.records[index]["offset"])))

    def text_at(self, offset: int) -> bytes:
        """The record that starts at `offset`, without its line end."""
        return self.format.next_record(self.lines_from(offset)).removesuffix(b"\n")

    def lines_from(self, offset: int) -> Iterator[bytes]:
        """The lines of the file from `offset` on, with their ends.

        Read, not mapped: a mapping would make the complete file resident.
        """
        rest = b""
        while more := os.pread(self.file.fileno(), 4096, offset):
            offset += len(more)
            *lines, rest = (rest + more).split(b"\n")
            for line in lines:
                yield line + b"\n"
        if rest:
            yield rest

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
        """Write one index record per sample.

        Raises:
            BadSample: the first invalid record, kinds as `Format.parse`; lines in CSV quotes are counted first.
            UserError: the file has no records.
        """
        rows, previous = [], b""  # index records to write; the record before
        first_quoted, num_quoted, num_enclosed = None, 0, 0

        bar = tqdm(
            total=self.num_bytes, desc=self.path.name, unit="B", unit_scale=True, disable=not sys.stderr.isatty()
        )
        with out.open("wb") as table, os.fdopen(os.dup(self.file.fileno()), "rb") as file, bar:
            for offset, number, record in records(file, self.format):
                try:
                    _, captions, size = self.format.parse(record, previous)
                    first, length = captions.first, captions.mean_bytes if self.in_table else 0
                    rows.append((offset, *(size or (0, 0)), length))
                    num_enclosed += first[0] == '"' and text_files.in_csv_quotes(first)
                except BadSample as problem:
                    located = BadSample(problem.kind, f"{self.path}, line {number}: {problem}")
                    if problem.kind != "CSV quotes":
                        raise located from problem
                    first_quoted, num_quoted = first_quoted or located, num_quoted + 1

                previous = record
                if len(rows) == BLOCK:
                    self.table_of(rows).tofile(table)
                    rows.clear()
                    bar.update(offset - bar.n)
            self.table_of(rows).tofile(table)

        if first_quoted:
            raise BadSample("CSV quotes", f"{first_quoted} ({num_quoted} such lines)")
        if not out.stat().st_size:
            raise empty(self.path)
        if not isinstance(self.format, Tsv):
            columns = self.format.columns
            log.print_line(
                f"{self.path}: images are those of {columns.image!r}, captions those of {columns.describe_captions()}"
            )
        elif num_enclosed:
            log.print_line(f"{self.path}: {num_enclosed} {ENCLOSED}")

    def table_of(self, rows: list[tuple[int, int, int, int]]) -> np.ndarray:
        """(offset, height, width, bytes of the caption) of samples -> index records (n,)."""
        columns = np.array(rows, np.int64).reshape(-1, 4)
        table = np.empty(len(rows), TABLE_RECORD if self.in_table else RECORD)
        table["offset"] = columns[:, 0]
        table["height"], table["width"] = columns[:, 1:3].clip(max=index.MAX_SIDE).T
        if self.in_table:
            table["caption_bytes"] = columns[:, 3].clip(max=LONGEST)
        return table
