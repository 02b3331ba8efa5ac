"""The verb `selfe tune-sampler`: starts the processes of `selfe.tune_sampler` with the options of the command line."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from selfe import config, launch, recorded_run
from selfe.errors import UserError
from selfe.training.evaluation import TrainingEvaluation

# settings that are varied, in this order
GRID = {
    "cfg_scale": [1.0, 1.5, 2.0, 3.0, 5.0],
    "s_ratio": [0.0, 0.25, 0.5, 0.75, 1.0],
    "eta": [0.0, 0.5, 1.0],
    "guidance_interval": [None, [0.0, 0.8], [0.2, 1.0], [0.2, 0.8]],
    "sampler": ["renoise", "heun", "adams_bashforth"],
}
SHARED = ("extractors", "reference", "base_dir", "reference_size", "reference_images", "reference_split")
SAMPLED = ("num_samples", "seed", "cfg_scale", "s_ratio", "sampler")


def main(options: argparse.Namespace) -> None:
    """Entry point of `selfe tune-sampler`."""
    path, requested, overrides = options.config, *config.parse_rest(options.rest)
    if path.is_dir():
        path, defaults = of_run(path, options.trust)
        overrides = [*defaults, *overrides]
    if options.settings is not None:
        tree = config.resolve(options.settings)
        if "evaluation" not in tree:
            raise UserError(f"{options.settings}: has no section evaluation")
        overrides = [f"evaluation={json.dumps(config.plain(tree['evaluation']))}", *overrides]
    config.check(path, overrides, ("system", "inferencer", "evaluation"), files=False)

    search = {
        "metric": options.metric,
        "budget": options.budget,
        "num_images": options.images,
        "num_steps": numbers("--steps", options.steps, int),
        "grid": grid(options),
        "out": str(options.out),
    }
    arguments = [json.dumps(search), *overrides]
    exit_code = launch.start("tune_sampler", str(path), launch.choose_processes(requested), arguments)
    if exit_code:
        sys.exit(exit_code)


def of_run(folder: Path, trust: bool) -> tuple[Path, list[str]]:
    """The config of a run, and overrides for a search: its checkpoints, and the images of its `trainer.evaluate`."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: has no config.yaml; give a sampling config or the output folder of a run")
    tree = config.resolve(path)
    if not trust and (foreign := config.foreign_modules(tree)):
        raise UserError(
            f"{path}: names {foreign[0]}, which is not part of selfe; loading it runs its code. If you trust the "
            "author of this file, repeat the command with --trust"
        )

    values: dict[str, Any] = {"inferencer.ckpt_dir": folder / "checkpoints", "inferencer.output_dir": folder / "images"}
    size = recorded_run.image_size(tree)
    trained = tree.get("trainer", {}).get("evaluate")
    if trained and "evaluation" not in tree:
        values["evaluation"] = {name: trained[name] for name in SHARED if name in trained}
        values["inferencer.defaults.prompt_file"] = trained.get("prompt_file")
        values |= {f"inferencer.defaults.{name}": trained[name] for name in SAMPLED if name in trained}
        size = trained.get("size", TrainingEvaluation.size)
    if size:
        values |= {"inferencer.defaults.height": size[0], "inferencer.defaults.width": size[1]}
    return path, [f"{key}={json.dumps(config.plain(value))}" for key, value in values.items()]


def grid(options: argparse.Namespace) -> dict[str, list]:
    """The values to try, by setting."""
    given: dict[str, Any] = {}
    for name, flag in (("cfg_scale", "--guidance"), ("s_ratio", "--s-ratio"), ("eta", "--eta")):
        if (text := getattr(options, name)) is not None:
            given[name] = numbers(flag, text, float)
    if options.guidance_interval is not None:
        given["guidance_interval"] = [interval(text) for text in options.guidance_interval.split(",")]
    if options.sampler is not None:
        given["sampler"] = options.sampler.split(",")
    return GRID | given


def numbers(flag: str, text: str, kind: type) -> list:
    """`1,2,4` as numbers. Raises UserError."""
    try:
        values = [kind(word) for word in text.split(",")]
    except ValueError as error:
        raise UserError(f"{flag}: {text!r} is not a list of numbers such as 1,2,4") from error
    if len(set(values)) < len(values):
        raise UserError(f"{flag}: {text!r} repeats a value; give each once")
    return values


def interval(text: str) -> list[float] | None:
    """`0.2:0.8`, or `none` for guidance at all times. Raises UserError."""
    if text == "none":
        return None
    try:
        low, high = map(float, text.split(":"))
    except ValueError as error:
        raise UserError(f"--interval: {text!r} is neither none nor LOW:HIGH such as 0.2:0.8") from error
    return [low, high]
