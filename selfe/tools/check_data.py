"""The verb `selfe check-data`: validate every caption and image of a manifest, of tar shards or of tables, in one pass.

Tables, and tar files in stores, are read through the index that training uses.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from io import BytesIO
from itertools import islice, pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np

from selfe import log
from selfe.data import manifest_writer
from selfe.data.buckets import Buckets
from selfe.data.captions import CaptionPhase, Captions
from selfe.data.containers import Container
from selfe.data.dataset import BYTES_PER_TOKEN, Reading
from selfe.data.manifest_formats import ENCLOSED, TABLES, Format, Line, Tsv, detect, records
from selfe.data.shards import Sample, describe_unused, matching_files, open_remote, read_captions, read_samples
from selfe.data.tables import is_saved, open_table
from selfe.errors import BadSample, UserError
from selfe.io import image_decode, storage
from selfe.io.disk_cache import DiskCache
from selfe.io.storage import RemotePath, as_path
from selfe.io.text_files import in_csv_quotes

BATCH = 64  # lines or samples per task of a worker
TSV = Tsv(0)
FLAT = 16  # levels of 255; 12-bit samples read as 16-bit ones cover no more


@dataclass(frozen=True)
class Limits:
    """How lines are read, where images are, and which sizes are accepted."""

    base_dir: Path | RemotePath
    min_side: int
    max_pixels: int
    format: Format = TSV  # of a manifest
    source: Container | None = None  # of samples that are read through an index


@dataclass(frozen=True)
class Finding:
    """Content of a line or sample, as far as it can be read, and its problem (`kind` is empty if there is none)."""

    where: str  # line N, or sample N
    path: str = ""
    captions: Captions | None = None
    size: tuple[int, int] | None = None  # height, width
    content: bytes = b""  # digest of the image file
    profile: str = ""  # ICC profile of the image
    contrast: int = 255  # difference between the lightest and the darkest pixel
    kind: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Stored:
    """A sample that is read through an index."""

    index: int
    num_bytes: int

    def __len__(self) -> int:
        return self.num_bytes


Item = tuple[int, bytes | Sample | Stored]  # a record of a manifest or a sample, with its number from 1


def examine(item: Item, limits: Limits) -> Finding:
    """Check a caption and decode its image."""
    number, content = item
    try:
        if isinstance(content, Sample):
            return examine_sample(f"sample {number}", content, limits)
        if isinstance(content, Stored):
            return examine_stored(f"sample {number}", content.index, limits)
        return examine_line(f"line {number}", content, limits)
    except BadSample as problem:
        where = f"{'line' if isinstance(content, bytes) else 'sample'} {number}"
        message = str(problem) if str(problem).startswith(where) else f"{where}: {problem}"
        return Finding(where, kind=problem.kind, problem=message)


def examine_line(where: str, line: bytes, limits: Limits) -> Finding:
    """Raises BadSample for a line that cannot be parsed or an image that cannot be read."""
    path, captions, size = limits.format.parse(line)
    full = storage.join(limits.base_dir, path)
    file = read_image(full, f"{where}: {full}")

    finding = examine_image(Finding(where, path, captions), str(full), file, limits)
    if size and size != finding.size and not finding.kind:
        wrong = f"is {finding.size[1]} x {finding.size[0]}, but the manifest has {size[1]} x {size[0]}"
        return replace(finding, kind="wrong size", problem=f"{where}: {full}: {wrong}")
    return finding


def examine_sample(where: str, sample: Sample, limits: Limits) -> Finding:
    """Raises BadSample for an incomplete sample, a caption or an image that cannot be read."""
    if problem := sample.problem():
        raise problem
    ((member, place),) = sample.images.items()
    suffix, caption_place = sample.caption()

    name = f"{sample.tar}, {member}"
    captions = read_captions(sample.content(caption_place), suffix, name)
    return examine_image(Finding(where, name, captions), name, sample.content(place), limits)


def examine_stored(where: str, index: int, limits: Limits) -> Finding:
    """Raises BadSample for a sample that the index says is bad, or an image that cannot be read."""
    source, name = limits.source, limits.source.name(index)
    captions, content = source.captions(index), source.content(index)
    return examine_image(Finding(where, name, captions), name, read_image(content, f"{where}: {name}"), limits)


def read_image(file: Path | RemotePath | BinaryIO, name: str) -> bytes:
    """The content of an image file. Raises BadSample if it is missing."""
    if isinstance(file, RemotePath):
        try:
            return file.read_bytes()
        except FileNotFoundError as error:
            raise BadSample("missing", f"{name}: no such image; correct the line or --base-dir") from error
    with image_decode.naming(name), image_decode.opened(file) as stream:
        return stream.read()


def examine_image(finding: Finding, name: str, file: bytes, limits: Limits) -> Finding:
    """Decode an image in full and add what it shows. Raises BadSample if it cannot be decoded."""
    name = f"{finding.where}: {name}"
    height, width = image_decode.size(BytesIO(file), name, limits.max_pixels)
    image, profile = image_decode.decode(BytesIO(file), name, limits.max_pixels)
    darkest, lightest = image.convert("L").getextrema()

    finding = replace(
        finding,
        size=(height, width),
        content=hashlib.blake2b(file, digest_size=16).digest(),
        profile=profile,
        contrast=lightest - darkest,
    )
    if min(image.size) < limits.min_side:
        problem = f"{name}: {width} x {height} pixels; the minimum side is {limits.min_side}"
        return replace(finding, kind="too small", problem=problem)
    return finding


def examine_batch(items: list[Item], limits: Limits) -> list[Finding]:
    return [examine(item, limits) for item in items]


def findings(batches: Iterable[list[Item]], total: int, limits: Limits, workers: int) -> Iterator[Finding]:
    """A finding for every sample, in order; computed by `workers` processes, or in this process if 0.

    `total`: bytes of all files.
    """
    progress = log.Progress("bytes", total)

    def counted(results: Iterable[tuple[list[Item], list[Finding]]]) -> Iterator[Finding]:
        for items, of_batch in results:
            progress.advance(sum(len(content) for _, content in items))
            yield from of_batch

    if workers:
        with ProcessPoolExecutor(workers) as pool:
            try:
                yield from counted(in_order(pool, iter(batches), limits, ahead=4 * workers))
            except BrokenProcessPool as error:
                message = "a worker process was killed, often for lack of memory; lower --workers"
                raise UserError(message) from error
    else:
        yield from counted((items, examine_batch(items, limits)) for items in batches)
    progress.close()


def read_records(manifest: Path | RemotePath, format: Format) -> Iterator[Item]:
    with manifest.open("rb") as file:
        for _, number, record in records(file, format):
            yield number, record


def batched(items: Iterable[Item]) -> Iterator[list[Item]]:
    items = iter(items)
    while batch := list(islice(items, BATCH)):
        yield batch


def in_order(pool: ProcessPoolExecutor, batches: Iterator, limits: Limits, ahead: int) -> Iterator[tuple]:
    """Results in the order of the batches, at most `ahead` of which are in flight."""
    waiting = []
    for batch in batches:
        waiting.append((batch, pool.submit(examine_batch, batch, limits)))
        if len(waiting) > ahead:
            lines, future = waiting.pop(0)
            yield lines, future.result()
    for lines, future in waiting:
        yield lines, future.result()


class Report:
    """Counts problems and statistics of valid lines; prints problems as they are found."""

    def __init__(self, tokenizer: str | None, items: str, in_tsv: bool, weights: Sequence[float]):
        self.items = items  # lines or samples
        self.in_tsv = in_tsv  # quotes of CSV, if there are any, are part of the captions
        self.problems, self.good, self.enclosed = Counter(), 0, 0  # enclosed: captions in quotes
        self.sizes, self.tokens, self.captions_of = Counter(), Counter(), {}
        self.profiles, self.flat = Counter(), 0
        self.num_captions = Counter()  # of images, by number of captions
        self.weights, self.positions = weights, []  # a `Position` for each caption of the longest list
        self.count = self.exact(tokenizer) if tokenizer else lambda prompt: len(prompt.encode()) // BYTES_PER_TOKEN + 1
        self.unit = "tokens" if tokenizer else f"tokens, estimated as bytes / {BYTES_PER_TOKEN}"

    @staticmethod
    def exact(folder: str):
        """A function that counts the tokens of a caption with a tokenizer."""
        from transformers import AutoTokenizer  # slow to import, and only needed here

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"--tokenizer {folder}: {str(error).splitlines()[0]}") from error
        return lambda prompt: len(tokenizer(prompt)["input_ids"])

    def add(self, finding: Finding) -> bool:
        """Count a finding; returns whether the line is valid."""
        kind, problem = finding.kind, finding.problem
        if not kind and (first := self.seen(finding)):
            kind = "duplicate"
            problem = f"{finding.where}: {finding.path}: same image and caption as {first}"
        if kind:
            self.problems[kind] += 1
            log.print_line(f"{kind}: {problem}")
            return False

        self.good += 1
        self.enclosed += in_csv_quotes(finding.captions.first)
        self.profiles[finding.profile] += 1
        if finding.contrast <= FLAT:
            self.flat += 1
            extent = f"all pixels are within {finding.contrast} of 255 levels"
            log.print_line(f"no contrast: {finding.where}: {finding.path}: {extent}; it counts as valid")

        self.sizes[finding.size] += 1
        self.add_captions(finding.captions)
        return True

    def add_captions(self, captions: Captions) -> None:
        """Count the captions of an image, their lengths and how often training would use each."""
        self.num_captions[sum(map(bool, captions.texts))] += 1
        while len(self.positions) < len(captions.texts):
            self.positions.append(Position())

        shares = captions.shares(self.weights)
        for position, (text, share) in zip(self.positions, zip(captions.texts, shares, strict=True), strict=False):
            position.used += share
            if text:
                length = self.count(text)
                self.tokens[length] += 1
                position.tokens[length] += 1

    def seen(self, finding: Finding) -> str:
        """The earlier line or sample with the same image and caption, or an empty text."""
        texts = "\n".join(finding.captions.texts)
        key = hashlib.blake2b(finding.content + texts.encode(), digest_size=16).digest()
        return "" if (first := self.captions_of.setdefault(key, finding.where)) == finding.where else first

    def show_positions(self) -> None:
        """Print the number of captions of the images, and the length and use of each position."""
        counts = sorted(self.num_captions.items())
        bars("captions per image", [(str(number), images) for number, images in counts])

        log.print_line(f"\ncaption      images   used in      {self.unit}: shortest, median, longest")
        for number, position in enumerate(self.positions, start=1):
            lengths = np.sort(np.repeat(list(position.tokens), list(position.tokens.values())))
            extent = f"{lengths[0]:8d} {lengths[len(lengths) // 2]:7d} {lengths[-1]:8d}" if len(lengths) else ""
            log.print_line(f"{number:7d} {len(lengths):11d} {position.used / self.good:9.1%} {extent}")

    def show(self, buckets: dict[int, Buckets]) -> None:
        """Print histograms of the valid lines, the buckets of each pixel budget, and the totals."""
        if self.good:
            sizes, counts = np.array(list(self.sizes)), list(self.sizes.values())
            sides = np.repeat(np.sqrt(sizes.prod(axis=1)), counts)
            histogram("square root of the number of pixels", sides, [0, 128, 256, 384, 512, 768, 1024, 2048, 4096])

            ratios = np.repeat(sizes[:, 1] / sizes[:, 0], counts)
            histogram("width / height", ratios, [0, 0.25, 0.5, 0.67, 0.8, 1, 1.25, 1.5, 2, 4])

            bars("colour profile (none, sRGB and unreadable: pixels unchanged)", self.profiles.most_common())
            log.print_line(f"{self.flat} of {self.good} images have no contrast")

            lengths = np.repeat(list(self.tokens), list(self.tokens.values()))
            histogram(f"caption length ({self.unit})", lengths, [0, 8, 16, 32, 64, 77, 128, 256, 512])
            if len(self.positions) > 1:
                self.show_positions()

            # how the images are distributed over the buckets of each pixel budget
            for pixels, of_budget in buckets.items():
                shapes = np.repeat(of_budget.nearest(sizes), counts, axis=0)
                fill, share = np.unique(shapes, axis=0, return_counts=True)
                rows = [(f"{h} x {w}", n) for (h, w), n in zip(fill.tolist(), share.tolist(), strict=True)]
                bars(f"buckets of {pixels} pixels, height x width", rows)

                small = int((sizes.prod(axis=1) < pixels) @ np.array(counts))
                log.print_line(f"{small} of {self.good} images have fewer than {pixels} pixels and would be upscaled")

        if self.enclosed and self.in_tsv:
            log.print_line(f"{self.enclosed} {ENCLOSED}")

        total = sum(self.problems.values())
        log.print_line("\n" + "\n".join(f"{count:8d} {kind}" for kind, count in self.problems.most_common()))
        log.print_line(f"{self.good} valid {self.items}, {total} with problems")


@dataclass
class Position:
    """The captions at one position in the lists of all images."""

    tokens: Counter = field(default_factory=Counter)  # captions by length
    used: float = 0.0  # expected number of images in an epoch that use it


def histogram(title: str, values: np.ndarray, edges: list[float]) -> None:
    counts, _ = np.histogram(values, [*edges, np.inf])
    names = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
    bars(title, [*zip(names, counts.tolist(), strict=False), (f"{edges[-1]:g} and more", int(counts[-1]))])


def bars(title: str, rows: list[tuple[str, int]]) -> None:
    log.print_line(f"\n{title}")
    most = max(count for _, count in rows)
    for name, count in rows:
        if count:
            log.print_line(f"{name:>16} {count:10d} {'#' * -(-40 * count // most)}")


def check_weights(options: argparse.Namespace) -> tuple[float, ...]:
    """The weights of captions by position. Raises UserError if they are none."""
    try:
        return CaptionPhase(0, tuple(options.caption_weights)).weights
    except ValueError as error:
        raise UserError(f"--caption-weights: {error}") from error


def main(options: argparse.Namespace) -> None:
    """Entry point of `selfe check-data`; exits with code 1 if there are problems."""
    try:
        buckets = {pixels: Buckets(pixels, options.multiple, options.max_aspect) for pixels in options.pixels}
    except ValueError as error:
        raise UserError(f"--pixels, --multiple, --max-aspect: {error}") from error

    path, columns, unused = as_path(options.manifest), (options.image_column, options.caption_column), Counter()
    limits = Limits(as_path(options.base_dir), options.min_side, options.max_pixels)
    in_tar, in_table = path.suffix.lower() == ".tar", path.suffix.lower() in TABLES or is_saved(path)
    if options.write_clean and (in_tar or in_table):
        raise UserError("--write-clean: writes a manifest; it cannot be used with tar shards and tables")
    if options.write_clean:
        manifest_writer.check_name(options.write_clean, "--write-clean")

    # the samples, and how many bytes they have
    if in_table or (in_tar and isinstance(path, RemotePath)):
        cache = DiskCache(options.cache_dir)
        reading = Reading(limits.base_dir, options.max_pixels, None, False, True, cache, *columns)
        limits = replace(limits, source=open_table(path, reading) if in_table else open_remote(path, reading))
        sizes = limits.source.records.records["image_bytes"]
        items = enumerate((Stored(index, int(size)) for index, size in enumerate(sizes)), start=1)
        total = int(sizes.sum(dtype=np.int64))
    elif in_tar:
        files = matching_files(path)
        items = enumerate((sample for tar in files for sample in read_samples(tar, unused)), start=1)
        total = sum(file.stat().st_size for file in files)
    else:
        limits = replace(limits, format=detect(path, *columns))
        items, total = read_records(path, limits.format), path.stat().st_size

    kind, in_tsv = "samples" if in_tar or in_table else "lines", isinstance(limits.format, Tsv)
    report = Report(options.tokenizer, kind, in_tsv and kind == "lines", check_weights(options))
    valid = (finding for finding in findings(batched(items), total, limits, options.workers) if report.add(finding))
    lines = (Line(finding.path, finding.captions, finding.size) for finding in valid)
    if options.write_clean:
        manifest_writer.write(options.write_clean, lines)
    else:
        deque(lines, maxlen=0)

    if unused:
        log.print_line(f"{options.manifest}{describe_unused(unused)}")
    report.show(buckets)
    if report.problems or not report.good:
        sys.exit(1)
