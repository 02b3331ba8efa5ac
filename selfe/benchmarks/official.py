"""Official scorers: files of a sampling job for them, a script that runs them, and their results as an evaluation.

JOB/NAME/images/CELL      what the scorer reads, for each sampling setting
JOB/NAME/run.sh           runs the scorer on each of them, in its own environment
JOB/NAME/results/CELL.*   what it writes
JOB/NAME/evaluation.json  the values, as `selfe evaluate` writes them
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfe.benchmarks import prompt_sets, scorer
from selfe.benchmarks.adm import ADM
from selfe.benchmarks.dpg import DPG
from selfe.benchmarks.geneval import GenEval
from selfe.benchmarks.geneval2 import GenEval2
from selfe.benchmarks.prompt_sets import PROMPT_SETS, Prompt
from selfe.benchmarks.scorer import Scorer
from selfe.errors import UserError
from selfe.evaluation import image_sets, results
from selfe.evaluation.features import digest_of
from selfe.evaluation.image_sets import Cell
from selfe.evaluation.results import Evaluation, Value
from selfe.io import image_encode

SCORERS: dict[str, Scorer] = {"geneval": GenEval(), "geneval2": GenEval2(), "dpg": DPG(), "adm": ADM()}
LAYOUT = "layout.json"
FORMAT = 1
SCRIPT = """\
#!/usr/bin/env bash
# {title} on the images of {job}; written by selfe benchmark layout, see docs/benchmarks.md.
# A sampling setting that has results is left out.
set -euo pipefail
: "${{SCORER:?set it to a clone of {repository}}}"
{variables}PYTHON=${{PYTHON:-python}}
SCORER=$(realpath "$SCORER")
cd "$(dirname "$0")"
mkdir -p results
# results of two versions are not mixed
same() {{
    if [ -f "$1" ] && [ -n "$(ls results)" ] && [ "$(cat "$1")" != "$2" ]; then
        echo "$PWD/results: computed with $3 $(cat "$1"), which is now $2; remove this folder to start again" >&2
        exit 2
    fi
    echo "$2" > "$1"
}}
VERSION=${{VERSION:-$(git -C "$SCORER" describe --always --dirty --abbrev=40 --exclude '*')}}
same version.txt "$VERSION" "the scorer's commit"
{setup}
score() {{
    if [ -s "results/$1{suffix}" ]; then return; fi
    rm -f "results/$1.partial{suffix}"
    {command}
    mv "results/$1.partial{suffix}" "results/$1{suffix}"
}}
{calls}
"""


def cell_name(settings: dict[str, Any]) -> str:
    """The name of a sampling setting in paths: readable, and different for different settings."""
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=4).hexdigest()
    words = re.sub(r"[^a-z0-9.]+", "_", results.label(settings).lower())
    return f"{words}_{digest}"


# ---- files for a scorer ----


def write_layout(name: str, job: Path, source: Path | None) -> tuple[Path, int]:
    """Write what an official scorer reads, and `run.sh`. Raises UserError.

    Returns the folder, and how many prompts of the benchmark have no image.
    """
    official, folder = SCORERS[name], job / name
    cells = image_sets.read_job(job)
    prompts, prompt_set = None, None
    if official.prompt_set is not None:
        chosen = PROMPT_SETS[official.prompt_set]
        prompts, path = prompt_sets.opened(chosen, source)
        prompt_set = {"name": chosen.name, "sha256": prompt_sets.sha256(path), "num_prompts": chosen.num_prompts}

    described, calls, missing = [], [], 0
    old = read_layout(folder)["cells"] if (folder / LAYOUT).is_file() else []
    for cell in cells:
        place = cell_name(cell.settings)
        samples = scorer.samples_of(cell, prompts)
        used = list(dict.fromkeys(sample.prompt.id for sample in samples))
        missing = max(missing, 0 if prompts is None else len(prompts) - len(used))

        partial = folder / "images" / f"{place}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        options = official.write(partial, samples)
        shutil.rmtree(folder / "images" / place, ignore_errors=True)
        partial.replace(folder / "images" / place)

        facts = {"settings": cell.settings} | cell.record() | {"images": digest(cell)}
        described.append({"name": place, "facts": facts, "prompts": used})
        calls.append(f'score "{place}" "{options}"')
        if {"name": place, "facts": facts, "prompts": used} not in old:
            # results of other images
            for file in (folder / "results").glob(f"{place}.*"):
                file.unlink()

    if prompts is not None:
        # for `read_results`, which then needs no source
        image_encode.write(folder / PROMPT_SETS[official.prompt_set].file, path.read_bytes())
    content = {"format": FORMAT, "benchmark": name, "prompt_set": prompt_set, "cells": described}
    image_encode.write(folder / LAYOUT, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    image_encode.write(folder / "run.sh", script(official, job, calls).encode())
    return folder, missing


def digest(cell: Cell) -> str:
    """The digest of the pixels, as `selfe evaluate` records it."""
    pixels = hashlib.blake2b(digest_size=8)
    for index in range(len(cell)):
        pixels.update(digest_of(cell.read(index)[0]).numpy().astype(np.uint8).tobytes())
    return pixels.hexdigest()


def script(official: Scorer, job: Path, calls: Sequence[str]) -> str:
    variables = ""
    for variable, meaning in official.variables.items():
        variables += f': "${{{variable}:?set it to {meaning}}}"\n{variable}=$(realpath "${variable}")\n'
    return SCRIPT.format(
        title=official.title,
        job=job,
        repository=official.repository,
        variables=variables,
        setup=official.setup,
        suffix=official.suffix,
        command=official.command,
        calls="\n".join(calls),
    )


# ---- results of a scorer ----


def read_layout(folder: Path) -> dict[str, Any]:
    """Raises UserError."""
    path = folder / LAYOUT
    if not path.is_file():
        raise UserError(f"{path}: no such file; run selfe benchmark layout {folder.name} {folder.parent} first")
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["format"] != FORMAT:
        raise UserError(f"{path}: of another version; run selfe benchmark layout {folder.name} {folder.parent} again")
    return content


def read_results(name: str, job: Path, replicates: int) -> Evaluation:
    """The evaluation of a job by an official scorer, also written to its file. Raises UserError."""
    official, folder = SCORERS[name], job / name
    layout = read_layout(folder)
    ids: dict[str, Prompt] = {}
    if official.prompt_set is not None:
        chosen = PROMPT_SETS[official.prompt_set]
        ids = {prompt.id: prompt for prompt in chosen.read(folder / chosen.file)}

    values = []
    for number, cell in enumerate(layout["cells"]):
        path = folder / "results" / f"{cell['name']}{official.suffix}"
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; run {folder}/run.sh, which writes the results of each sampling setting"
            )
        prompts = [ids[key] for key in cell["prompts"]] if ids else []
        estimates = official.read(path, prompts, cell["facts"]["count"], replicates)
        values += [Value(number, name, metric, *estimate) for metric, estimate in estimates.items()]

    record = {
        "scorer": official.repository,
        "version": fact(folder / "version.txt"),
        "command": official.command,
        "prompt_set": layout["prompt_set"],
    }
    if (folder / "reference.txt").is_file():
        record["reference_sha256"] = fact(folder / "reference.txt")
    evaluation = Evaluation(
        folder=str(job),
        cells=[cell["facts"] for cell in layout["cells"]],
        reference=None,
        extractors={name: record},
        settings={},
        bootstrap=replicates,
        values=values,
    )
    image_encode.write(folder / results.FILE, evaluation.to_json().encode())
    return evaluation


def fact(path: Path) -> str:
    """A line that `run.sh` has written. Raises UserError."""
    if not path.is_file() or not (text := path.read_text(encoding="utf-8").strip()):
        raise UserError(f"{path}: missing or empty; {path.parent}/run.sh writes it")
    return text
