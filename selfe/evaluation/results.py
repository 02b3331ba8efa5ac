"""The file `evaluation.json`: numbers, and for each of them the record of what it was measured on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from selfe.errors import UserError

FILE = "evaluation.json"
FORMAT = 1
LOWER_IS_BETTER = ("fd", "kid", "cmmd")


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
    cells: list[dict[str, Any]]  # settings, count, prompts (digest), seeds, sizes, images (digest)
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
        record |= {name: cell[name] for name in ("count", "prompts", "seeds", "sizes")}
        if self.reference is not None:
            record["reference"] = {name: fact for name, fact in self.reference.items() if name != "path"}
        return record | self.settings

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


def order(value: Value) -> tuple[int, str]:
    return value.cell, value.extractor


def label(settings: dict[str, Any]) -> str:
    """A sampling setting in a few words."""
    steps = settings["num_steps"]
    words = [f"{steps} step" if steps == 1 else f"{steps} steps", f"guidance {settings['cfg_scale']:g}"]
    return ", ".join([*words, f"s ratio {settings['s_ratio']:g}", settings["weights"]])


def nfe(settings: dict[str, Any]) -> int:
    """Network evaluations per image: one per step, two with guidance."""
    return settings["num_steps"] * (1 if settings["cfg_scale"] == 1 else 2)


def digest(texts: Iterable[str]) -> str:
    return hashlib.blake2b(json.dumps(list(texts)).encode(), digest_size=8).hexdigest()


def differences(evaluations: Sequence[Evaluation]) -> list[str]:
    """Warnings about metrics whose numbers have different records, a line each."""
    records: dict[tuple[str, str], dict[str, dict]] = {}
    for evaluation in evaluations:
        for value in evaluation.values:
            record = evaluation.record(value)
            records.setdefault((value.extractor, value.metric), {})[json.dumps(record, sort_keys=True)] = record

    # metrics that differ in the same facts share a line
    warned: dict[tuple[str, ...], list[str]] = {}
    for (extractor, metric), variants in records.items():
        if len(variants) > 1:
            first, *others = variants.values()
            keys = [key for key in first if any(other.get(key) != first[key] for other in others)]
            keys += [key for other in others for key in other if key not in first]
            warned.setdefault(tuple(dict.fromkeys(keys)), []).append(f"{metric} ({extractor})")
    return [f"{', '.join(names)}: not comparable, {' and '.join(keys)} differ" for keys, names in warned.items()]
