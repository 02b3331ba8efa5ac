"""The verb `selfe report`: one page for one or many runs, as a file or served while they train."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from selfe import log
from selfe.errors import UserError
from selfe.evaluation import tables
from selfe.gallery.build import names
from selfe.io import image_encode
from selfe.tools.report import page, server
from selfe.tools.report.run_folder import RunFolder


def main(options: argparse.Namespace) -> None:
    """Entry point of `selfe report`."""
    if options.port is not None and not options.serve:
        raise UserError("--port: needs --serve")
    for path, count in Counter(path.resolve() for path in options.runs).items():
        if count > 1:
            raise UserError(f"{path}: given {count} times")
    runs = [RunFolder(path, name) for path, name in zip(options.runs, names(options.runs), strict=True)]

    for path in options.table:
        write_table(runs, path)
    if options.serve:
        return server.serve(runs, options.port)

    for run in runs:
        if not run.metrics.num_lines and not run.evaluations:
            raise UserError(f"{run.path}: metrics.jsonl has no lines; wait for the first logged step, or use --serve")
    html = page.page(page.static(runs, options.sheets)).encode()
    image_encode.write(options.out, html)
    count = log.count(len(runs), "run", "runs")
    print(f"{options.out}: {count}, {len(html) / 2**20:.1f} MiB")


def write_table(runs: Sequence[RunFolder], path: Path) -> None:
    """Write the numbers of `selfe evaluate` of all runs as one table. Raises UserError."""
    evaluations = [evaluation for run in runs for _, evaluation in run.evaluations.values()]
    if path.suffix not in tables.SUFFIXES:
        raise UserError(f"--table {path}: the file must be .md (Markdown) or .tex (LaTeX)")
    if not evaluations:
        raise UserError(f"--table {path}: none of the runs has an evaluation; run selfe evaluate first")
    image_encode.write(path, tables.written(evaluations, path.suffix).encode())
    print(f"{path}: {len(evaluations)} evaluated sampling jobs")
