"""What `selfe make-manifest` reads: folders, tables (CSV, TSV, JSON lines), parquet, saved Hugging Face data sets.

Every source yields its samples in a fixed order, and a `BadSample` in place of each that cannot be used.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from selfe.data.captions import SPACES, Captions, stripped
from selfe.data.manifest_formats import JSON_LINES, Columns, check_width, choose_columns, choose_keys, read_object
from selfe.data.shards import IMAGES
from selfe.data.tables import SPLITS, STATE, import_optional, is_saved, naming_arrow_errors, read_json
from selfe.errors import BadSample, UserError

DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".txt": "\t"}
PARQUET = ".parquet"
CAPTIONS = (".txt", ".caption")  # files beside an image, in order of preference
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # of Hugging Face's imagefolder
REMEDIES = ("pass --image with", "pass --caption with")
NO_HEADER = ("pass --no-header if these are no names, or --image with", "pass --caption with")
GZIP = b"\x1f\x8b"
ROWS = 256  # rows of a parquet file in memory


@dataclass(frozen=True)
class Options:
    """How tables are read; None: by name or content of the file."""

    image: str | None = None  # columns
    caption: str | None = None
    no_header: bool = False
    delimiter: str | None = None
    encoding: str | None = None
    split: str | None = None

    @property
    def columns(self) -> tuple[str | None, str | None]:
        return self.image, self.caption


@dataclass(frozen=True)
class Row:
    """A sample: its image, as a path or as the content of an image file, and its captions."""

    where: str  # FILE, row N
    image: str | bytes
    suffix: str  # of the image file, without the dot
    written: Captions  # as the source has them

    @property
    def captions(self) -> Captions:
        """Each in one line."""
        return self.written._replace(texts=tuple(SPACES.sub(" ", text) for text in self.written.texts))

    @property
    def has_line_breaks(self) -> bool:
        return any(SPACES.search(text) for text in self.written.texts)


@dataclass
class Notes:
    """For the summary: what is used of each table, and what is neither an image nor a caption that is used."""

    lines: list[str] = field(default_factory=list)
    others: Counter = field(default_factory=Counter)  # number of files or folders, by kind


Rows = Iterator[Row | BadSample]


def read(source: Path, options: Options, notes: Notes) -> Rows:
    """The samples of a file or folder.

    Raises:
        UserError: it cannot be read at all, or its columns are unknown.
    """
    if is_saved(source):
        return saved_rows(source, options, notes)
    if source.is_dir():
        return folder_rows(source, options, notes)
    if not source.is_file():
        raise UserError(f"{source}: no such file or folder; give a folder of images, a table or a saved data set")
    if source.suffix.lower() == PARQUET:
        return parquet_rows(source, options, notes)
    return table_rows(source, options, notes)


def make_row(where: str, record: Mapping[str, Any], columns: Columns, lists_are_text: bool = False) -> Row | BadSample:
    """A sample from the values of a row: an image is a path, bytes, or Hugging Face's {bytes, path}."""
    image = record.get(columns.image)
    path, content = image, None
    if isinstance(image, Mapping):
        path, content = image.get("path"), image.get("bytes")
    elif isinstance(image, bytes):
        path, content = None, image

    path = path.strip() if isinstance(path, str) else path
    if not isinstance(path, str | None) or not isinstance(content, bytes | None):
        kind = type(image).__name__
        return BadSample("not an image", f"{where}: the image is neither a path nor bytes but {kind}")
    if not path and not content:
        return BadSample("empty path", f"{where}: there is no image")
    try:
        captions = columns.captions(record, lists_are_text, clean=stripped)
    except BadSample as problem:
        return BadSample(problem.kind, f"{where}: {problem}")
    return Row(where, content or path, Path(path or "").suffix[1:].lower(), captions)


def note_columns(source: Path, columns: Columns, names: list[str], notes: Notes) -> None:
    """Note which columns are used."""
    unused = [name for name in names if name not in columns.names]
    rest = f"; not used: {', '.join(map(repr, unused))}" if unused else ""
    notes.lines.append(f"{source}: images from {columns.image!r}, captions from {columns.describe_captions()}{rest}")


# ---- CSV, TSV and JSON lines ----


def open_text(path: Path, encoding: str | None) -> TextIO:
    """A table as text, decompressed, with its line ends unchanged. Default: UTF-16 with a byte order mark, or UTF-8."""
    with path.open("rb") as file:
        compressed = file.read(len(GZIP)) == GZIP
    file = gzip.open(path) if compressed else path.open("rb")  # noqa: SIM115 - closed by the wrapper

    head = file.read(2)
    file.seek(0)
    if encoding is None:
        encoding = "utf-16" if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    return io.TextIOWrapper(file, encoding, newline="")


def table_rows(path: Path, options: Options, notes: Notes) -> Rows:
    """The rows of a table. They count from 1, with the header."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    suffix = suffixes[-1] if suffixes else ""
    delimiter = options.delimiter or DELIMITERS.get(suffix)
    if suffix not in JSON_LINES and delimiter is None:
        known = ", ".join((*DELIMITERS, *JSON_LINES, PARQUET))
        hint = (
            "write one JSON object per line (.jsonl)" if suffix == ".json" else "rename the file, or pass --delimiter"
        )
        raise UserError(f"{path}: unknown suffix; known are {known}, also with .gz; {hint}")

    number = 0
    try:
        with open_text(path, options.encoding) as file:
            numbered = (
                json_rows(path, file, options, notes)
                if suffix in JSON_LINES
                else csv_rows(path, file, delimiter, options, notes)
            )
            for number, row in numbered:  # noqa: B007 - the number is for messages below
                yield row
    except LookupError as error:
        raise UserError(f"--encoding {options.encoding}: {error}") from error
    except UnicodeError as error:
        raise UserError(f"{path}: after row {number}: {error}; pass --encoding, such as latin-1") from error
    except UserError:
        raise
    except (csv.Error, ValueError, EOFError, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: after row {number}: {error}; correct the file") from error


def json_rows(path: Path, file: TextIO, options: Options, notes: Notes) -> Iterator[tuple[int, Row | BadSample]]:
    columns = None
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        where = f"{path}, row {number}"
        try:
            record = read_object(line)
            if columns is None:
                columns = choose_keys(path, list(record), *options.columns, remedies=REMEDIES)
                note_columns(path, columns, list(record), notes)
            yield number, make_row(where, record, columns)
        except BadSample as problem:
            yield number, BadSample(problem.kind, f"{where}: {problem}")


def csv_rows(
    path: Path, file: TextIO, delimiter: str, options: Options, notes: Notes
) -> Iterator[tuple[int, Row | BadSample]]:
    # strict: a quote that does not enclose a complete field is an error, rather than dropped
    table = csv.reader(file, delimiter=delimiter, strict=True)
    header, columns, width = ["image", "caption"], Columns("image", "caption"), None
    if not options.no_header:
        header = [name.strip() for name in next(table, [])]
        columns = choose_columns(path, header, *options.columns, NO_HEADER)
        note_columns(path, columns, header, notes)
        width = len(header)

    for number, row in enumerate(table, start=1 if options.no_header else 2):
        if not any(field.strip() for field in row):
            continue
        width = width or len(row)
        where = f"{path}, row {number}"
        try:
            check_width(row, width)
            values = reversed(list(zip(header, row, strict=False)))  # of two columns of a name, the first counts
            yield number, make_row(where, dict(values), columns, lists_are_text=True)
        except BadSample as problem:
            yield number, BadSample(problem.kind, f"{where}: {problem}")


# ---- parquet and saved data sets ----


def parquet_rows(path: Path, options: Options, notes: Notes) -> Rows:
    """The rows of a parquet file, from 1, read in blocks; only the columns that are used are read."""
    parquet = import_optional("pyarrow.parquet", path)
    with naming_arrow_errors(path), parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        columns = choose_columns(path, names, *options.columns, REMEDIES)
        note_columns(path, columns, names, notes)
        yield from arrow_rows(path, file.iter_batches(ROWS, columns=columns.names), columns)


def saved_rows(folder: Path, options: Options, notes: Notes) -> Rows:
    """The rows of a data set that was written by `datasets.save_to_disk`, from 1 in each of its Arrow files."""
    ipc = import_optional("pyarrow.ipc", folder)
    splits = folder / SPLITS
    if splits.is_file():
        names = read_json(splits)["splits"]
        if options.split not in names:
            raise UserError(f"{folder}: has several splits; pass --split with one of {', '.join(map(repr, names))}")
        folder = folder / options.split

    columns = None
    for entry in read_json(folder / STATE)["_data_files"]:
        path = folder / entry["filename"]
        with naming_arrow_errors(path), path.open("rb") as file, ipc.open_stream(file) as stream:
            if columns is None:
                columns = choose_columns(folder, stream.schema.names, *options.columns, REMEDIES)
                note_columns(folder, columns, stream.schema.names, notes)
            yield from arrow_rows(path, (batch.select(columns.names) for batch in stream), columns)


def arrow_rows(path: Path, batches: Iterable, columns: Columns) -> Rows:
    number = 0
    for batch in batches:
        for record in batch.to_pylist():
            number += 1
            yield make_row(f"{path}, row {number}", record, columns)


# ---- folders ----


def folder_rows(root: Path, options: Options, notes: Notes) -> Rows:
    """The images of a folder and its sub-folders in the order of their paths, which are relative to the folder.

    An image has the captions that a metadata file lists for it, or else that of the file beside it with the same name
    and the suffix .txt or .caption.
    """
    files = list_files(root, notes)
    images = [path for path in files if path.suffix[1:].lower() in IMAGES]
    captions = {path for path in files if path.suffix.lower() in CAPTIONS}
    if not images and notes.others[PARQUET]:
        raise UserError(f"{root}: has no images but parquet files; give these instead, such as {root}/train-*.parquet")
    listed, problems = read_metadata(root, files, options, notes)
    yield from problems

    without_image = set(captions)
    for path in images:
        beside = [path.with_suffix(suffix) for suffix in CAPTIONS if path.with_suffix(suffix) in captions]
        without_image.difference_update(beside)
        rows = listed.pop(path.as_posix(), [])

        unused = beside if rows else beside[1:]
        notes.others.update(f"{caption.suffix} of an image that has another caption" for caption in unused)
        yield from rows or [captioned(root, path, beside)]

    for path, rows in sorted(listed.items()):
        yield from (BadSample("missing image", f"{row.where}: no such image: {root / path}") for row in rows)
    for path in sorted(without_image):
        yield BadSample("caption without image", f"{root / path}: there is no image with this name beside it")


def list_files(root: Path, notes: Notes) -> list[Path]:
    """The files below a folder as paths relative to it, sorted. Files of no use are counted."""

    def stop(error: OSError) -> None:
        raise error

    files = []
    for folder, folders, names in os.walk(root, onerror=stop):
        here = Path(folder).relative_to(root)
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        notes.others["link to a folder"] += len(links)
        notes.others["hidden folder"] += sum(name.startswith(".") or name == "__MACOSX" for name in folders)
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]

        for name in names:
            suffix = Path(name).suffix.lower()
            if name.startswith("."):
                notes.others["hidden file"] += 1
            elif suffix[1:] in IMAGES or suffix in CAPTIONS or name in METADATA:
                files.append(here / name)
            else:
                notes.others[suffix or "no suffix"] += 1
    notes.others = +notes.others  # without zeros
    return sorted(files, key=Path.as_posix)


def read_metadata(
    root: Path, files: list[Path], options: Options, notes: Notes
) -> tuple[dict[str, list[Row]], list[BadSample]]:
    """The rows of all metadata files by image path relative to `root`, and the rows that cannot be used."""
    listed, problems, folders = defaultdict(list), [], set()
    for path in files:
        if path.name not in METADATA:
            continue
        if path.parent in folders:
            raise UserError(f"{root / path.parent}: has several of {', '.join(METADATA)}; keep one")
        folders.add(path.parent)

        for row in read(root / path, options, notes):
            if isinstance(row, BadSample):
                problems.append(row)
            elif isinstance(row.image, bytes):
                raise UserError(f"{root / path}: stores images, not paths; convert this file on its own")
            else:
                image = os.path.normpath(path.parent / row.image)
                listed[image].append(replace(row, image=image))
    return listed, problems


def captioned(root: Path, path: Path, beside: list[Path]) -> Row | BadSample:
    """The image at a path relative to `root` with the caption in the first of the files beside it."""
    name = str(root / path)
    if not beside:
        return BadSample("no caption", f"{name}: there is no .txt or .caption beside it, and no metadata file lists it")
    try:
        text = (root / beside[0]).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"{root / beside[0]}: not UTF-8 at byte {error.start}; save it as UTF-8"
        return BadSample("invalid UTF-8", message)
    return Row(name, path.as_posix(), path.suffix[1:].lower(), Captions((text.strip(),)))
