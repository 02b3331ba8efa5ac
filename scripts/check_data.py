"""Read every line and every picture of a manifest, and tell all that is wrong with them at once.

    .venv/bin/python scripts/check_data.py MANIFEST --base-dir DIR [--workers N] [--write-clean OUT]

Exit code 0: nothing is wrong; 1: something is; 2: a mistake in the command.
"""

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

from selfe import images, launch, log
from selfe.buckets import Buckets
from selfe.data.manifest import BOM, parse
from selfe.feed import BYTES_PER_TOKEN
from selfe.types import BadSample, UserError

BATCH = 64  # lines that a worker takes at a time


@dataclass(frozen=True)
class Limits:
    base_dir: Path
    min_side: int
    max_pixels: int


@dataclass(frozen=True)
class Finding:
    """What a line is about, as far as it can be read, and what is wrong with it."""

    number: int
    path: str = ""
    prompt: str = ""
    size: tuple[int, int] | None = None  # height, width
    content: bytes = b""  # a digest of the picture file
    kind: str = ""
    problem: str = ""


def examine(number: int, line: bytes, limits: Limits) -> Finding | None:
    """A line and its picture, read whole; None for a blank line."""
    if not line.strip():
        return None
    where = f"line {number}"
    try:
        said = parse(line, lambda: where)
    except BadSample as problem:
        return Finding(number, kind=problem.kind, problem=str(problem))
    path = limits.base_dir / said.path
    found = partial(Finding, number, said.path, said.prompt)
    try:
        with images.naming(f"{where}: {path}"):
            file = images.regular(path).read_bytes()
        height, width = images.size(BytesIO(file), f"{where}: {path}", limits.max_pixels)
        image = images.read(BytesIO(file), f"{where}: {path}", limits.max_pixels)
    except BadSample as problem:
        return found(kind=problem.kind, problem=str(problem))
    found = partial(found, (height, width), hashlib.blake2b(file, digest_size=16).digest())
    if min(image.size) < limits.min_side:
        return found(
            "too small", f"{where}: {path}: {width} x {height} pixels; the smaller side needs {limits.min_side}"
        )
    if said.size and said.size != (height, width):
        wrong = f"{said.size[1]} x {said.size[0]}"
        return found("wrong size", f"{where}: {path}: is {width} x {height}, the line says {wrong}")
    return found()


def examine_batch(lines: list[tuple[int, bytes]], limits: Limits) -> list[Finding | None]:
    return [examine(number, line, limits) for number, line in lines]


def findings(manifest: Path, limits: Limits, workers: int) -> Iterator[Finding]:
    """Of every line that is not blank, in order; by `workers` processes, or in this one if 0."""
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
                raise UserError(f"{manifest}: a worker was ended, often for lack of memory; lower --workers") from error
    else:
        yield from told((lines, examine_batch(lines, limits)) for lines in batches)
    progress.close()


def read_batches(manifest: Path) -> Iterator[list[tuple[int, bytes]]]:
    with manifest.open("rb") as file:
        if file.read(len(BOM)) != BOM:
            file.seek(0)
        lines = enumerate(file, start=1)
        while batch := list(islice(lines, BATCH)):
            yield batch


def in_order(pool: ProcessPoolExecutor, batches: Iterator, limits: Limits, ahead: int) -> Iterator[tuple]:
    """Results in the order of the batches, of which only a few are read ahead."""
    waiting = []
    for batch in batches:
        waiting.append((batch, pool.submit(examine_batch, batch, limits)))
        if len(waiting) > ahead:
            lines, future = waiting.pop(0)
            yield lines, future.result()
    for lines, future in waiting:
        yield lines, future.result()


class Report:
    """Counts of what was found; problems are told as they come."""

    def __init__(self, tokenizer: str | None):
        self.problems, self.good = Counter(), 0
        self.sizes, self.tokens, self.captions_of = Counter(), Counter(), {}
        self.count = self.exact(tokenizer) if tokenizer else lambda prompt: len(prompt.encode()) // BYTES_PER_TOKEN + 1
        self.unit = "tokens" if tokenizer else f"tokens, estimated as bytes / {BYTES_PER_TOKEN}"

    @staticmethod
    def exact(folder: str):
        from transformers import AutoTokenizer  # slow to import and not needed otherwise

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"--tokenizer {folder}: {str(error).splitlines()[0]}") from error
        return lambda prompt: len(tokenizer(prompt)["input_ids"])

    def add(self, finding: Finding) -> bool:
        """Whether the line is good."""
        kind, problem = finding.kind, finding.problem
        if not kind and (first := self.seen(finding)):
            kind = "duplicate"
            problem = f"line {finding.number}: {finding.path}: the same picture and caption as line {first}"
        if kind:
            self.problems[kind] += 1
            log.say(f"{kind}: {problem}")
            return False
        self.good += 1
        self.sizes[finding.size] += 1
        self.tokens[self.count(finding.prompt)] += 1
        return True

    def seen(self, finding: Finding) -> int:
        """The line that already has this picture with this caption, or 0."""
        key = hashlib.blake2b(finding.content + finding.prompt.encode(), digest_size=16).digest()
        return 0 if (first := self.captions_of.setdefault(key, finding.number)) == finding.number else first

    def tell(self, budgets: list[int], multiple: int, max_aspect: float) -> None:
        if self.good:
            sizes, counts = np.array(list(self.sizes)), list(self.sizes.values())
            sides = np.repeat(np.sqrt(sizes.prod(axis=1)), counts)
            histogram("side of a square of as many pixels", sides, [0, 128, 256, 384, 512, 768, 1024, 2048, 4096])
            ratios = np.repeat(sizes[:, 1] / sizes[:, 0], counts)
            histogram("width / height", ratios, [0, 0.25, 0.5, 0.67, 0.8, 1, 1.25, 1.5, 2, 4])
            lengths = np.repeat(list(self.tokens), list(self.tokens.values()))
            histogram(f"length of captions ({self.unit})", lengths, [0, 8, 16, 32, 64, 77, 128, 256, 512])
            for pixels in budgets:
                shapes = np.repeat(Buckets(pixels, multiple, max_aspect).nearest(sizes), counts, axis=0)
                fill, share = np.unique(shapes, axis=0, return_counts=True)
                rows = [(f"{h} x {w}", n) for (h, w), n in zip(fill.tolist(), share.tolist(), strict=True)]
                bars(f"buckets of {pixels} pixels, height x width", rows)
                small = int((sizes.prod(axis=1) < pixels) @ np.array(counts))
                log.say(f"{small} of {self.good} pictures have fewer than {pixels} pixels and would be enlarged")
        total = sum(self.problems.values())
        log.say("\n" + "\n".join(f"{count:8d} {kind}" for kind, count in self.problems.most_common()))
        log.say(f"{self.good} good lines, {total} with problems")


def histogram(title: str, values: np.ndarray, edges: list[float]) -> None:
    counts, _ = np.histogram(values, [*edges, np.inf])
    names = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
    bars(title, [*zip(names, counts.tolist(), strict=False), (f"{edges[-1]:g} and more", int(counts[-1]))])


def bars(title: str, rows: list[tuple[str, int]]) -> None:
    log.say(f"\n{title}")
    most = max(count for _, count in rows)
    for name, count in rows:
        if count:
            log.say(f"{name:>16} {count:10d} {'#' * -(-40 * count // most)}")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--base-dir", type=Path, default=Path(), help="where relative picture paths start")
    parser.add_argument("--workers", type=int, default=4, help="processes that read pictures; 0: this one")
    parser.add_argument("--write-clean", type=Path, metavar="OUT", help="a manifest of the good lines, with sizes")
    parser.add_argument("--min-side", type=int, default=64, help="pixels of the smaller side")
    parser.add_argument("--max-pixels", type=int, default=images.MAX_PIXELS, help="larger files are refused")
    parser.add_argument("--pixels", type=int, nargs="+", default=[65536], help="budgets to show the buckets of")
    parser.add_argument("--multiple", type=int, default=16, help="sides of buckets are multiples of this")
    parser.add_argument("--max-aspect", type=float, default=2.0, help="of the longest bucket")
    parser.add_argument("--tokenizer", help="a folder such as SELFE_CACHE_DIR/t5-v1_1-xxl, to count tokens exactly")
    options = parser.parse_args(arguments)
    if not options.manifest.is_file():
        raise UserError(f"{options.manifest}: no such manifest; the first argument is a TSV file")
    limits = Limits(options.base_dir, options.min_side, options.max_pixels)
    report, aside = Report(options.tokenizer), options.write_clean and options.write_clean.with_suffix(".partial")
    if aside:
        aside.parent.mkdir(parents=True, exist_ok=True)
    with aside.open("w", encoding="utf-8", newline="\n") if aside else nullcontext() as out:
        for finding in findings(options.manifest, limits, options.workers):
            if report.add(finding) and out:
                out.write(f"{finding.path}\t{finding.prompt}\t{finding.size[1]}\t{finding.size[0]}\n")
    if aside:
        aside.rename(options.write_clean)
    report.tell(options.pixels, options.multiple, options.max_aspect)
    if report.problems or not report.good:
        sys.exit(1)


if __name__ == "__main__":
    launch.worker(main)
