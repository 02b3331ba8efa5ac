"""Write docs/keys.md: every key of every config, from the constructors, their docstrings and comments.

    .venv/bin/python scripts/make_keys.py

A key is described in the `Args:` of its constructor's docstring, or by the comment behind or above the field of a
dataclass. Run this after a change of either; a test compares the page.
"""

from __future__ import annotations

import ast
import inspect
import io
import math
import re
import textwrap
import tokenize
import types
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from selfe import signatures
from selfe.backbones.mmdit import MMDiT
from selfe.benchmarks.object_detector import ObjectDetector
from selfe.data.cached import CachedData
from selfe.data.dataset import BucketedDataset
from selfe.data.shapes import ShapesData
from selfe.encoders.cached_latents import CachedLatents
from selfe.encoders.cached_text import CachedText
from selfe.encoders.composed_text import ComposedText
from selfe.encoders.diffusers_vae import DiffusersVAE
from selfe.encoders.flux_vae import FluxVAE
from selfe.encoders.hf_text import HFText
from selfe.encoders.hf_vision import HFVision
from selfe.encoders.identity import Identity
from selfe.encoders.remembered_text import RememberedText
from selfe.encoders.t5_clip import T5Clip
from selfe.encoders.words import Words
from selfe.evaluation.hf_extractor import HFExtractor
from selfe.evaluation.inception import Inception
from selfe.evaluation.settings import EvaluationConfig
from selfe.infer import Inferencer
from selfe.objectives.alpha_flow import AlphaFlow
from selfe.objectives.any_flow import AnyFlow
from selfe.objectives.flow_matching import FlowMatching
from selfe.objectives.mean_flow import MeanFlow
from selfe.objectives.repa import Repa
from selfe.objectives.self_evaluation import SelfEvaluation
from selfe.objectives.self_flow import SelfFlow
from selfe.objectives.so_flow import SoFlow
from selfe.objectives.terminal_velocity import TerminalVelocity
from selfe.objectives.transition_model import TransitionModel
from selfe.objectives.tread import Tread
from selfe.optimizers.adamw import AdamW
from selfe.optimizers.muon import Muon
from selfe.samplers.adams_bashforth import AdamsBashforth
from selfe.samplers.euler import Euler
from selfe.samplers.heun import Heun
from selfe.samplers.renoise import Renoise
from selfe.training.ema import ConstantDecay, PowerFunction
from selfe.training.schedules import WSD, Constant, Cosine, Linear
from selfe.training.settings import TrainerConfig
from selfe.training.val_metrics import LossAtTimes

PAGE = Path(__file__).resolve().parents[1] / "docs/keys.md"

FLOW_MAPS = (MeanFlow, AlphaFlow, SoFlow, TransitionModel, AnyFlow, TerminalVelocity)

# (heading, key path, classes); the sections inside of a class follow it
PARTS = (
    ("Training", "trainer", (TrainerConfig,)),
    ("Optimizers", "trainer.optimizer.params", (AdamW, Muon)),
    ("Learning rate schedules", "trainer.schedule.params", (Linear, Cosine, WSD, Constant)),
    ("EMA tracks", "trainer.ema[].params", (ConstantDecay, PowerFunction)),
    ("Validation metrics", "trainer.val_metrics[].params", (LossAtTimes,)),
    ("Sampling", "inferencer", (Inferencer,)),
    ("Backbone", "system.backbone.params", (MMDiT,)),
    ("Text encoders", "system.text_encoder.params", (T5Clip, HFText, ComposedText, Words, CachedText, RememberedText)),
    ("Autoencoders", "system.autoencoder.params", (FluxVAE, DiffusersVAE, Identity, CachedLatents)),
    ("Objectives", "system.objective.params", (SelfEvaluation, FlowMatching, Repa, SelfFlow, Tread)),
    ("Objectives of flow maps", "system.objective.params", FLOW_MAPS),
    ("Image encoders", "system.objective.params.encoder.params", (HFVision,)),
    ("Data sets", "data.params", (BucketedDataset, ShapesData, CachedData)),
    ("Samplers", "inferencer.defaults.sampler.params", (Renoise, Euler, Heun, AdamsBashforth)),
    ("Evaluation", "evaluation", (EvaluationConfig,)),
    ("Extractors", "evaluation.extractors.NAME.params", (HFExtractor, Inception, ObjectDetector)),
)

# what a config names, where it is not the class itself
MODULES = {
    BucketedDataset: (
        "selfe.data.manifest.ManifestData",
        "selfe.data.shards.ShardData",
        "selfe.data.tables.TableData",
    )
}

HEAD = """\
# Keys

Every key of a config, with its type, default and meaning. This page is written by
`scripts/make_keys.py` from the code: do not edit it.

A config has the sections `seed` (an integer of at least 0, by default 0), `system`, `data`,
`trainer`, `inferencer` and `evaluation`, and `base`, the files that are merged first. `system` has
four parts, `backbone`, `text_encoder`, `autoencoder` and `objective`; `data` is a part too, and so
are `optimizer` and `schedule` of `trainer` and the items of its lists `ema`, `val_metrics` and
`loggers`. A part is `{module: dotted.path.Class, params: {...}}`; [extending.md](extending.md)
explains how to write one.
"""


class Key(NamedTuple):
    """A row of a table."""

    name: str
    kind: str  # as Markdown
    default: str  # as YAML, or `required`
    meaning: str


# ---- descriptions ----


def described_arguments(constructor: Any) -> dict[str, str]:
    """The entries of `Args:` in the docstring of a constructor."""
    text = inspect.getdoc(constructor) or ""
    match = re.search(r"^Args:\n((?:[ ]{4}.*\n?|\n)+)", text, re.MULTILINE)
    described: dict[str, str] = {}
    name = ""
    for line in textwrap.dedent(match[1] if match else "").splitlines():
        if start := re.match(r"(\w+): (.*)", line):
            name = start[1]
            described[name] = start[2]
        elif line.strip():
            described[name] += f" {line.strip()}"
    return described


def described_fields(kind: type) -> dict[str, str]:
    """The comment behind the field of a dataclass, or the comments above it; those of the classes that it extends."""
    described: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if is_dataclass(base):
            described |= own_described_fields(base)
    return described


def own_described_fields(kind: type) -> dict[str, str]:
    """As `described_fields`, of the fields in the source of a class."""
    source = textwrap.dedent(inspect.getsource(kind))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    behind = {row: text for (row, column), text in comments.items() if source.splitlines()[row - 1][:column].strip()}
    alone = {row: text for (row, _), text in comments.items() if row not in behind}

    described = {}
    for node in ast.parse(source).body[0].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        above = []
        row = node.lineno - 1
        while row in alone:
            above.insert(0, alone[row])
            row -= 1
        text = re.sub(r"^noqa: \w+( - )?", "", behind.get(node.end_lineno, ""))
        described[node.target.id] = " ".join(above) or ("" if text == "frozen" else text)
    return described


# ---- types and defaults ----

PLAIN = {int: "integer", float: "number", bool: "boolean", str: "text", Path: "path", types.NoneType: "null"}


def name_of(kind: Any, path: str, sections: dict[str, type]) -> str:
    """A type as a reader of YAML sees it. Dataclasses are added to `sections`, by key path."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(name_of(argument, path, sections) for argument in arguments)
    if origin is Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin is tuple and Ellipsis in arguments:
        item = name_of(arguments[0], f"{path}[]", sections)
        return "list of parts" if item == "part" else f"list of {item}"
    if origin is tuple:
        return f"[{', '.join(name_of(argument, path, sections) for argument in arguments)}]"
    if origin is dict:
        return f"mapping of names to {name_of(arguments[1], f'{path}.NAME', sections)}"
    if is_dataclass(kind):
        sections[path] = kind
        return f"[section](#{re.sub('[^a-z0-9_]', '', path)})"
    return PLAIN.get(kind, "part")


def yaml_of(value: Any) -> str:
    """A default as YAML; empty for a section, whose keys have defaults of their own."""
    if is_dataclass(value):
        return ""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if value == {}:
        return "{}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(yaml_of, value))}]"
    if isinstance(value, float):
        return ".inf" if value == math.inf else re.sub("e-0", "e-", f"{value:g}")
    if isinstance(value, int):
        return str(value)
    if isinstance(value, (str, Path)):
        return f'"{value}"' if not str(value) or str(value).startswith("*") else str(value)
    return f"{type(value).__module__}.{type(value).__name__}"


# ---- the page ----


def keys_of(kind: type, path: str, sections: dict[str, type]) -> Iterator[Key]:
    """The keys of a constructor in its order.

    Raises:
        SystemExit: one has no description.
    """
    described = described_fields(kind) if is_dataclass(kind) else described_arguments(kind.__init__)
    hints = signatures.type_hints(kind)
    made = {field.name: field.default_factory for field in fields(kind)} if is_dataclass(kind) else {}

    for name, parameter in inspect.signature(kind).parameters.items():
        if not described.get(name):
            raise SystemExit(f"{kind.__module__}.{kind.__name__}: {name} has no description; see scripts/make_keys.py")
        default = "required"
        if parameter.default is not parameter.empty:
            factory = made.get(name, MISSING)
            text = yaml_of(parameter.default if factory is MISSING else factory())
            default = f"`{text}`" if text else ""
        yield Key(name, name_of(hints[name], f"{path}.{name}", sections), default, described[name].rstrip("."))


def table(kind: type, path: str, sections: dict[str, type]) -> list[str]:
    rows = [
        f"| `{key.name}` | {key.kind} | {key.default} | {key.meaning} |".replace("||", r"\|\|")
        for key in keys_of(kind, path, sections)
    ]
    return ["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""] if rows else ["No keys.", ""]


def summary(kind: type) -> list[str]:
    """The first paragraph of the docstring, unless it is the one that dataclasses write."""
    text = " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())
    return [] if text.startswith(f"{kind.__name__}(") else [text, ""]


def describe(kind: type, path: str) -> list[str]:
    """The keys of a class, then those of each section inside of it."""
    sections: dict[str, type] = {}
    lines = table(kind, path, sections)
    for inner_path, inner in sections.items():
        lines += [f"#### `{inner_path}`", "", *summary(inner), *describe(inner, inner_path)]
    return lines


def page() -> str:
    """The text of docs/keys.md."""
    contents = (f"- [{heading}](#{heading.lower().replace(' ', '-')})" for heading, _, _ in PARTS)
    lines = [HEAD, *contents, ""]

    for heading, path, kinds in PARTS:
        lines += [f"## {heading}", "", f"Keys of `{path}`:", ""]
        for kind in kinds:
            if path.endswith("params"):
                modules = MODULES.get(kind, (f"{kind.__module__}.{kind.__name__}",))
                lines += ["### " + ", ".join(f"`{module}`" for module in modules), "", *summary(kind)]
            lines += describe(kind, path)
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
