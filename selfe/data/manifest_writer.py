"""Write manifests: TSV, or JSON lines where the file is named so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from selfe.data import captions
from selfe.data.manifest_formats import CONVERTED, JSON_LINES, OTHERS, SIZE, TABLES, Line, Tsv, caption_columns
from selfe.errors import BadSample, UserError


def check_name(path: Path, option: str) -> None:
    """Raise UserError if a TSV manifest with this name would be read as another format."""
    if path.suffix.lower() in (".csv", ".tar", *CONVERTED, *TABLES, *OTHERS):
        name = path.with_suffix(".tsv")
        raise UserError(f"{option} {path}: a TSV file is written, and would be read as {path.suffix}; use {name}")


def write(out: Path, lines: Iterable[Line]) -> int:
    """Write a manifest under a temporary name and rename it, unless it is empty. Returns the number of lines.

    TSV gets a header if an image has several captions. Either all lines have a size or none has.

    Raises:
        UserError: an image has caption weights, and `out` is TSV.
    """
    in_json = out.suffix.lower() in JSON_LINES
    partial = out.with_name(out.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    written, header = 0, ()

    try:
        with partial.open("wb") as file:
            for line in lines:
                if not in_json and line.captions.weights:
                    name = out.with_suffix(JSON_LINES[0])
                    raise UserError(f"{out}: TSV has no column for the caption weights of {line.path}; use {name}")
                file.write(json_line(line) if in_json else tsv_line(line))
                header = max(header, tsv_header(line), key=len)
                written += 1

        if header and not in_json:
            prepend("\t".join(header).encode() + b"\n", partial)
        if written:
            partial.rename(out)
    finally:
        partial.unlink(missing_ok=True)
    return written


def json_line(line: Line) -> bytes:
    return json.dumps({"path": line.path, **captions.to_record(line.captions)}, ensure_ascii=False).encode() + b"\n"


def tsv_line(line: Line) -> bytes:
    """The fields of a line in the order of `tsv_header`, which begins as lines without a header do."""
    first, *others = line.captions.texts
    size = (str(line.size[1]), str(line.size[0])) if line.size else ()
    return "\t".join((line.path, first, *size, *others)).encode() + b"\n"


def tsv_header(line: Line) -> tuple[str, ...]:
    """The columns of a line with several captions; none for a line that needs no header."""
    first, *others = caption_columns(len(line.captions.texts))
    return ("path", first, *(SIZE if line.size else ()), *others) if others else ()


def check(line: Line) -> None:
    """Raise BadSample if a line without a size would not be read back from TSV as it is."""
    read = Tsv(0, tsv_header(line)).parse(tsv_line(line))
    if (read.path, read.captions.texts) != (line.path, line.captions.texts):
        raise BadSample("space in path", "the path begins or ends with a space, which a manifest ignores; rename it")


def prepend(start: bytes, path: Path) -> None:
    """Put bytes in front of a file, which is replaced."""
    longer = path.with_name(path.name + ".header")
    try:
        with path.open("rb") as rest, longer.open("wb") as file:
            file.write(start)
            shutil.copyfileobj(rest, file, 1 << 20)
        longer.rename(path)
    finally:
        longer.unlink(missing_ok=True)
