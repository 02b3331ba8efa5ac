"""The verb `selfe benchmark`: prompts of benchmarks, files for their official scorers, and the results of these."""

from __future__ import annotations

import argparse
import shlex

from selfe import errors, log
from selfe.benchmarks import official, prompt_sets
from selfe.benchmarks.prompt_sets import PROMPT_SETS
from selfe.errors import UserError
from selfe.evaluation import results, tables
from selfe.io import image_encode


def main(options: argparse.Namespace) -> None:
    """Entry point of `selfe benchmark`."""
    if options.action == "prompts":
        write_prompts(options)
        return

    check_name(options.name, official.SCORERS, "scorer that selfe benchmark supports")
    if options.job is None:
        raise UserError(f"selfe benchmark {options.action} {options.name}: name the folder of a sampling job")
    with errors.writing_to(options.job):
        layout(options) if options.action == "layout" else read(options)


def check_name(name: str, valid: dict, what: str) -> None:
    if name not in valid:
        raise UserError(f"{name}: no {what}; choose one of {', '.join(valid)}")


def write_prompts(options: argparse.Namespace) -> None:
    check_name(options.name, PROMPT_SETS, "prompt set")
    chosen = PROMPT_SETS[options.name]
    if options.out is None or options.out.suffix != ".jsonl":
        raise UserError(f"selfe benchmark prompts {options.name}: give the prompt file to write, --out FILE.jsonl")
    count, source = prompt_sets.write_prompts(chosen, options.out, options.source)
    log.print_line(
        f"{options.out}: {count} prompts of {chosen.title} from {source} (sha256 {prompt_sets.sha256(source)})"
    )
    log.print_line(f"licence: {chosen.licence}; protocol: {chosen.protocol}")


def layout(options: argparse.Namespace) -> None:
    scorer = official.SCORERS[options.name]
    folder, missing = official.write_layout(options.name, options.job, options.source)
    if missing:
        log.print_line(f"{missing} prompts of {scorer.title} have no images: the values are those of the others")
    variables = "".join(f"{name}=... " for name in ("SCORER", *scorer.variables))
    log.print_line(f"{folder}: written for {scorer.title}; run its scorer in an environment of its own:")
    log.print_line(f"  {variables}bash {shlex.quote(str(folder / 'run.sh'))}")
    log.print_line(f"  selfe benchmark read {options.name} {shlex.quote(str(options.job))}")


def read(options: argparse.Namespace) -> None:
    for path in options.table:
        if path.suffix not in tables.SUFFIXES:
            raise UserError(f"--table: {path}: the file must be .md (Markdown) or .tex (LaTeX)")
    evaluation = official.read_results(options.name, options.job, options.bootstrap)
    for path in options.table:
        image_encode.write(path, tables.written([evaluation], path.suffix).encode())
    log.print_line(tables.plain([evaluation]))
    log.print_line(f"{options.job / options.name / results.FILE}: results of {official.SCORERS[options.name].title}")
