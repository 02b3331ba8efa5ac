"""The verb `selfe evaluate`: starts the processes of `selfe.evaluate` with the options of the command line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from selfe import config, launch
from selfe.errors import UserError

HF_EXTRACTOR = "selfe.evaluation.hf_extractor.HFExtractor"


def main(options: argparse.Namespace) -> None:
    """Entry point of `selfe evaluate`."""
    path = options.job
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give a sampling config, or the folder of a sampling job")
    if path.is_file() and options.settings is not None:
        raise UserError("--settings: is for the folder of a job; a config has its own section evaluation")

    requested, overrides = config.parse_rest(options.rest)
    overrides = [*overrides_of(options), *overrides]
    if path.is_file():
        config.check(path, overrides, ("system", "inferencer", "evaluation"))
    else:
        config.check(options.settings, overrides, ("evaluation",))

    arguments = [str(options.settings or "-"), *overrides]
    exit_code = launch.start("evaluate", str(path), launch.choose_processes(requested), arguments)
    if exit_code:
        sys.exit(exit_code)


def overrides_of(options: argparse.Namespace) -> list[str]:
    """The options as keys of the section evaluation."""
    values = {}
    if options.reference is not None:
        values["reference"] = str(options.reference)
    if options.metrics is not None:
        values["metrics"] = [name.strip() for name in options.metrics.split(",") if name.strip()]
    if options.extractor:
        values["extractors"] = hf_parts(options.extractor)
    if options.table:
        values["table"] = [str(path) for path in options.table]
    return [f"evaluation.{key}={json.dumps(value)}" for key, value in values.items()]


def hf_parts(models: Sequence[str]) -> dict[str, dict]:
    """Extractors for Hugging Face models, named by the last part of their paths."""
    parts = {}
    for model in models:
        params = {"model": model}
        if folder := os.environ.get("SELFE_CACHE_DIR"):
            params["cache_dir"] = folder
        parts[Path(model).name] = {"module": HF_EXTRACTOR, "params": params}
    return parts
