"""Train every model of a study, sample from each, evaluate the images, and write the study's page in docs/.

    .venv/bin/python scripts/studies/run.py miniature                all variants, three seeds
    .venv/bin/python scripts/studies/run.py miniature --quick        one seed, short runs, two negative controls
    .venv/bin/python scripts/studies/run.py emoji                    words to images, see docs/emoji.md
    .venv/bin/python scripts/studies/run.py objectives               any-step objectives, see docs/objectives.md
    .venv/bin/python scripts/studies/run.py miniature --page-only    the page again from results.json

Two models are trained in parallel (--parallel), one thread each. Results are kept in runs/STUDY; run the same command
again to resume.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import torch
from models import ROOT, Run, train
from tables import pyplot

from selfe import log
from selfe.errors import UserError

STUDIES = ("miniature", "emoji", "objectives")


def work(study: str, run: Run, out: Path, count: int, short: tuple[int, int] | None) -> tuple[str, float]:
    """Train and evaluate one model; returns its name and the wall-clock seconds."""
    began = time.monotonic()
    torch.set_num_threads(1)
    train(run, out, short)
    import_module(f"{study}.study").evaluate(run, out, count)
    return run.name, time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--quick", action="store_true", help="one seed, shorter runs")
    parser.add_argument("--seeds", type=int, help="seeds of the main models")
    parser.add_argument("--count", type=int, help="images per sampling setting")
    parser.add_argument("--parallel", type=int, default=2, help="models trained at the same time")
    parser.add_argument("--docs", action="store_true", help="write docs/ even with --quick")
    parser.add_argument("--report-only", action="store_true", help="write the report from existing evaluations only")
    parser.add_argument("--page-only", action="store_true", help="write the page again from its results.json")
    given = parser.parse_args()
    try:
        pyplot()  # the plots come last: a missing package is reported before hours of training
    except UserError as error:
        parser.error(str(error))

    study = import_module(f"{given.study}.study")
    if given.page_only:
        study.write_page(json.loads(study.RESULTS.read_text()), ROOT / "docs")
        return
    out = ROOT / "runs" / (f"{given.study}_quick" if given.quick else given.study)
    seeds = given.seeds or (1 if given.quick else study.SEEDS)
    count = given.count or (study.QUICK_COUNT if given.quick else study.COUNT)
    os.environ["OMP_NUM_THREADS"] = "1"
    runs = study.plan(seeds, given.quick)

    if not given.report_only:
        study.prepare(out, runs, count)
        log.print_line(f"{len(runs)} models, {given.parallel} in parallel")
        with ProcessPoolExecutor(given.parallel, mp_context=get_context("spawn")) as pool:
            short = study.QUICK if given.quick else None
            waiting = [pool.submit(work, given.study, run, out, count, short) for run in runs]
            for number, future in enumerate(as_completed(waiting), 1):
                try:
                    name, seconds = future.result()
                except SystemExit as error:  # the other models go on; the report leaves this one out
                    log.print_line(f"{number}/{len(runs)} {error}")
                    continue
                log.print_line(f"{number}/{len(runs)} {name}: {seconds / 60:.1f} minutes")

    command = f"scripts/studies/run.py {given.study}{' --quick' * given.quick} --seeds {seeds} --count {count}"
    study.report(out, runs, count, command, ROOT / "docs" if given.docs or not given.quick else None)


if __name__ == "__main__":
    main()
