"""The file `evaluation.json`: numbers, and for each of them the record of what it was measured on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from selfe.errors import UserError

FILE = "evaluation.json"
DURING_TRAINING = "evaluations"  # folder of a run: a file step_N.json of each evaluation during training
FORMAT = 1
WITHIN_PROMPTS = ("diversity", "map_diversity")  # metrics that compare images of one prompt
BY_NEIGHBOURS = ("precision", "recall", "density", "coverage")
WITH_REFERENCE = ("fd", "fd_of_means", "extent", "kid", "cmmd", *BY_NEIGHBOURS)  # metrics that compare with real images
LOWER_IS_BETTER = ("fd", "fd_of_means", "kid", "cmmd")
NEITHER = ("extent", "deviations")  # of all others, and of an extractor's scores, higher values are better
# the metrics that a setting changes
CHANGED_BY = {"max_features": ("kid", "cmmd", *WITHIN_PROMPTS, *BY_NEIGHBOURS), "nearest_k": BY_NEIGHBOURS}
# of a sampling setting: all other names are parameters of the sampler
NOT_PARAMETERS = frozenset(
    ("sampler", "num_steps", "nfe", "cfg_scale", "guidance_interval", "s_ratio", "weights", "step", "fingerprint")
)
FACTS = {"count": "numbers of images", "extractor": "extractors", "reference": "reference images"}


class Value(NamedTuple):
    """A number of a cell."""

    cell: int  # its place in `cells`
    extractor: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """The numbers of a sampling job."""

    folder: str
    cells: list[dict[str, Any]]  # settings, count, prompts (digest), seeds, noise (digest), sizes, images (digest)
    reference: dict[str, Any] | None  # path, count, resized, images (digest)
    extractors: dict[str, dict[str, Any]]  # records by name
    settings: dict[str, int]  # of the metrics
    bootstrap: int
    values: list[Value]

    @property
    def columns(self) -> list[tuple[str, str]]:
        """(extractor, metric) in the order of the file."""
        return list(dict.fromkeys((value.extractor, value.metric) for value in self.values))

    def table(self) -> dict[tuple[int, str, str], Value]:
        """Values by (cell, extractor, metric)."""
        return {value[:3]: value for value in self.values}

    def record(self, value: Value) -> dict[str, Any]:
        """What has to be equal for two numbers of a metric to be comparable, besides what is compared.

        Compared are models and sampling settings; the prompts, the noise and the number of images must be the same.
        """
        cell = self.cells[value.cell]
        record = {"extractor": self.extractors[value.extractor]}
        record |= {name: cell[name] for name in ("count", "prompts", "noise", "sizes")}
        record |= {name: fact for name, fact in self.settings.items() if value.metric in CHANGED_BY[name]}
        if value.metric in WITH_REFERENCE and self.reference is not None:
            record["reference"] = {name: fact for name, fact in self.reference.items() if name != "path"}
        return record

    def to_json(self) -> str:
        values = [value._asdict() for value in self.values]
        return json.dumps({"format": FORMAT} | asdict(self) | {"values": values}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """Raises UserError if a file cannot be read."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError("another format")
            values = [Value(**value) for value in content.pop("values")]
            return cls(**content, values=values)
        except FileNotFoundError as error:
            raise UserError(f"{path}: no such file; selfe evaluate writes it") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}: not an evaluation of this version; run selfe evaluate again") from error


def is_better(metric: str, value: float, than: float) -> bool:
    """Whether a value of a metric is better than another one."""
    return value < than if metric in LOWER_IS_BETTER else value > than


def order(value: Value) -> tuple[int, str]:
    return value.cell, value.extractor


def label(settings: dict[str, Any]) -> str:
    """A sampling setting in a few words."""
    steps = settings["num_steps"]
    words = [f"{steps} step" if steps == 1 else f"{steps} steps", guidance_text(settings)]
    return ", ".join([*words, f"s ratio {settings['s_ratio']:g}", settings["weights"]])


def nfe(settings: dict[str, Any]) -> int:
    """Network evaluations per image: recorded, if they are not one per step, two with guidance."""
    return settings.get("nfe", settings["num_steps"] * (1 if settings["cfg_scale"] == 1 else 2))


def curves(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Numbers over the number of steps, a curve per metric and setting: extractor, metric, label, points."""
    by_setting: dict[tuple[str, str, str], dict[str, Any]] = {}
    for value in evaluation.values:
        settings = evaluation.cells[value.cell]["settings"]
        constant = {name: fact for name, fact in settings.items() if name not in ("num_steps", "nfe")}
        others = json.dumps(constant, sort_keys=True)
        curve = {"extractor": value.extractor, "metric": value.metric, "label": curve_label(settings), "points": []}
        point = {"steps": settings["num_steps"], "nfe": nfe(settings)} | value._asdict()
        by_setting.setdefault((value.extractor, value.metric, others), curve)["points"].append(point)
    for curve in by_setting.values():
        curve["points"].sort(key=lambda point: point["steps"])
    return list(by_setting.values())


def curve_label(settings: dict[str, Any]) -> str:
    """A sampling setting without its number of steps."""
    words = [guidance_text(settings), f"s ratio {settings['s_ratio']:g}", sampler_label(settings)]
    return ", ".join(words if settings["weights"] == "ema" else [*words, f"{settings['weights']} weights"])


def guidance_text(settings: dict[str, Any]) -> str:
    """The guidance of a sampling setting, and its interval if it has one."""
    interval = settings.get("guidance_interval")
    return f"guidance {settings['cfg_scale']:g}" + (f" in {interval[0]:g} to {interval[1]:g}" if interval else "")


def sampler_label(settings: dict[str, Any]) -> str:
    """The sampler and its parameters."""
    parameters = [f"{name} {setting_text(settings[name])}" for name in sorted(set(settings) - NOT_PARAMETERS)]
    return " ".join([settings["sampler"].rpartition(".")[2], *parameters])


def setting_text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def differences(evaluations: Sequence[Evaluation]) -> dict[tuple[str, ...], list[tuple[str, str]]]:
    """What numbers that are shown together must not differ in, but do: names of facts -> (extractor, metric)."""
    records: dict[tuple[str, str], dict[str, dict]] = {}
    for evaluation in evaluations:
        for value in evaluation.values:
            record = evaluation.record(value)
            records.setdefault((value.extractor, value.metric), {})[json.dumps(record, sort_keys=True)] = record

    # metrics that differ in the same facts share an entry
    different: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for column, variants in records.items():
        keys = dict.fromkeys(key for record in variants.values() for key in record)
        differing = []
        for key in keys:
            facts = {json.dumps(record.get(key), sort_keys=True) for record in variants.values()}
            if len(facts) > 1:
                differing.append(key)
        if differing:
            different.setdefault(tuple(differing), []).append(column)
    return different


def warning(facts: Sequence[str], columns: Sequence[tuple[str, str]]) -> str:
    """An entry of `differences` as a sentence."""
    names = ", ".join(f"{metric} ({extractor})" for extractor, metric in columns)
    different = ", ".join(FACTS.get(fact, fact) for fact in facts)
    return f"These values are not comparable, they were measured with different {different}: {names}."
