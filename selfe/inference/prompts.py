"""Sampling requests: a prompt file (.txt, .tsv, .jsonl) or a list of prompts, each with its settings.

All lines are read and checked before weights are loaded. The first invalid line is reported with file, line and reason.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from selfe import compare, config
from selfe.errors import UserError
from selfe.inference import presets
from selfe.inference.presets import Preset
from selfe.io import text_files
from selfe.io.sampling_limits import (
    check_interval,
    check_multiple,
    check_range,
    check_size,
    check_text,
    normal_prompt,
)
from selfe.protocols import Sampler
from selfe.samplers.cost import check_sampler, steps_within
from selfe.samplers.guidance import Interval
from selfe.samplers.renoise import Renoise

SHIPPED = ("renoise", "euler", "heun", "adams_bashforth")  # samplers of this package

# TSV columns that are plain text, not JSON
TEXT_KEYS = ("prompt", "negative_prompt", "category", "aspect", "sampler", "path")
PRESET_KEYS = frozenset(("cfg_scale", "s_ratio", "guidance_interval", "sampler"))  # what a preset sets
GENEVAL_KEYS = ("tag", "include", "exclude")


@dataclass(frozen=True)
class SamplingDefaults:
    """Sampling settings for prompts whose line does not set them. A list makes a sweep from the same noise."""

    prompt_file: Path | None = None  # a .txt, .tsv or .jsonl file
    negative_prompt: str = ""  # replaces the null prompt in guidance
    num_steps: int | tuple[int, ...] = (1, 2, 4, 8, 50)  # number of sampling steps
    num_samples: int = 1  # images per prompt
    first_sample: int = 0  # number of the first sample
    seed: int = 0  # of the noise, together with the prompt and the number of the sample
    height: int = 256  # pixels
    width: int = 256  # pixels
    cfg_scale: float | tuple[float, ...] = 5.0  # guidance; 1 is none, and takes half the time
    # second time of a step: 0 for few steps, 0.5 for one step, 1 as in flow matching
    s_ratio: float | tuple[float, ...] = 0.0
    # times between which guidance applies, as shares of the steps: 1 is the first step; null: at all times
    guidance_interval: tuple[float, float] | None = None
    # how images are sampled
    sampler: Sampler = Renoise()  # noqa: RUF009 - it has no state
    samplers: dict[str, Sampler] = field(default_factory=dict)  # further samplers, by the name that a prompt line uses
    # file of selfe tune-sampler, whose settings for each number of steps replace cfg_scale, s_ratio, guidance_interval
    # and sampler
    preset: Path | None = None

    def __post_init__(self):
        for name in ("num_steps", "num_samples", "first_sample", "seed", "cfg_scale", "s_ratio"):
            values = sweep(getattr(self, name))
            if not values:
                raise ValueError(f"{name}: the list is empty; give one number, or several for a sweep")
            for value in values:
                check_range(name, value)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: {list(values)} repeats a value; list each once")

        check_interval("guidance_interval", self.guidance_interval)
        check_sampler(self.sampler, sweep(self.s_ratio))
        if self.preset is not None:
            presets.read(self.preset)
        check_size(self.height, self.width)
        check_text("negative_prompt", self.negative_prompt)

    @property
    def num_variants(self) -> int:
        """The number of `variants`."""
        others = () if self.preset is not None else (self.cfg_scale, self.s_ratio)
        return math.prod(len(sweep(value)) for value in (self.num_steps, *others))

    def variants(self) -> list[Variant]:
        """All combinations of a sweep, or those of the preset."""
        if self.preset is not None:
            known = presets.read(self.preset)
            return [self.variant_of(presets.nearest(known, count), count) for count in sweep(self.num_steps)]
        values = product(sweep(self.cfg_scale), sweep(self.s_ratio), sweep(self.num_steps))
        return [Variant(*numbers, self.guidance_interval, self.sampler) for numbers in values]

    @staticmethod
    def variant_of(preset: Preset, num_steps: int) -> Variant:
        """The settings of a preset. A sampler with several calls in a step takes fewer steps, for the same cost."""
        count = steps_within(preset.sampler, num_steps)
        return Variant(preset.cfg_scale, preset.s_ratio, count, preset.guidance_interval, preset.sampler)


class Variant(NamedTuple):
    """The settings that an image is sampled with."""

    cfg_scale: float
    s_ratio: float
    num_steps: int
    guidance_interval: Interval | None
    sampler: Sampler


@dataclass(frozen=True)
class Request:
    """A prompt, its sampling settings, and additional keys of its line."""

    prompt: str
    settings: SamplingDefaults
    where: str  # "FILE, line N"
    extra: dict = field(default_factory=dict)  # GenEval metadata: the objects that the image must contain
    category: str = ""  # a kind of prompts, by which an evaluation averages; GenEval's tag


@dataclass(frozen=True)
class Line:
    """The valid keys of a JSONL line or columns of a TSV file. Missing values are taken from the defaults."""

    prompt: str
    negative_prompt: str | None = None
    category: str | None = None
    num_steps: tuple[int, ...] | None = None
    num_samples: int | None = None
    first_sample: int | None = None
    seed: int | None = None
    height: int | None = None
    width: int | None = None
    aspect: str | None = None  # "16:9", width to height, with the area of the defaults
    cfg_scale: tuple[float, ...] | None = None
    s_ratio: tuple[float, ...] | None = None
    guidance_interval: tuple[float, float] | None = None
    sampler: str | None = None  # see `sampler_of`
    eta: float | None = None
    path: str | None = None  # column of a training manifest; ignored


def sweep(value: Any) -> tuple:
    """A single value or a list as a tuple."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def from_list(prompts: Sequence[str], defaults: SamplingDefaults, multiple: int) -> list[Request]:
    """Requests for prompts from the config or the command line."""
    lines = ((f"inferencer.prompts[{i}]", {"prompt": prompt}) for i, prompt in enumerate(prompts))
    return collect(lines, defaults, multiple)


def from_file(path: Path, defaults: SamplingDefaults, multiple: int) -> list[Request]:
    """The requests of a prompt file. Sizes must be multiples of `multiple` pixels; blank lines are skipped.

    Raises:
        UserError: the file cannot be read, or a line is invalid.
    """
    parsers = {".txt": parse_text, ".tsv": parse_tsv, ".jsonl": parse_jsonl}
    if path.suffix.lower() not in parsers:
        raise UserError(f"{path}: a prompt file is .txt (one prompt per line), .tsv or .jsonl; rename or convert it")
    if not path.is_file():
        raise UserError(f"{path}: no such prompt file; set inferencer.defaults.prompt_file, or inferencer.prompts")

    requests = collect(parsers[path.suffix.lower()](lines(path)), defaults, multiple)
    if not requests:
        raise UserError(f"{path}: the prompt file is empty; write one prompt per line")
    return requests


def collect(parsed: Iterator[tuple[str, dict | str]], defaults: SamplingDefaults, multiple: int) -> list[Request]:
    """(where, keys or error message) -> requests, or `UserError` for the first invalid line."""
    requests, problems = [], []
    for where, keys in parsed:
        try:
            if isinstance(keys, str):
                raise ValueError(keys)
            requests.append(request(where, keys, defaults, multiple))
        except (ValueError, config.Problem) as error:
            problems.append(f"{where}: {shorten(str(error).lstrip('.'))}")

    if problems:
        more = f" (and {len(problems) - 1} more invalid lines)" if len(problems) > 1 else ""
        raise UserError(problems[0] + more)
    return requests


def request(where: str, keys: dict, defaults: SamplingDefaults, multiple: int) -> Request:
    """The request of one line: its keys override the defaults."""
    extra = {}
    if all(key in keys for key in GENEVAL_KEYS[:2]):  # a line of GenEval's evaluation_metadata.jsonl
        extra = keys
        keys = {"prompt": keys.get("prompt", "???"), "category": keys.get("tag")}
    for name in ("num_steps", "cfg_scale", "s_ratio"):
        if name in keys and keys[name] is not None:
            keys = keys | {name: sweep(keys[name])}

    # check keys and types against `Line`
    line = config.call(Line, keys, "", build=True)
    prompt = normal_prompt(line.prompt)

    # category, sampler and aspect set other fields; the rest are fields of SamplingDefaults
    given = {name: value for name, value in vars(line).items() if value is not None}
    for name in ("prompt", "path"):
        given.pop(name, None)
    category = given.pop("category", "")
    check_text("category", category)
    name, eta = given.pop("sampler", None), given.pop("eta", None)
    if name is not None or eta is not None:
        given["sampler"] = sampler_of(name, eta, defaults)
    if given.keys() & PRESET_KEYS:
        given["preset"] = None  # a line that sets one of them sets all
    if aspect := given.pop("aspect", None):
        if "height" in given or "width" in given:
            raise ValueError("aspect: give either aspect, or height and width")
        given |= size_of(aspect, defaults.height * defaults.width, multiple)

    settings = replace(defaults, **given)
    for name in ("height", "width"):
        check_multiple(name, getattr(settings, name), multiple)
    return Request(prompt, settings, where, extra, category)


# what other programs write into prompt files; here it is part of the prompt
FOREIGN = {
    "a comment": re.compile(r"^(#|//)\s"),
    "an option of another program": re.compile(r"(^|\s)--[a-z]{1,8}([ =]\S|$)"),
}


def foreign_syntax(requests: Sequence[Request]) -> Iterator[str]:
    """A line for each kind of syntax in the prompts that other programs would not take for text."""
    for kind, pattern in FOREIGN.items():
        matching = [request for request in requests if pattern.search(request.prompt)]
        if matching:
            more = f" and {len(matching) - 1} more" if len(matching) > 1 else ""
            yield (
                f"{matching[0].where}{more}: {shorten(matching[0].prompt, 60)!r} looks like {kind}, but is used as a "
                "prompt; settings of a single prompt are keys of .jsonl or columns of .tsv files"
            )


def sampler_name(sampler: Sampler) -> str:
    """`renoise` for `selfe.samplers.renoise.Renoise`; `module.Class` for a class outside of that folder."""
    path = compare.class_path(sampler)
    name = path.removeprefix("selfe.samplers.").partition(".")[0]
    return name if path == shipped_class(name) else path


def shipped_class(name: str) -> str:
    return f"selfe.samplers.{name}.{name.title().replace('_', '')}"


def sampler_of(name: str | None, eta: float | None, defaults: SamplingDefaults) -> Sampler:
    """The sampler that a line names; None: the default sampler. `eta` replaces its parameter of that name.

    A name is a key of `defaults.samplers`, the `sampler_name` of one of the config's samplers, or a module of
    `selfe.samplers`. A prompt file cannot name other classes, because importing a module runs its code.
    """
    sampler = defaults.sampler if name is None else named_sampler(name, defaults)
    if eta is None:
        return sampler

    parameters = sampler.output_settings() | {"eta": eta}
    try:
        return config.call(type(sampler), parameters, "sampler", build=True)
    except config.Problem as error:
        raise config.Problem("eta", f"{sampler_name(sampler)} does not take eta {eta!r} ({error})") from error


def named_sampler(name: str, defaults: SamplingDefaults) -> Sampler:
    """See `sampler_of`."""
    if name in defaults.samplers:
        return defaults.samplers[name]
    for sampler in (defaults.sampler, *defaults.samplers.values()):
        if name == sampler_name(sampler):
            return sampler

    try:
        if not re.fullmatch("[a-z][a-z0-9_]*", name):
            raise config.Problem("sampler", name)
        return config.call(config.named(shipped_class(name), "sampler"), {}, "sampler", build=True)
    except config.Problem as error:
        own = dict.fromkeys([sampler_name(defaults.sampler), *defaults.samplers])
        valid = ", ".join(dict.fromkeys([*own, *SHIPPED]))
        raise config.Problem(
            "sampler",
            f"no sampler {name!r}; valid: {valid}; list samplers of your own in inferencer.defaults.samplers",
        ) from error


def size_of(aspect: str, pixels: int, multiple: int) -> dict[str, int]:
    """Height and width with about `pixels` pixels and the aspect ratio width:height, multiples of `multiple`."""
    match = re.fullmatch(r"([1-9]\d{0,3}) ?: ?([1-9]\d{0,3})", aspect)
    if not match:
        raise ValueError(f"aspect: expected width:height such as 16:9, got {aspect!r}")
    ratio = int(match[1]) / int(match[2])
    if not 1 / 16 <= ratio <= 16:
        raise ValueError(f"aspect: {aspect} is not between 1:16 and 16:1")

    height, width = math.sqrt(pixels / ratio), math.sqrt(pixels * ratio)
    return {name: max(round(side / multiple), 1) * multiple for name, side in (("height", height), ("width", width))}


# ---- files ----


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """("FILE, line N", text) of all non-blank lines."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    text_files.check_encoding(path)

    for number, line in enumerate(data.split(b"\n"), start=1):
        where = f"{path}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 at byte {error.start} of the line; save the file as UTF-8") from error
        if text.strip():
            yield where, text


def parse_text(numbered: Iterator[tuple[str, str]]) -> Iterator[tuple[str, dict | str]]:
    for where, text in numbered:
        yield where, {"prompt": text}


def parse_jsonl(numbered: Iterator[tuple[str, str]]) -> Iterator[tuple[str, dict | str]]:
    for where, text in numbered:
        try:
            value = json.loads(text, object_pairs_hook=with_unique_keys, parse_constant=refuse_constant)
        except RecursionError:
            yield where, "not JSON: nested too deeply"
        except ValueError as error:
            yield where, f"not JSON: {error}"
        else:
            kind = type(value).__name__
            yield where, value if isinstance(value, dict) else f'expected an object {{"prompt": ...}}, got a {kind}'


def parse_tsv(numbered: Iterator[tuple[str, str]]) -> Iterator[tuple[str, dict | str]]:
    """The first line names the columns. Empty cells take the default; numbers and lists are written as in JSON."""
    columns: list[str] = []
    for where, text in numbered:
        cells = [cell.strip() for cell in text.split("\t")]
        if not columns:
            columns = cells
            known = Line.__dataclass_fields__
            wrong = [name for name in columns if name not in known]
            if wrong or "prompt" not in columns or len(set(columns)) < len(columns):
                raise UserError(
                    f"{where}: the first line must name the columns, each once, including prompt; got "
                    f"{shorten(repr(columns))}; valid: {', '.join(known)}"
                )
        elif quoted := [cell for cell in cells if '""' in cell and text_files.in_csv_quotes(cell)]:
            yield where, f"{shorten(quoted[0], 60)} has the quotes of CSV files; write the text without them"
        elif len(cells) != len(columns):
            yield where, f"{len(cells)} cells, but the first line names {len(columns)} columns"
        else:
            yield where, {name: cell_value(name, cell) for name, cell in zip(columns, cells, strict=True) if cell}


def cell_value(name: str, cell: str) -> Any:
    if name in TEXT_KEYS:
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell  # `config.call` reports the wrong type


def with_unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        raise ValueError("a key occurs twice")
    return keys


def refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def shorten(text: str, limit: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
