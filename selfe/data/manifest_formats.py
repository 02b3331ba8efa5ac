"""The text formats of manifests: TSV, CSV and JSON lines. A record is the bytes of one sample, with its line end."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from selfe.data import captions
from selfe.data.captions import Captions
from selfe.errors import BadSample, UserError
from selfe.io import text_files
from selfe.io.storage import RemotePath

# names of columns and keys, in order of preference
IMAGE = ("path", "file_name", "filename", "filepath", "file", "image", "image_path", "img")
CAPTION = ("caption", "text", "prompt", "description", captions.LIST)
SIZE = ("width", "height")  # columns of TSV
LONGEST_HEADER = 4096  # bytes

JSON_LINES = (".jsonl", ".ndjson")
CONVERT = "convert the file with selfe make-manifest"
CONVERTED = (".gz",)  # by `selfe make-manifest`
TABLES = (".parquet", ".arrow")  # read by `selfe.data.tables`
OTHERS = (".feather", ".json", ".zip", ".xlsx", ".xls", ".ods")
ENCLOSED = f"captions are enclosed in quotes, which stay part of them; if these are the quotes of CSV, {CONVERT}"


class Line(NamedTuple):
    """The fields of a record."""

    path: str
    captions: Captions
    size: tuple[int, int] | None  # height, width in pixels

    @property
    def prompt(self) -> str:
        """The first caption."""
        return self.captions.first


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


def detect(path: Path | RemotePath, image: str | None = None, caption: str | None = None) -> Format:
    """The format of a manifest, by its suffix: .csv, .jsonl or .ndjson; TSV for all others.

    Args:
        image: column or key of the images; default: the first of the usual names. TSV has its own.
        caption: the same for the captions.

    Raises:
        UserError: there is no such file, it is empty or not UTF-8 text, it needs to be converted, or the names of its
            columns are unknown.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder, not a manifest; write one with selfe make-manifest {path} --out OUT.tsv")
    if not path.is_file():
        raise UserError(f"{path}: no such manifest; set data.params.train_manifest (or val_manifest) to a TSV file")
    suffix = path.suffix.lower()
    if suffix in TABLES:
        raise UserError(f"{path}: is not a text file; it is read by data.module=selfe.data.tables.TableData")
    if suffix == ".tar":
        raise UserError(f"{path}: is a tar file; tar shards are read by data.module=selfe.data.shards.ShardData")
    if suffix in CONVERTED:
        raise UserError(f"{path}: is not read directly; convert it with selfe make-manifest {path} --out OUT.tsv")
    if suffix in OTHERS:
        raise UserError(f"{path}: a manifest is .tsv, .csv or .jsonl; save this file as one of them")
    if not path.stat().st_size:
        raise empty(path)

    text_files.check_encoding(path)
    if suffix == ".csv":
        return Csv.of_file(path, image, caption)
    if suffix in JSON_LINES:
        return JsonLines.of_file(path, image, caption)
    return Tsv.of_file(path)


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


class Columns(NamedTuple):
    """The columns or keys that are read."""

    image: str
    caption: str | None  # a text or a list of texts
    texts: str | None = None  # a list of captions, alone or beside `caption`
    weights: str | None = None  # of the captions
    more: tuple[str, ...] = ()  # further texts: caption_2 ...

    @property
    def names(self) -> list[str]:
        return [name for name in (self.image, *self.of_captions, self.weights) if name]

    @property
    def of_captions(self) -> list[str]:
        return [name for name in (self.caption, *self.more, self.texts) if name]

    def captions(
        self, record: Mapping[str, Any], lists_are_text: bool = False, clean: Callable[[Any], str] = captions.one_line
    ) -> Captions:
        """The captions of a record. Raises BadSample, as `captions.read`."""
        texts, weights = (record.get(name) if name else None for name in (self.texts, self.weights))
        if lists_are_text:
            texts, weights = captions.from_json(texts), captions.from_json(weights)
        caption = record.get(self.caption) if self.caption else None
        if self.more:
            caption = [caption, *(record.get(name) for name in self.more)]
        return captions.read(caption, texts, weights, clean)

    def describe_captions(self) -> str:
        """The columns of captions, for a line of output."""
        return " and ".join(map(repr, self.of_captions))


def choose_columns(
    path: object,
    names: Sequence[str],
    image: str | None = None,
    caption: str | None = None,
    remedies: tuple[str, str] = ("set data.params.image_column to", "set data.params.caption_column to"),
) -> Columns:
    """The columns of images and captions: those given, or the first of the usual names that is there.

    Raises:
        UserError: there is none; one of `remedies` begins the advice on how to name it.
    """
    chosen = []
    for remedy, given, usual in zip(remedies, (image, caption), (IMAGE, CAPTION), strict=True):
        column = next((name for name in ([given] if given else usual) if name in names), None)
        if column is None:
            known = ", ".join(map(repr, names))
            raise UserError(f"{path}: no column {given or ' or '.join(usual)}; {remedy} one of {known}")
        chosen.append(column)

    # with --caption, only that column counts
    image, chosen_caption = chosen
    if caption not in (None, captions.LIST):
        return Columns(image, caption)
    numbered = caption_columns(len(names))
    if chosen_caption == numbered[0] and captions.LIST not in names:
        return Columns(image, chosen_caption, more=tuple(name for name in numbered[1:] if name in names))
    texts, weights = (name if name in names else None for name in (captions.LIST, captions.WEIGHTS))
    return Columns(image, None if chosen_caption == captions.LIST else chosen_caption, texts, weights)


def choose_keys(
    path: object, names: Sequence[str], image: str | None = None, caption: str | None = None, **rest
) -> Columns:
    """As `choose_columns`, of the first object of a file; later ones may have lists where it does not."""
    columns = choose_columns(path, names, image, caption, **rest)
    return columns if caption or columns.more else columns._replace(texts=captions.LIST, weights=captions.WEIGHTS)


def check_fields(path: str, text: str, record: str) -> None:
    """Raise BadSample for an empty path, an empty text of all prompts, or control characters."""
    if not path or not text:
        kind = "empty caption" if path else "empty path"
        raise BadSample(kind, f"path or prompt is empty in {record[:60]!r}; give both")
    if not (path + text).isprintable() and (control := text_files.CONTROL.search(path + text)):
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
    """One line per image: path, tab, prompt, optionally followed by tab, width, tab, height. No quotes.

    A first line with the names of columns, `path`, `caption`, `caption_2` ..., `width`, `height`, sets other columns.
    """

    start: int
    header: tuple[str, ...] = ()

    @classmethod
    def of_file(cls, path: Path) -> Tsv:
        with path.open("rb") as file:
            start = skip_bom(file)
            line = file.readline(LONGEST_HEADER)
        names = tuple(name.strip().decode("latin-1") for name in line.rstrip(b"\r\n").split(b"\t"))
        if names[0] != "path" or "caption" not in names:
            return cls(start)

        others = [name for name in names if name not in ("path", *SIZE)]
        expected = caption_columns(len(others))
        if others != expected or len(set(names)) != len(names) or (SIZE[0] in names) != (SIZE[1] in names):
            raise UserError(
                f"{path}, line 1: the columns of a header are path, {', '.join(expected)} in this order, and width "
                f"with height, each once; got {', '.join(map(repr, names))}"
            )
        return cls(start + len(line), names)

    def parse(self, record: bytes, previous: bytes = b"") -> Line:
        """The fields of a line.

        Raises:
            BadSample: kind `invalid UTF-8`, `carriage return`, `no tab`, `too many tabs`, `empty path`,
                `empty caption`, `control character`, `CSV quotes` or `bad size`.
        """
        line = decode(record).rstrip("\r\n")
        fields = line.split("\t")
        if "\r" in line or not (2 <= len(fields) <= len(self.header) if self.header else len(fields) in (2, 4)):
            raise wrong_columns(line, previous, self.header)

        if not self.header:
            path, prompt, size = fields[0].strip(), fields[1].strip(), fields[2:]
            check_fields(path, prompt, line)
            of_image, quoted = Captions((prompt,)), has_doubled_quotes(prompt)
        else:
            values = dict(zip(self.header, map(str.strip, fields), strict=False))
            path = values.pop("path", "")
            size = [values.pop(name, "") for name in SIZE if name in self.header]
            check_fields(path, "".join(values.values()), line)
            of_image, quoted = captions.without_weights(values.values()), any(map(has_doubled_quotes, values.values()))

        if quoted or (path[0] == '"' and text_files.in_csv_quotes(path)):
            raise BadSample("CSV quotes", f"{line[:60]!r} has the quotes of CSV files; {CONVERT}")
        if not size:
            return Line(path, of_image, None)

        width, height = size[0].strip(), size[1].strip()
        if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
            raise BadSample("bad size", f"width and height must be positive integers (pixels) in {line[:60]!r}")
        return Line(path, of_image, (int(height), int(width)))


def caption_columns(count: int) -> list[str]:
    """The names of the columns of this many captions in TSV: caption, caption_2 ..."""
    return ["caption", *(f"caption_{number}" for number in range(2, count + 1))]


def has_doubled_quotes(prompt: str) -> bool:
    return '""' in prompt and text_files.in_csv_quotes(prompt)


def wrong_columns(line: str, previous: bytes, header: Sequence[str]) -> BadSample:
    """The error for a line with a wrong number of columns, with the cause if it can be seen."""
    if "\r" in line:
        return BadSample("carriage return", f"a carriage return alone (U+000D) does not end a line; {CONVERT}")

    num_tabs = line.count("\t")
    expected = f"1 to {len(header) - 1} tabs as in the header" if header else "path, one tab, prompt"
    message = f"expected {expected}; found {num_tabs} tabs in {line[:60]!r}"
    opened = previous.rpartition(b"\t")[2].strip()
    if opened.startswith(b'"') and opened.count(b'"') % 2:
        message += f"; the caption that begins in the line before has a line break in CSV quotes: {CONVERT}"
    return BadSample("too many tabs" if num_tabs else "no tab", message)


@dataclass(frozen=True)
class Csv:
    """Comma-separated values in UTF-8 with a header; fields in quotes may contain commas, quotes and line breaks."""

    start: int
    header: tuple[str, ...]
    columns: Columns

    @classmethod
    def of_file(cls, path: Path, image: str | None = None, caption: str | None = None) -> Csv:
        with path.open("rb") as file:
            bom = skip_bom(file)
            header = next_csv_record(file)
        try:
            names = tuple(name.strip() for name in next(csv.reader([decode(header)], strict=True), []))
        except (csv.Error, BadSample) as error:
            message = f"{path}, line 1: the header is not valid CSV ({error}); correct it, or {CONVERT}"
            raise UserError(message) from error
        return cls(bom + len(header), names, choose_columns(path, names, image, caption))

    def next_record(self, lines: Iterator[bytes]) -> bytes:
        return next_csv_record(lines)

    def is_blank(self, record: bytes) -> bool:
        return not record.strip(b', \t\r\n"')  # also rows of empty fields, which spreadsheets write

    def parse(self, record: bytes, previous: bytes = b"") -> Line:
        """The fields of a row.

        Raises:
            BadSample: kind `invalid UTF-8`, `invalid CSV`, `too many columns`, `not a text`, `caption weights`,
                `empty path`, `empty caption` or `control character`.
        """
        text = decode(record)
        try:
            row = next(csv.reader([text], strict=True))
        except csv.Error as error:
            raise BadSample("invalid CSV", f"{error}; correct the quotes, or {CONVERT}") from error

        check_width(row, len(self.header))
        values = dict(zip(self.header, row, strict=False))  # empty fields at the end of a row may be missing
        path, of_image = values.get(self.columns.image, "").strip(), self.columns.captions(values, lists_are_text=True)
        check_fields(path, "".join(of_image.texts), text.strip())
        return Line(path, of_image, None)


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
    columns: Columns  # keys

    @classmethod
    def of_file(cls, path: Path, image: str | None = None, caption: str | None = None) -> JsonLines:
        with path.open("rb") as file:
            start = skip_bom(file)
            first = next((line for line in file if line.strip()), None)
        if first is None:
            raise empty(path)
        try:
            record = read_object(decode(first))
        except BadSample as problem:
            raise BadSample(problem.kind, f"{path}, line 1: {problem}") from problem
        return cls(start, choose_keys(path, list(record), image, caption))

    def parse(self, record: bytes, previous: bytes = b"") -> Line:
        """The fields of an object.

        Raises:
            BadSample: kind `invalid UTF-8`, `invalid JSON`, `not a text`, `caption weights`, `empty path`,
                `empty caption` or `control character`.
        """
        text = decode(record)
        record = read_object(text)
        path, of_image = record.get(self.columns.image), self.columns.captions(record)
        if path is not None and not isinstance(path, str):
            raise BadSample("not a text", f"the image is not a path but {type(path).__name__} {str(path)[:60]!r}")
        path = (path or "").strip()
        check_fields(path, "".join(of_image.texts), text.strip())
        return Line(path, of_image, None)
