"""The verb `selfe check-data`: validate every line and every image of a manifest; all problems in one pass."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from selfe import log
from selfe.data.buckets import Buckets
from selfe.data.dataset import BYTES_PER_TOKEN
from selfe.data.manifest import parse, skip_bom
from selfe.io import image_decode
from selfe.types import BadSample, UserError

BATCH = 64  # lines per task of a worker


@dataclass(frozen=True)
class Limits:
    """Where images are, and which sizes are accepted."""

    base_dir: Path
    min_side: int
    max_pixels: int


@dataclass(frozen=True)
class Finding:
    """Content of a line, as far as it can be read, and its problem (`kind` is empty if there is none)."""

    number: int
    path: str = ""
    prompt: str = ""
    size: tuple[int, int] | None = None  # height, width
    content: bytes = b""  # digest of the image file
    kind: str = ""
    problem: str = ""


def examine(number: int, line: bytes, limits: Limits) -> Finding | None:
    """Parse a line and decode its image; None for a blank line."""
    if not line.strip():
        return None

    # the line
    where = f"line {number}"
    try:
        said = parse(line)
    except BadSample as problem:
        return Finding(number, kind=problem.kind, problem=f"{where}: {problem}")

    # its image, decoded in full
    path = limits.base_dir / said.path
    found = partial(Finding, number, said.path, said.prompt)
    try:
        with image_decode.naming(f"{where}: {path}"), image_decode.opened(path) as stream:
            file = stream.read()
        height, width = image_decode.size(BytesIO(file), f"{where}: {path}", limits.max_pixels)
        image = image_decode.read(BytesIO(file), f"{where}: {path}", limits.max_pixels)
    except BadSample as problem:
        return found(kind=problem.kind, problem=str(problem))

    # its size
    found = partial(found, (height, width), hashlib.blake2b(file, digest_size=16).digest())
    if min(image.size) < limits.min_side:
        return found(
            "too small",
            f"{where}: {path}: {width} x {height} pixels; the minimum side is {limits.min_side}",
        )
    if said.size and said.size != (height, width):
        wrong = f"{said.size[1]} x {said.size[0]}"
        return found("wrong size", f"{where}: {path}: is {width} x {height}, but the manifest has {wrong}")
    return found()


def examine_batch(lines: list[tuple[int, bytes]], limits: Limits) -> list[Finding | None]:
    return [examine(number, line, limits) for number, line in lines]


def findings(manifest: Path, limits: Limits, workers: int) -> Iterator[Finding]:
    """A finding for every non-blank line, in order; computed by `workers` processes, or in this process if 0."""
    batches = read_batches(manifest)
    progress = log.Progress("bytes", manifest.stat().st_size)

    def told(results: Iterable[tuple[list[tuple[int, bytes]], list[Finding | None]]]) -> Iterator[Finding]:
        for lines, found in results:
            progress.advance(sum(len(line) for _, line in lines))
            yield from filter(None, found)

    if workers:
        with ProcessPoolExecutor(workers) as pool:
            try:
                yield from told(in_order(pool, batches, limits, ahead=4 * workers))
            except BrokenProcessPool as error:
                raise UserError(
                    f"{manifest}: a worker process was killed, often for lack of memory; lower --workers"
                ) from error
    else:
        yield from told((lines, examine_batch(lines, limits)) for lines in batches)
    progress.close()


def read_batches(manifest: Path) -> Iterator[list[tuple[int, bytes]]]:
    with manifest.open("rb") as file:
        skip_bom(file)
        lines = enumerate(file, start=1)
        while batch := list(islice(lines, BATCH)):
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

    def __init__(self, tokenizer: str | None):
        self.problems, self.good = Counter(), 0
        self.sizes, self.tokens, self.captions_of = Counter(), Counter(), {}
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
            problem = f"line {finding.number}: {finding.path}: same image and caption as line {first}"
        if kind:
            self.problems[kind] += 1
            log.print_line(f"{kind}: {problem}")
            return False

        self.good += 1
        self.sizes[finding.size] += 1
        self.tokens[self.count(finding.prompt)] += 1
        return True

    def seen(self, finding: Finding) -> int:
        """The earlier line with the same image and caption, or 0."""
        key = hashlib.blake2b(finding.content + finding.prompt.encode(), digest_size=16).digest()
        return 0 if (first := self.captions_of.setdefault(key, finding.number)) == finding.number else first

    def show(self, budgets: list[int], multiple: int, max_aspect: float) -> None:
        """Print histograms of the valid lines, the buckets of each pixel budget, and the totals."""
        if self.good:
            sizes, counts = np.array(list(self.sizes)), list(self.sizes.values())
            sides = np.repeat(np.sqrt(sizes.prod(axis=1)), counts)
            histogram("square root of the number of pixels", sides, [0, 128, 256, 384, 512, 768, 1024, 2048, 4096])

            ratios = np.repeat(sizes[:, 1] / sizes[:, 0], counts)
            histogram("width / height", ratios, [0, 0.25, 0.5, 0.67, 0.8, 1, 1.25, 1.5, 2, 4])

            lengths = np.repeat(list(self.tokens), list(self.tokens.values()))
            histogram(f"caption length ({self.unit})", lengths, [0, 8, 16, 32, 64, 77, 128, 256, 512])

            # how the images are distributed over the buckets of each pixel budget
            for pixels in budgets:
                shapes = np.repeat(Buckets(pixels, multiple, max_aspect).nearest(sizes), counts, axis=0)
                fill, share = np.unique(shapes, axis=0, return_counts=True)
                rows = [(f"{h} x {w}", n) for (h, w), n in zip(fill.tolist(), share.tolist(), strict=True)]
                bars(f"buckets of {pixels} pixels, height x width", rows)

                small = int((sizes.prod(axis=1) < pixels) @ np.array(counts))
                log.print_line(f"{small} of {self.good} images have fewer than {pixels} pixels and would be upscaled")

        total = sum(self.problems.values())
        log.print_line("\n" + "\n".join(f"{count:8d} {kind}" for kind, count in self.problems.most_common()))
        log.print_line(f"{self.good} valid lines, {total} with problems")


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


def main(options: argparse.Namespace) -> None:
    """Entry point of `selfe check-data`; exits with code 1 if there are problems."""
    if not options.manifest.is_file():
        raise UserError(f"{options.manifest}: no such manifest; the first argument must be a TSV file")

    limits = Limits(options.base_dir, options.min_side, options.max_pixels)
    report, aside = Report(options.tokenizer), options.write_clean and options.write_clean.with_suffix(".partial")

    # valid lines go to a temporary file that is renamed when complete
    if aside:
        aside.parent.mkdir(parents=True, exist_ok=True)
    with aside.open("w", encoding="utf-8", newline="\n") if aside else nullcontext() as out:
        for finding in findings(options.manifest, limits, options.workers):
            if report.add(finding) and out:
                out.write(f"{finding.path}\t{finding.prompt}\t{finding.size[1]}\t{finding.size[0]}\n")
    if aside:
        aside.rename(options.write_clean)

    report.show(options.pixels, options.multiple, options.max_aspect)
    if report.problems or not report.good:
        sys.exit(1)
