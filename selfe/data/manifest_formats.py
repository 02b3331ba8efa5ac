"""The text formats of manifests: TSV, CSV and JSON lines. A record is the bytes of one sample, with its line end."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from selfe.errors import BadSample, UserError
from selfe.io import text_files

# names of columns and keys, in order of preference
IMAGE = ("path", "file_name", "filename", "filepath", "file", "image", "image_path", "img")
CAPTION = ("caption", "text", "prompt", "description")

JSON_LINES = (".jsonl", ".ndjson")
CONVERT = "convert the file with selfe make-manifest"
CONVERTED = (".parquet", ".gz")  # by `selfe make-manifest`
OTHERS = (".arrow", ".feather", ".json", ".zip", ".xlsx", ".xls", ".ods")
ENCLOSED = f"captions are enclosed in quotes, which stay part of them; if these are the quotes of CSV, {CONVERT}"
SPACES = re.compile("[\t\n\x0b\x0c\r\x85\u2028\u2029]+")  # cannot be in a line of TSV; become one space


class Line(NamedTuple):
    """The fields of a record."""

    path: str
    prompt: str
    size: tuple[int, int] | None  # height, width in pixels


class Format(Protocol):
    """How a manifest is divided into records, and a record into fields."""

    start: int  # position of the first record in the file, in bytes: behind a byte order mark and a header

    def next_record(self, lines: Iterator[bytes]) -> bytes:
        """Take one record from the lines of a file, with their ends; empty at the end of the file."""
        ...

    def is_blank(self, record: bytes) -> bool: ...

    def parse(self, record: bytes, previous: bytes = b"") -> Line:
        """The fields of a record. `previous` is the record before it, which explains some errors.

        Raises:
            BadSample: the message does not name file and line.
        """
        ...


def detect(path: Path) -> Format:
    """The format of a manifest, by its suffix: .csv, .jsonl or .ndjson; TSV for all others.

    Raises:
        UserError: there is no such file, it is empty or not UTF-8 text, it needs to be converted, or the names of its
            columns are unknown.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder, not a manifest; write one with selfe make-manifest {path} --out OUT.tsv")
    if not path.is_file():
        raise UserError(f"{path}: no such manifest; set data.params.train_manifest (or val_manifest) to a TSV file")
    suffix = path.suffix.lower()
    if suffix == ".tar":
        raise UserError(f"{path}: is a tar file; tar shards are read by data.module=selfe.data.shards.ShardData")
    if suffix in CONVERTED:
        raise UserError(
            f"{path}: is not read directly; convert it with selfe make-manifest {path} --out OUT.tsv, or --shards DIR "
            "if it stores the images"
        )
    if suffix in OTHERS:
        raise UserError(f"{path}: a manifest is .tsv, .csv or .jsonl; save this file as one of them")
    if not path.stat().st_size:
        raise empty(path)

    text_files.check_encoding(path)
    if suffix == ".csv":
        return Csv.of_file(path)
    if suffix in JSON_LINES:
        return JsonLines.of_file(path)
    with path.open("rb") as file:
        return Tsv(skip_bom(file))


def check_tsv_name(path: Path, option: str) -> None:
    """Raise UserError if a TSV manifest with this name would be read as another format."""
    if path.suffix.lower() in (".csv", ".tar", *JSON_LINES, *CONVERTED, *OTHERS):
        name = path.with_suffix(".tsv")
        raise UserError(f"{option} {path}: a TSV file is written, and would be read as {path.suffix}; use {name}")


def records(file: BinaryIO, format: Format) -> Iterator[tuple[int, int, bytes]]:
    """(position in bytes, number of its first line from 1, record) of each record that is not blank."""
    file.seek(0)
    number = 1 + file.read(format.start).count(b"\n")
    position = format.start
    while record := format.next_record(file):
        if not format.is_blank(record):
            yield position, number, record
        position += len(record)
        number += record.count(b"\n")


def skip_bom(file: BinaryIO) -> int:
    """Position a file that was just opened behind its byte order mark, if it has one; returns the position."""
    return file.seek(len(text_files.BOM) if file.read(len(text_files.BOM)) == text_files.BOM else 0)


def empty(path: Path) -> UserError:
    return UserError(f"{path}: the manifest is empty; write one line per image: path, tab, prompt")


# ---- fields ----


def choose_columns(
    path: Path, names: Sequence[str], image: str | None = None, caption: str | None = None, remedy: str = "pass "
) -> tuple[str, str]:
    """The columns of images and captions: those given, or the first of the usual names that is there.

    Raises:
        UserError: there is none; `remedy` is the text in front of the option that names one.
    """
    chosen = []
    for option, given, usual in (("--image", image, IMAGE), ("--caption", caption, CAPTION)):
        column = next((name for name in ([given] if given else usual) if name in names), None)
        if column is None:
            raise UserError(
                f"{path}: no column {given or ' or '.join(usual)}; {remedy}{option} with one of "
                f"{', '.join(map(repr, names))}, or --no-header if these are no names"
            )
        chosen.append(column)
    return chosen[0], chosen[1]


def caption_of(value: Any) -> str:
    """A caption as one line: line breaks and tabs are spaces. Raises BadSample unless it is a text."""
    if value is not None and not isinstance(value, str):
        raise BadSample("not a text", f"the caption is not a text but {type(value).__name__} {str(value)[:60]!r}")
    return SPACES.sub(" ", (value or "").strip())


def check_fields(path: str, prompt: str, record: str) -> None:
    """Raise BadSample for an empty path or prompt, or one with control characters."""
    if not path or not prompt:
        kind = "empty caption" if path else "empty path"
        raise BadSample(kind, f"path or prompt is empty in {record[:60]!r}; give both")
    if not (path + prompt).isprintable() and (control := text_files.CONTROL.search(path + prompt)):
        raise BadSample("control character", f"contains the control character U+{ord(control[0]):04X}; remove it")


def decode(record: bytes) -> str:
    try:
        return record.decode()
    except UnicodeDecodeError as error:
        message = f"not UTF-8 at byte {error.start} of the line; save the file as UTF-8"
        raise BadSample("invalid UTF-8", message) from error


def read_object(text: str) -> dict[str, Any]:
    """The keys and values of a line of JSON. Raises BadSample if it is not an object."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSample("invalid JSON", f"not a JSON object in one line: {error}") from error
    if not isinstance(record, dict):
        raise BadSample("invalid JSON", f"expected a JSON object in each line, got {text.strip()[:60]!r}")
    return record


def check_width(row: Sequence[str], width: int) -> None:
    """Raise BadSample for a row with more fields than the header, whose captions would be cut at a comma."""
    if len(row) > width:
        message = f"{len(row)} fields, but the header has {width}; enclose captions with delimiters in quotes"
        raise BadSample("too many columns", message)


# ---- formats ----


class RecordPerLine:
    """The part of a `Format` in which every line is a record."""

    def next_record(self, lines: Iterator[bytes]) -> bytes:
        return next(lines, b"")

    def is_blank(self, record: bytes) -> bool:
        return not record.strip()


@dataclass(frozen=True)
class Tsv(RecordPerLine):
    """One line per image: path, tab, prompt, optionally followed by tab, width, tab, height. No header, no quotes."""

    start: int

    def parse(self, record: bytes, previous: bytes = b"") -> Line:
        """The fields of a line.

        Raises:
            BadSample: kind `invalid UTF-8`, `carriage return`, `no tab`, `too many tabs`, `empty path`,
                `empty caption`, `control character`, `CSV quotes` or `bad size`.
        """
        line = decode(record).rstrip("\r\n")
        path, *rest = line.split("\t")
        if len(rest) not in (1, 3) or "\r" in line:
            raise wrong_columns(line, previous)

        path, prompt = path.strip(), rest[0].strip()
        check_fields(path, prompt, line)
        if (path[0] == '"' and text_files.in_csv_quotes(path)) or ('""' in prompt and text_files.in_csv_quotes(prompt)):
            raise BadSample("CSV quotes", f"{line[:60]!r} has the quotes of CSV files; {CONVERT}")

        if len(rest) == 1:
            return Line(path, prompt, None)
        width, height = rest[1].strip(), rest[2].strip()
        if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
            raise BadSample("bad size", f"width and height must be positive integers (pixels) in {line[:60]!r}")
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


@dataclass(frozen=True)
class Csv:
    """Comma-separated values in UTF-8 with a header; fields in quotes may contain commas, quotes and line breaks."""

    start: int
    header: tuple[str, ...]
    image: str  # columns
    caption: str

    @classmethod
    def of_file(cls, path: Path) -> Csv:
        with path.open("rb") as file:
            bom = skip_bom(file)
            header = next_csv_record(file)
        try:
            names = tuple(name.strip() for name in next(csv.reader([decode(header)], strict=True), []))
        except (csv.Error, BadSample) as error:
            message = f"{path}, line 1: the header is not valid CSV ({error}); correct it, or {CONVERT}"
            raise UserError(message) from error
        return cls(bom + len(header), names, *choose_columns(path, names, remedy=f"{CONVERT} and pass "))

    def next_record(self, lines: Iterator[bytes]) -> bytes:
        return next_csv_record(lines)

    def is_blank(self, record: bytes) -> bool:
        return not record.strip(b', \t\r\n"')  # also rows of empty fields, which spreadsheets write

    def parse(self, record: bytes, previous: bytes = b"") -> Line:
        """The fields of a row.

        Raises:
            BadSample: kind `invalid UTF-8`, `invalid CSV`, `too many columns`, `empty path`, `empty caption` or
                `control character`.
        """
        text = decode(record)
        try:
            row = next(csv.reader([text], strict=True))
        except csv.Error as error:
            raise BadSample("invalid CSV", f"{error}; correct the quotes, or {CONVERT}") from error

        check_width(row, len(self.header))
        values = dict(zip(self.header, row, strict=False))  # empty fields at the end of a row may be missing
        path, prompt = values.get(self.image, "").strip(), caption_of(values.get(self.caption))
        check_fields(path, prompt, text.strip())
        return Line(path, prompt, None)


def next_csv_record(lines: Iterator[bytes]) -> bytes:
    """Take the lines of one CSV record: more than one, if a quoted field has line breaks."""
    taken = []

    def decoded() -> Iterator[str]:
        for line in lines:
            taken.append(line)
            yield line.decode("latin-1")  # delimiters, quotes and line ends are ASCII, as in UTF-8

    with suppress(csv.Error):  # reported when the record is parsed
        next(csv.reader(decoded(), strict=True), None)
    return b"".join(taken)


@dataclass(frozen=True)
class JsonLines(RecordPerLine):
    """One JSON object per line, as the metadata.jsonl of Hugging Face's imagefolder."""

    start: int
    image: str  # keys
    caption: str

    @classmethod
    def of_file(cls, path: Path) -> JsonLines:
        with path.open("rb") as file:
            start = skip_bom(file)
            first = next((line for line in file if line.strip()), None)
        if first is None:
            raise empty(path)
        try:
            record = read_object(decode(first))
        except BadSample as problem:
            raise BadSample(problem.kind, f"{path}, line 1: {problem}") from problem
        return cls(start, *choose_columns(path, list(record), remedy=f"{CONVERT} and pass "))

    def parse(self, record: bytes, previous: bytes = b"") -> Line:
        """The fields of an object.

        Raises:
            BadSample: kind `invalid UTF-8`, `invalid JSON`, `not a text`, `empty path`, `empty caption` or
                `control character`.
        """
        text = decode(record)
        record = read_object(text)
        path, prompt = record.get(self.image), caption_of(record.get(self.caption))
        if path is not None and not isinstance(path, str):
            raise BadSample("not a text", f"the image is not a path but {type(path).__name__} {str(path)[:60]!r}")
        path = (path or "").strip()
        check_fields(path, prompt, text.strip())
        return Line(path, prompt, None)
