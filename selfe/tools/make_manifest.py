"""The verb `selfe make-manifest`: convert a table of images and captions (CSV, TSV, JSON lines) to a manifest.

Reads what pandas, spreadsheets and Hugging Face datasets write: quoted fields, line breaks inside quotes, any line
ends, UTF-8 or UTF-16, gzip.
"""

from __future__ import annotations

import argparse
import codecs
import csv
import gzip
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from selfe import log
from selfe.data.manifest import parse
from selfe.types import BadSample, UserError

DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".txt": "\t"}
JSON_LINES = (".jsonl", ".ndjson")
GZIP = b"\x1f\x8b"
# names of columns, in order of preference
IMAGE = ("path", "file_name", "filename", "filepath", "file", "image", "image_path", "img")
CAPTION = ("caption", "text", "prompt", "description")
SPACES = re.compile("[\t\n\x0b\x0c\r\x85\u2028\u2029]+")  # cannot be in a manifest's caption; become one space


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


def rows(file: TextIO, options: argparse.Namespace) -> Iterator[tuple[int, str, str]]:
    """(row number, image path, caption) of every row. Rows count from 1, with the header.

    Raises:
        UserError: the columns cannot be found.
        csv.Error, ValueError: a row is not valid CSV or JSON.
    """
    suffixes = [suffix.lower() for suffix in options.table.suffixes if suffix.lower() != ".gz"]
    suffix = suffixes[-1] if suffixes else ""

    if suffix in JSON_LINES:
        columns = None
        for number, line in enumerate(file, start=1):
            if line.strip():
                record = json.loads(line)
                columns = columns or find_columns(list(record), options)
                yield number, *(str(record.get(column) or "") for column in columns)
        return

    delimiter = options.delimiter or DELIMITERS.get(suffix)
    if delimiter is None:
        known = ", ".join((*DELIMITERS, *JSON_LINES))
        raise UserError(f"{options.table}: unknown suffix; rename the file ({known}) or pass --delimiter")

    # strict: a quote that does not enclose a complete field is an error, rather than dropped
    table = csv.reader(file, delimiter=delimiter, strict=True)
    places = (0, 1)
    if not options.no_header:
        header = next(table, [])
        places = tuple(header.index(column) for column in find_columns(header, options))

    for number, row in enumerate(table, start=1 if options.no_header else 2):
        if any(field.strip() for field in row):
            yield number, *(row[place] if place < len(row) else "" for place in places)


def find_columns(names: Sequence[str], options: argparse.Namespace) -> tuple[str, str]:
    """The names of the columns of images and captions."""
    chosen = []
    for option, given, usual in (("--image", options.image, IMAGE), ("--caption", options.caption, CAPTION)):
        column = next((name for name in ([given] if given else usual) if name in names), None)
        if column is None:
            raise UserError(
                f"{options.table}: no column {given or ' or '.join(usual)}; pass {option} with one of "
                f"{', '.join(map(repr, names))}, or --no-header if these are no names"
            )
        chosen.append(column)
    return tuple(chosen)


def main(options: argparse.Namespace) -> None:
    """Entry point of `selfe make-manifest`; exits with code 1 if rows had to be left out, or none is left."""
    if not options.table.is_file():
        raise UserError(f"{options.table}: no such file; the first argument is a CSV, TSV or JSON-lines file")
    if options.out.resolve() == options.table.resolve():
        raise UserError(f"{options.out}: is the table itself; choose another --out")

    # the manifest is written under a temporary name and renamed
    partial = options.out.with_name(options.out.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    number, written, joined, problems = 0, 0, 0, Counter()
    try:
        with open_text(options.table, options.encoding) as table, partial.open("wb") as out:
            for number, image, caption in rows(table, options):
                line = f"{image}\t{SPACES.sub(' ', caption.strip())}\n".encode()
                try:
                    parse(line)
                except BadSample as problem:
                    problems[problem.kind] += 1
                    log.print_line(f"{problem.kind}: row {number}: {problem}")
                    continue
                out.write(line)
                written += 1
                joined += bool(SPACES.search(caption.strip()))
        partial.rename(options.out)
    except LookupError as error:
        raise UserError(f"--encoding {options.encoding}: {error}") from error
    except UnicodeError as error:
        raise UserError(f"{options.table}: after row {number}: {error}; pass --encoding, such as latin-1") from error
    except (csv.Error, ValueError, EOFError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{options.table}: after row {number}: {error}; correct the file") from error
    finally:
        partial.unlink(missing_ok=True)

    log.print_line(f"{options.out}: {written} lines; line breaks and tabs became spaces in {joined} captions")
    for kind, count in problems.most_common():
        log.print_line(f"{count:8d} rows left out: {kind}")
    if problems or not written:
        sys.exit(1)
