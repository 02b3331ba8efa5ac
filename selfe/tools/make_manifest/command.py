"""The verb `selfe make-manifest`: convert captioned images of other tools to a manifest, or to tar shards.

    sources.py  what is read: folders, tables, parquet, saved Hugging Face data sets

The samples keep the order of their source. What cannot be used is left out, counted and named.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import chain, count, islice
from pathlib import Path

from selfe import log
from selfe.data import manifest_writer
from selfe.data.manifest_formats import Line, check_fields
from selfe.errors import BadSample, UserError
from selfe.io import image_decode
from selfe.io.text_files import CONTROL
from selfe.tools import make_shards
from selfe.tools.make_manifest import sources
from selfe.tools.make_manifest.sources import Notes, Row

NAMED = 5  # examples of each kind of problem in the summary
PREFIX = "train"  # of tar files


class Summary:
    """Counts what is left out by kind, with the first messages of each, and captions that become one line."""

    def __init__(self):
        self.joined = 0
        self.counts: dict[str, int] = defaultdict(int)
        self.first: dict[str, list[str]] = defaultdict(list)

    def add(self, problem: BadSample) -> None:
        self.counts[problem.kind] += 1
        if len(self.first[problem.kind]) < NAMED:
            self.first[problem.kind].append(str(problem))

    def show(self) -> None:
        if self.joined:
            show(f"line breaks and tabs became spaces in {self.joined} captions")
        for kind, total in sorted(self.counts.items(), key=lambda item: -item[1]):
            show(f"{total:8d} left out: {kind}")
            for message in self.first[kind]:
                show(f"           {message}")
            if total > NAMED:
                show(f"           and {total - NAMED} more")


def show(line: str) -> None:
    """Print a line; control characters, and bytes of file names that are not UTF-8, with escapes."""
    log.print_line(CONTROL.sub(lambda match: repr(match[0])[1:-1], line))


def read_all(options: argparse.Namespace, notes: Notes) -> Iterator[Row | BadSample]:
    fields = ("image", "caption", "no_header", "delimiter", "encoding", "split")
    of_tables = sources.Options(**{name: getattr(options, name) for name in fields})
    for source in options.sources:
        yield from sources.read(source, of_tables, notes)


def usable(rows: Iterator[Row | BadSample], convert: Callable[[Row], object], summary: Summary) -> Iterator:
    """The converted rows, without those that cannot be."""
    for row in rows:
        try:
            if isinstance(row, BadSample):
                raise row
            converted = convert(row)
        except BadSample as problem:
            summary.add(problem)
            continue
        summary.joined += row.has_line_breaks
        yield converted


# ---- a manifest ----


def to_line(row: Row) -> Line:
    """The line of a manifest. Raises BadSample if it would not be read back as it is."""
    if isinstance(row.image, bytes):
        raise UserError(f"{row.where}: stores the image itself, not a path; write tar shards with --shards DIR")
    line = Line(row.image, row.captions, None)
    try:
        check_fields(line.path, "".join(line.captions.texts), "".join(line.captions.texts) or line.path)
        manifest_writer.check(line)
    except BadSample as problem:
        raise BadSample(problem.kind, f"{row.where}: {problem}") from problem
    return line


# ---- tar shards ----


def to_sample(row: Row, base_dir: Path) -> make_shards.Sample:
    """The members of a shard, not numbered yet. Raises BadSample if the caption or the image header is invalid."""
    try:
        check_fields("image", "".join(row.captions.texts), row.where)
    except BadSample as problem:
        raise BadSample(problem.kind, f"{row.where}: {problem}") from problem

    image, name = row.image, row.where
    if isinstance(image, str):
        path = base_dir / image
        name = f"{row.where}: {path}"
        with image_decode.naming(name), image_decode.opened(path) as file:
            image = file.read()
    image_decode.size(BytesIO(image), name)
    return make_shards.Sample(0, row.suffix, image, row.captions)


def write_shards(out: Path, rows: Iterator[Row | BadSample], summary: Summary, base_dir: Path, size: int) -> int:
    """Write tar shards to a temporary folder and rename it, unless there are none. Returns the number of samples."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists; choose a new folder for --shards, or remove this one")
    out.parent.mkdir(parents=True, exist_ok=True)

    numbers = count()
    samples = usable(rows, lambda row: to_sample(row, base_dir), summary)
    samples = (sample._replace(number=next(numbers)) for sample in samples)

    with tempfile.TemporaryDirectory(prefix=f"{out.name}.partial-", dir=out.parent) as temporary:
        folder = Path(temporary) / "shards"  # has the permissions of other folders, which `temporary` has not
        folder.mkdir()

        # the first sample of each tar file is taken here, so that none is empty
        for tar, first in enumerate(samples):
            make_shards.write(folder / f"{PREFIX}-{tar:06d}.tar", chain([first], islice(samples, size - 1)))
        if written := next(numbers):
            folder.rename(out)
    return written


# ---- entry point ----


def main(options: argparse.Namespace) -> None:
    """Entry point of `selfe make-manifest`; exits with code 1 if something was left out, or nothing is left."""
    folders = [source for source in options.sources if source.is_dir()]
    if folders and len(options.sources) > 1:
        raise UserError(f"{folders[0]}: give a folder alone, because paths are relative to it; or only files")
    out = options.out or options.shards
    if out.resolve() in [source.resolve() for source in options.sources]:
        raise UserError(f"{out}: is what is read; choose another --out or --shards")

    if options.out:
        manifest_writer.check_name(options.out, "--out")

    notes, summary = Notes(), Summary()
    rows = read_all(options, notes)
    base_dir = options.base_dir or (folders[0] if folders else Path())
    if options.shards:
        written = write_shards(out, rows, summary, base_dir, options.samples)
    else:
        written = manifest_writer.write(out, usable(rows, to_line, summary))

    # how the source was read, what was left out, and how to go on
    for line in notes.lines:
        show(line)
    if notes.others:
        show("not used: " + ", ".join(f"{number} x {kind}" for kind, number in sorted(notes.others.items())))
    summary.show()

    if not written:
        show(f"nothing to write: {out} is not created")
    elif options.shards:
        make_shards.open_result(out, PREFIX)
    else:
        show(f"{out}: {written} lines")
        known = base_dir if folders or options.base_dir else "DIR (the folder that its paths start from)"
        show(f"check them with selfe check-data {out} --base-dir {known}; the same base_dir is needed in training")
    if summary.counts or not written:
        sys.exit(1)
