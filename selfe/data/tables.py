"""Tables with images: Parquet and Arrow files of Hugging Face, and data sets that `datasets` has saved on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from selfe.data import patterns
from selfe.data.captions import one_line
from selfe.data.containers import Container, Entry
from selfe.data.dataset import BucketedDataset, Reading
from selfe.data.manifest_formats import Columns, check_fields, choose_columns
from selfe.errors import BadSample, UserError
from selfe.io.storage import RemotePath

PARQUET, ARROW = ".parquet", ".arrow"
STATE, SPLITS = "state.json", "dataset_dict.json"  # of `datasets.save_to_disk`
AGAIN = "write or download the file again"


class TableData(BucketedDataset):
    """As `ManifestData`, with Parquet and Arrow files, such as `data/train-*.parquet`, or a saved data set."""

    def open(self, path: Path | RemotePath, base_dir: Path | RemotePath) -> Container:
        return open_table(path, self.reading(base_dir))


def open_table(path: Path | RemotePath, reading: Reading) -> Container:
    """The source for a pattern or a saved data set."""
    files = table_files(path)
    kind = ParquetReader if files[0].suffix.lower() == PARQUET else ArrowReader
    return Container(str(path), files, kind(reading.image_column, reading.caption_column), reading)


def table_files(path: Path | RemotePath) -> list[Path] | list[RemotePath]:
    """The files of a pattern or of a saved data set, in order. Raises UserError."""
    if isinstance(path, Path) and path.is_dir():
        return saved_files(path)
    files = patterns.matching(path, "table; set data.params.train_manifest to a pattern such as data/train-*.parquet")

    kinds = sorted({file.suffix.lower() for file in files})
    if kinds not in ([PARQUET], [ARROW]):
        raise UserError(f"{path}: has {' and '.join(kinds)} files; a pattern names either .parquet or .arrow files")
    return files


def is_saved(path: Path | RemotePath) -> bool:
    """Whether this is a folder that `datasets.save_to_disk` has written."""
    return isinstance(path, Path) and any((path / name).is_file() for name in (STATE, SPLITS))


def saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a data set that `datasets.save_to_disk` has written."""
    if (folder / SPLITS).is_file():
        names = read_json(folder / SPLITS)["splits"]
        choices = ", ".join(str(folder / name) for name in names)
        raise UserError(f"{folder}: has several splits; set data.params.train_manifest to one of {choices}")
    if not (folder / STATE).is_file():
        raise UserError(f"{folder}: is not a saved data set; give a pattern such as {folder}/*.parquet")
    return [folder / entry["filename"] for entry in read_json(folder / STATE)["_data_files"]]


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); save the data set again") from error


def import_optional(name: str, source: object) -> ModuleType:
    """A module of pyarrow, which is an optional dependency. Raises UserError if it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        remedy = "run ./scripts/setup.sh --extra parquet, or pip install 'selfe[parquet]'"
        raise UserError(f"{source}: reading it needs pyarrow, which is not installed; {remedy}") from error


@contextmanager
def naming_arrow_errors(path: object) -> Iterator[None]:
    """Raise UserError for a file that pyarrow cannot read."""
    arrow = import_optional("pyarrow", path)
    try:
        yield
    except arrow.ArrowException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}; {AGAIN}") from error


class Value(NamedTuple):
    """The image of a row: its content, or else a path, or neither."""

    content: Any  # pyarrow.Buffer
    path: str | None


@dataclass
class TableReader:
    """What the readers of both formats share. Columns of None: by their usual names."""

    image_column: str | None
    caption_column: str | None
    in_rows = True

    def columns(self, path: Path, names: list[str]) -> Columns:
        return choose_columns(path, names, self.image_column, self.caption_column)

    def notes(self) -> str:
        return ""

    def entry(self, where: str, place: tuple[int, int, int], value: Value, columns: Columns, record: dict) -> Entry:
        """An entry at (row, group, offset). Raises BadSample without an image or a usable caption."""
        if value.content is None and not value.path:
            raise BadSample("empty path", f"{where}: there is no image")
        try:
            captions = columns.captions(record, clean=one_line)
            check_fields("image", "".join(captions.texts), str(record))
        except BadSample as problem:
            raise BadSample(problem.kind, f"{where}: {problem}") from problem
        image = value.path if value.content is None else memoryview(value.content)
        return Entry(*place, image, captions, captions.mean_bytes)


@dataclass
class ArrowReader(TableReader):
    """Arrow files in the format of streams, uncompressed, as `datasets` writes them: images are ranges of the file."""

    grouped = False

    def entries(self, path: Path) -> Iterator[Entry | BadSample]:
        ipc = import_optional("pyarrow.ipc", path)
        arrow = import_module("pyarrow")
        row = 0
        with naming_arrow_errors(path), arrow.memory_map(str(path)) as mapped:
            content = mapped.read_buffer()
            stream = ipc.open_stream(content)
            columns = self.columns(path, stream.schema.names)
            texts = [name for name in columns.names if name != columns.image]

            for batch in stream:
                records = batch.select(texts).to_pylist()
                for value, record in zip(image_values(path, batch.column(columns.image)), records, strict=True):
                    row += 1
                    try:
                        offset = value.content.address - content.address if value.content is not None else 0
                        if not 0 <= offset < content.size:
                            raise UserError(f"{path}: is compressed; save the data set without compression")
                        yield self.entry(f"{path}, row {row}", (row, 0, offset), value, columns, record)
                    except BadSample as problem:
                        yield problem

    def write_group(self, file: Path | RemotePath, group: int, out: BinaryIO) -> None:
        raise NotImplementedError("an image is read from its file")


@dataclass
class ParquetReader(TableReader):
    """Parquet files. Their pages are compressed, so that the images of a row group are unpacked together."""

    grouped = True

    def __post_init__(self):
        self.metadata = lru_cache(maxsize=64)(self.read_metadata)

    def __reduce__(self) -> tuple:
        return type(self), (self.image_column, self.caption_column)

    def read_metadata(self, file: Path | RemotePath) -> Any:
        parquet = import_optional("pyarrow.parquet", file)
        with file.open("rb") as stream:
            return parquet.read_metadata(stream)

    def entries(self, path: Path) -> Iterator[Entry | BadSample]:
        parquet = import_optional("pyarrow.parquet", path)
        row = 0
        with naming_arrow_errors(path), parquet.ParquetFile(path) as file:
            columns = self.columns(path, file.schema_arrow.names)
            texts = [name for name in columns.names if name != columns.image]

            for group in range(file.num_row_groups):
                table, offset = file.read_row_group(group, columns.names), 0
                records = table.select(texts).to_pylist()
                values = (v for chunk in table.column(columns.image).chunks for v in image_values(path, chunk))
                for value, record in zip(values, records, strict=True):
                    row += 1
                    try:
                        yield self.entry(f"{path}, row {row}", (row, group, offset), value, columns, record)
                    except BadSample as problem:
                        yield problem
                    offset += value.content.size if value.content is not None else 0

    def write_group(self, file: Path | RemotePath, group: int, out: BinaryIO) -> None:
        parquet = import_optional("pyarrow.parquet", file)
        metadata = self.metadata(file)
        with naming_arrow_errors(file), file.open("rb") as stream:
            opened = parquet.ParquetFile(stream, metadata=metadata)
            column = self.columns(file, opened.schema_arrow.names).image
            for chunk in opened.read_row_group(group, [column]).column(0).chunks:
                for value in image_values(file, chunk):
                    if value.content is not None:
                        out.write(value.content)


def image_values(path: object, array: Any) -> Iterator[Value]:
    """The images of an array of bytes, of paths, or of Hugging Face's {bytes, path}; without copies of their bytes."""
    types = import_module("pyarrow").types
    contents = paths = None
    if types.is_struct(array.type):
        fields = dict(zip([field.name for field in array.type], array.flatten(), strict=True))
        contents, paths = fields.get("bytes"), fields.get("path")
    elif types.is_binary(array.type) or types.is_large_binary(array.type):
        contents = array
    elif types.is_string(array.type) or types.is_large_string(array.type):
        paths = array
    if contents is None and paths is None:
        kind = str(array.type)[:60]
        raise UserError(f"{path}: images are neither bytes nor paths but {kind}; set data.params.image_column")

    contents = slices(contents) if contents is not None else [None] * len(array)
    paths = paths.to_pylist() if paths is not None else [None] * len(array)
    for content, path in zip(contents, paths, strict=True):
        yield Value(content, path)


def slices(array: Any) -> Iterator[Any]:
    """The bytes of each value of an array as a part of the array's own buffer; None if there are none."""
    _, offsets, data = array.buffers()
    width = np.int64 if import_module("pyarrow").types.is_large_binary(array.type) else np.int32
    ends = np.frombuffer(offsets, width)[array.offset : array.offset + len(array) + 1] if len(array) else [0]
    for start, end, valid in zip(ends[:-1], ends[1:], array.is_valid().to_pylist(), strict=True):
        yield data.slice(int(start), int(end - start)) if valid and end > start else None
