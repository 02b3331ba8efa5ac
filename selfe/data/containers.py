"""Captioned images inside of files that are indexed in one pass: tar files of a store, Parquet and Arrow tables.

The pass reads every file once, file after file, and writes two files: an index with the place, the size and a checksum
of each image, and the captions. Afterwards, an image is one read of a range of bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
from PIL import Image
from tqdm import tqdm

from selfe import log
from selfe.data import captions, index
from selfe.data.captions import Captions
from selfe.data.dataset import Reading, Source
from selfe.errors import BadSample, UserError
from selfe.io import image_decode, storage
from selfe.io.storage import RemotePath

# image: position of its first byte in the file, or in its group; captions: the same in the file of captions; length:
# approximate bytes of a caption; sizes as in `index`
FIELDS = (
    "file:<u4 group:<u4 row:<u4 image:<u8 image_bytes:<u4 checksum:<u4 captions:<u8 captions_bytes:<u4 length:<u4 "
    "height:<u2 width:<u2"
)
RECORD = np.dtype([tuple(field.split(":")) for field in FIELDS.split()])


LARGE = 10**9  # bytes of files, above which an index takes long enough to be announced
CHANGED = "differs from the index; it has changed or is damaged: run the same command again to index it anew"


class Entry(NamedTuple):
    """A sample of a file, while it is indexed."""

    row: int  # from 1, in its file
    group: int
    offset: int  # of the image in the file, or in its group
    image: bytes | memoryview | str  # the content of an image file, or the path of one
    captions: Captions
    length: int  # approximate bytes of a caption


class Reader(Protocol):
    """A format of files. Equal readers read the same from a file."""

    grouped: bool  # an image is read from its group, which `write_group` writes, rather than from its file
    in_rows: bool  # images are named by row, rather than by position

    def entries(self, path: Path) -> Iterator[Entry | BadSample]:
        """The samples of a file of this machine in order, and an error in place of each that cannot be used."""
        ...

    def notes(self) -> str:
        """What was not used of the files, for a line of output; empty if everything was."""
        ...

    def write_group(self, file: Path | RemotePath, group: int, out: BinaryIO) -> None:
        """Write the images of a group one after the other."""
        ...


class Container(Source):
    """The samples of some files by index, files in the given order."""

    def __init__(self, pattern: str, files: Sequence[Path] | Sequence[RemotePath], reader: Reader, reading: Reading):
        self.pattern, self.files, self.reader, self.reading = pattern, files, reader, reading
        self.remote = isinstance(files[0], RemotePath)
        self.opened = lru_cache(maxsize=64)(lambda number: self.files[number].open("rb", buffering=0))

        # a file of another size or version is another file
        stats = [file.known if self.remote else file.stat() for file in files]
        stats = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
        facts = [(file.name, *stat) for file, stat in zip(files, stats, strict=True)]
        self.sizes_of_files = [size for size, _ in stats]
        addresses = [file.url if self.remote else str(file.resolve()) for file in files]
        self.identities = [f"{address} {stat}" for address, stat in zip(addresses, stats, strict=True)]

        key = index.stamp(RECORD, facts, reading.max_pixels, reader)
        path = Path(f"{index.stamp(pattern)}-{files[0].name}") if self.remote else files[0]
        folder = reading.index_dir or (reading.cache.folder / "indices" if self.remote else None)
        self.records = index.load(path, key, folder, RECORD, self.scan, lambda records: None)
        self.side = index.location(path, key, folder).with_suffix(index.CAPTIONS).open("rb", buffering=0)

    def __reduce__(self) -> tuple:
        return Container, (self.pattern, self.files, self.reader, self.reading)

    def __len__(self) -> int:
        return len(self.records)

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        return self.records.sizes(indices)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return self.records.take(indices)["length"].astype(np.int64)

    def captions(self, index: int) -> Captions:
        record = self.side_record(index)
        texts, weights = record.get(captions.LIST), record.get(captions.WEIGHTS)
        return captions.read(record.get("caption"), texts, weights, captions.stripped)

    def name(self, index: int) -> str:
        record = self.records[index]
        where = f"row {record['row']}" if self.reader.in_rows else f"image at byte {record['image']}"
        return f"{self.files[record['file']]}, {where}"

    def location(self, index: int) -> tuple[Path | RemotePath, int, int | None]:
        record = self.records[index]
        if not record["image_bytes"]:
            return storage.join(self.reading.base_dir, self.side_record(index)["path"]), 0, None
        if self.reader.grouped:
            return self.files[record["file"]], 0, None
        return self.files[record["file"]], int(record["image"]), int(record["image_bytes"])

    def image(self, index: int, enough: int | None) -> Image.Image:
        reading, name = self.reading, self.name(index)
        return image_decode.read(self.content(index), name, reading.max_pixels, enough, reading.convert_icc)

    def digest(self) -> str:
        """Digest of the names and sizes of the files and of up to 1024 evenly spaced records."""
        some = np.unique(np.linspace(0, len(self) - 1, 1024).astype(np.int64))
        names = [(file.name, size) for file, size in zip(self.files, self.sizes_of_files, strict=True)]
        return index.stamp(names, self.records.take(some).tolist())

    # ---- reading ----

    def side_record(self, index: int) -> dict:
        """The captions of a sample, and the path of its image if that is a file of its own. Raises BadSample."""
        record = self.records[index]
        content = json.loads(os.pread(self.side.fileno(), int(record["captions_bytes"]), int(record["captions"])))
        if "problem" in content:
            raise BadSample(*content["problem"])
        return content

    def content(self, index: int) -> BytesIO | Path:
        """The image file of a sample.

        Raises:
            BadSample: there is none.
            UserError: the file has changed since it was indexed.
        """
        record = self.records[index]
        if not record["image_bytes"]:
            path = storage.join(self.reading.base_dir, self.side_record(index)["path"])
            return storage.image_file(path, self.reading.cache, self.identities[record["file"]])

        # a copy that does not match, for instance after a power failure, is read again once
        for _ in range(2):
            content = self.read_image(record)
            if zlib.crc32(content) == record["checksum"]:
                return BytesIO(content)
            self.reading.cache.remove(self.key(record))
        raise UserError(f"{self.name(index)}: {CHANGED}")

    def key(self, record: np.void) -> str:
        """The key of an image, or of its group, in the cache."""
        identity = self.identities[record["file"]]
        if self.reader.grouped:
            return f"{identity} group {record['group']}"
        return f"{identity} bytes {record['image']} {record['image_bytes']}"

    def read_image(self, record: np.void) -> bytes:
        """The bytes at the place of an image, which are fewer if its file is shorter now."""
        number, offset, size = (int(record[name]) for name in ("file", "image", "image_bytes"))
        file, cache = self.files[number], self.reading.cache

        try:
            if self.reader.grouped:
                group = int(record["group"])
                with cache.open(self.key(record), lambda out: self.reader.write_group(file, group, out)) as blob:
                    return os.pread(blob.fileno(), size, offset)
            if self.remote:
                return cache.read(self.key(record), lambda: file.read(offset, size))
            return os.pread(self.opened(number).fileno(), size, offset)
        except FileNotFoundError as error:
            raise UserError(f"{file}: no such file any more; {CHANGED}") from error

    # ---- indexing ----

    def scan(self, out: Path) -> None:
        """Write the records of all files to `out`, and their captions beside it; resumes after the last complete file.

        Raises:
            BadSample: in strict mode, the first sample that cannot be used.
            UserError: a file cannot be read, or there are no samples.
        """
        pieces = out.with_suffix(index.PIECES)
        pieces.mkdir(parents=True, exist_ok=True)
        if (total := sum(self.sizes_of_files)) > LARGE:
            log.print_line(
                f"{self.pattern}: {len(self.files)} files, {total / 1e9:.1f} GB, are read once to index them"
            )
        bar = tqdm(self.files, desc=f"index of {self.files[0].name} ...", disable=not sys.stderr.isatty())
        for number, file in enumerate(bar):
            if not (pieces / f"{number}").exists():
                self.scan_file(number, file, pieces / f"{number}")

        # join the pieces
        partial, num_records, num_bytes = out.with_suffix(".captions-partial"), 0, 0
        with out.open("wb") as table, partial.open("wb") as side:
            for number in range(len(self.files)):
                records = np.fromfile(pieces / f"{number}", RECORD)
                records["captions"] += side.tell()
                records.tofile(table)
                num_records += len(records)
                num_bytes += int(records["image_bytes"].sum(dtype=np.int64))
                with (pieces / f"{number}.captions").open("rb") as of_piece:
                    shutil.copyfileobj(of_piece, side)
        if not num_records:
            raise UserError(f"{self.pattern}: no images{self.reader.notes()}")
        partial.rename(out.with_suffix(index.CAPTIONS))
        shutil.rmtree(pieces)
        if notes := self.reader.notes():
            log.print_line(f"{self.pattern}{notes}")
        if self.reader.grouped and num_bytes > self.reading.cache.max_bytes:
            log.print_line(
                f"{self.pattern}: the images, {num_bytes / 1e9:.1f} GB, are more than data.params.cache_gb: most reads "
                "unpack many images for one; raise it, or convert the files with selfe make-manifest FILES --shards DIR"
            )

    def scan_file(self, number: int, file: Path | RemotePath, piece: Path) -> None:
        """Write the records of a file to `piece`, and its captions beside it."""
        records = []
        copies = self.reading.cache.folder / "copies"
        with storage.local_copy(file, copies) as path, piece.with_suffix(".captions").open("wb") as side:
            try:
                for entry in self.reader.entries(path):
                    fields, content = self.examine(entry, str(file))
                    line = json.dumps(content).encode() + b"\n"
                    row, group, offset, image_bytes, checksum, length, height, width = fields
                    place = (side.tell(), len(line))
                    records.append((number, group, row, offset, image_bytes, checksum, *place, length, height, width))
                    side.write(line)
            except UserError as error:  # names the file itself, not its copy
                if str(path) not in str(error):
                    raise
                message = str(error).replace(str(path), str(file))
                raise BadSample(error.kind, message) if isinstance(error, BadSample) else UserError(message) from error

        partial = piece.with_suffix(".partial")
        np.array(records, RECORD).tofile(partial)
        partial.rename(piece)

    def examine(self, entry: Entry | BadSample, file: str) -> tuple[tuple[int, ...], dict]:
        """The fields of a record and what goes beside its captions. Raises BadSample in strict mode."""
        try:
            if isinstance(entry, BadSample):
                raise entry
            where = f"row {entry.row}" if self.reader.in_rows else f"image at byte {entry.offset}"
            size, checksum, num_bytes = index.BAD, 0, 0
            content = dict(captions.to_record(entry.captions))

            if isinstance(entry.image, str):
                path = storage.join(self.reading.base_dir, entry.image)
                image = storage.image_file(path, self.reading.cache, file)
                content["path"] = entry.image
            else:
                image = BytesIO(entry.image)
                checksum, num_bytes = zlib.crc32(entry.image), len(entry.image)

            try:
                size = image_decode.size(image, f"{file}, {where}", self.reading.max_pixels)
            except BadSample:
                if self.reading.strict:
                    raise
            size = np.clip(size, 0, index.MAX_SIDE).tolist()
            return (entry.row, entry.group, entry.offset, num_bytes, checksum, entry.length, *size), content
        except BadSample as problem:
            if self.reading.strict:
                raise
            return (0, 0, 0, 0, 0, 0, *index.BAD), {"problem": [problem.kind, str(problem)]}
