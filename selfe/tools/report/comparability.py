"""Warnings about numbers of several runs that measure different things and may not be compared."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from selfe import compare
from selfe.evaluation import results
from selfe.tools.report.run_folder import RunFolder, plain_text

MOST_NAMED = 4  # differing keys that a warning names
# groups of validation metrics: val, val_plain, and val_NAME for every average of the weights
EVERY_LOSS = r"^(train|val(_[^/]+)?)/(.*_)?loss$"
CURRENT_OBJECTIVE = r"^(train|val(_(?!plain/)[^/]+)?)/(.*_)?loss$"
VALIDATION = r"^val(_[^/]+)?/"

# parameters on which plain flow matching depends, the objective of val_plain
PLAIN = tuple(
    f"system.objective.params.{name}"
    for name in ("p_drop", "t_std", "t_mean", "t_distribution", "t_warp", "loss_weight")
)
# keys that decide images, times and noise of a validation
VALIDATION_KEYS = ("seed", "trainer.val_batches", "trainer.total_batch_size", "data.params.pixels")


def warnings(runs: Sequence[RunFolder]) -> list[dict]:
    """`text`, and `metrics`: a regular expression of the names that the warning is about."""
    return [*training_warnings(runs), *evaluation_warnings(runs)]


def evaluation_warnings(runs: Sequence[RunFolder]) -> list[dict]:
    """Of metrics of sampling jobs, which the page names EXTRACTOR/METRIC."""
    evaluations = [evaluation for run in runs for _, evaluation in run.evaluations.values()]
    lines = []
    for facts, columns in results.differences(evaluations).items():
        names = "|".join(re.escape("/".join(column)) for column in columns)
        lines.append({"metrics": f"^evaluation/({names})$", "text": results.warning(facts, columns)})
    return lines


def training_warnings(runs: Sequence[RunFolder]) -> list[dict]:
    """Of losses."""
    runs = [run for run in runs if run.settings]
    settings = {run.name: comparable_settings(run) for run in runs}
    lines = []

    # the objective
    objective = differing(settings, ("system.objective",))
    if objective:
        plain = {run.objective.phase(0) for run in runs if run.objective} == {"flow matching"}
        plain = plain and all(run.objective for run in runs) and not any(key in objective for key in PLAIN)
        other = "val_plain/loss, which is flow matching in all of them, or " if plain else ""
        remedy = f"Compare {other}samples."
        text = f"These runs have different objectives, so their losses are not comparable: {described(objective)}."
        lines.append({"metrics": CURRENT_OBJECTIVE if plain else EVERY_LOSS, "text": f"{text} {remedy}"})

    # the space in which losses are computed
    latents = differing(settings, ("system.autoencoder",))
    if latents:
        text = f"These runs have different latents, so their losses are not comparable: {described(latents)}."
        lines.append({"metrics": EVERY_LOSS, "text": text})

    # the images of training and of validation
    data = differing(settings, (), suffix="train_manifest")
    if data:
        text = f"These runs train on different images, so their training losses are not comparable: {described(data)}."
        lines.append({"metrics": r"^train/(.*_)?loss$", "text": text})
    data = differing(settings, VALIDATION_KEYS, suffix="val_manifest")
    if data:
        text = f"These runs are validated on different images, times or noise: {described(data)}."
        lines.append({"metrics": VALIDATION, "text": text})
    return lines


def comparable_settings(run: RunFolder) -> dict[str, Any]:
    """The settings of a run by key path: without feature caches, and with the defaults of the objective."""
    settings = dict(run.settings)
    if "system" in settings:
        settings["system"] = compare.uncached(settings["system"])
    values = compare.flat(settings)

    if run.objective is not None:
        for name, parameter in inspect.signature(type(run.objective)).parameters.items():
            values.setdefault(f"system.objective.params.{name}", parameter.default)
    return values


def differing(
    settings: Mapping[str, Mapping[str, Any]], prefixes: tuple[str, ...], suffix: str | None = None
) -> dict[str, dict[str, list[str]]]:
    """Keys with different values: key -> value as text -> names of the runs that have it.

    Only keys that start with one of the prefixes, or end with the suffix. What only affects rounding, and where files
    are, is left out.
    """
    keys = dict.fromkeys(key for values in settings.values() for key in values)
    chosen = [key for key in keys if key.startswith(prefixes) or (suffix is not None and key.endswith(suffix))]

    different = {}
    for key in chosen:
        if key.endswith((*compare.NUMERICS, ".cache_dir")):
            continue
        runs: dict[str, list[str]] = {}
        for name, values in settings.items():
            runs.setdefault(plain_text(values[key]) if key in values else "(none)", []).append(name)
        if len(runs) > 1:
            different[key] = runs
    return different


def described(different: Mapping[str, Mapping[str, list[str]]]) -> str:
    """Differing keys as text; a class that differs hides the differences of its parameters."""
    modules = [key for key in different if key.endswith(".module")]
    named = (modules or list(different))[:MOST_NAMED]
    parts = []
    for key in named:
        values = ", ".join(f"{short(value)} ({', '.join(runs)})" for value, runs in different[key].items())
        parts.append(f"{key.removeprefix('system.').removesuffix('.module').replace('.params.', '.')}: {values}")

    rest = 0 if modules else len(different) - len(named)
    return "; ".join(parts) + (f"; and {rest} more keys" if rest else "")


def short(value: str) -> str:
    """A class without the path of its module."""
    return value.rpartition(".")[2] if value.startswith("selfe.") else value
