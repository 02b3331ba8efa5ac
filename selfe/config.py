"""YAML files to objects. Constructor signatures are the schema, checked completely before anything is built.

A swappable part is `{module: dotted.path.Class, params: {...}}`; a fixed one (`trainer:`, or any parameter annotated
with a dataclass) is a plain section. `base:` names files to merge first, later ones over earlier ones; naming another
`module` drops the params of the module it replaces. `key=value` arguments are merged last.
"""

from __future__ import annotations

import inspect
import math
import re
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from selfe.types import UserError

SECTIONS = {
    "system": "selfe.system.System",
    "trainer": "selfe.train.TrainerConfig",
    "inferencer": "selfe.infer.Inferencer",
}
ROOT = {"seed": int, "data": object} | SECTIONS
PLAIN = (int, float, str, bool, Path, types.NoneType)


class Problem(Exception):
    """An error at a key path; raised again as `UserError` with the file that set the key."""

    def __init__(self, path: str, message: str):
        super().__init__(f"{path}: {message}")
        self.path = path


def load(path: str | Path, overrides: Sequence[str] = (), trust: bool = True) -> dict:
    """The merged, resolved and checked settings of a file, with values of the types in the constructors' signatures.

    Checking imports the modules that the file names, which runs their code. Without `trust`, for a file that came with
    weights, it may name parts of this package only.

    Raises UserError that names the file, the key path and the nearest valid key.
    """
    layers = read_layers(path, overrides)
    resolved = resolve_layers(layers)
    if not trust:
        refuse_foreign(path, resolved)
    try:
        return {"seed": 0} | {key: visit_root(key, value, build=False) for key, value in resolved.items()}
    except Problem as problem:
        raise UserError(f"{source(layers, problem.path)}: {problem}") from problem


def resolve(path: str | Path, overrides: Sequence[str] = ()) -> dict:
    """The merged and resolved settings of a file, not checked: nothing that they name is imported. Raises UserError."""
    return resolve_layers(read_layers(path, overrides))


def refuse_foreign(path: str | Path, tree: Any, trusted: Collection[str] = ()) -> None:
    """Raise UserError if settings name a module that is neither part of this package nor in `trusted`."""
    foreign = [module for module in modules(tree) if not module.startswith("selfe.") and module not in trusted]
    if foreign:
        raise UserError(
            f"{path}: names {foreign[0]}, which is not part of selfe; loading it runs its code. If you trust the "
            "author of this file, repeat the command with --trust"
        )


def modules(tree: Any) -> list[str]:
    """The values of all `module` keys in settings, at any depth."""
    if isinstance(tree, (list, tuple)):
        return [module for item in tree for module in modules(item)]
    if not isinstance(tree, dict):
        return []
    named_here = [str(tree["module"])] if "module" in tree else []
    return named_here + [module for item in tree.values() for module in modules(item)]


def build(settings: dict, section: str) -> Any:
    """Build the object of a section of loaded settings. Raises UserError."""
    if section not in settings:
        raise UserError(f"{section}: this section is missing; add it, or name a base file that has it")
    try:
        return visit_root(section, settings[section], build=True)
    except Problem as problem:
        raise UserError(str(problem)) from problem


def build_part(part: dict, path: str) -> Any:
    """Build a part {module, params} of a config at a key path. Raises UserError."""
    try:
        return swap(part, path, build=True)
    except Problem as problem:
        raise UserError(str(problem)) from problem


def save(settings: dict, path: Path) -> None:
    """Write settings as a YAML file that loads to equal settings."""
    path.write_text(yaml.safe_dump(plain(settings), sort_keys=False, allow_unicode=True), encoding="utf-8")


def plain(value: Any) -> Any:
    """Settings as YAML types: tuples become lists, paths become strings."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


# ---- files ----


def read_layers(path: str | Path, overrides: Sequence[str]) -> list[tuple[str, dict]]:
    """(source, tree) of the base files, the file and the command line; later ones override earlier ones."""
    return [*read(Path(path), ()), *(("command line", parse_override(override)) for override in overrides)]


def resolve_layers(layers: list[tuple[str, dict]]) -> dict:
    """Merge layers and resolve `${...}`. Raises UserError that names the source and the key."""
    merged: dict = {}
    for _, tree in layers:
        merged = merge(merged, tree)
    try:
        return OmegaConf.to_container(OmegaConf.create(merged), resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{source(layers, error.full_key or '')}: {error.full_key}: {reason}") from error


def read(path: Path, above: tuple[Path, ...]) -> list[tuple[str, dict]]:
    """(file name, tree) of a file and its bases, bases first. `above`: the files that lead here by `base:`."""
    named_by = f"{above[-1]}: base: " if above else ""
    if path.resolve() in [other.resolve() for other in above]:
        raise UserError(f"base: {' -> '.join(map(str, (*above, path)))} is a cycle; remove one of these base entries")
    if not path.is_file():
        raise UserError(f"{named_by}{path}: no such config file; base paths are relative to the file that names them")

    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = " ".join((error.problem or str(error)).split())
        raise UserError(f"{path}{line}: not valid YAML: {problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not a YAML file in UTF-8: {str(error).splitlines()[0]}") from error

    if not isinstance(tree, dict):
        raise UserError(f"{path}: the file must be a mapping of sections, got a {type(tree).__name__}")

    bases = tree.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path}: base: give a file name or a list of file names, got {bases!r}")
    layers = [layer for base in bases for layer in read(path.parent / base, (*above, path))]
    return [*layers, (str(path), tree)]


def parse_override(override: str) -> dict:
    """`a.b=value` -> {"a": {"b": value}}, the value parsed as YAML."""
    key, equals, _ = override.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise UserError(f"command line: {override!r} is not key=value, such as trainer.lr=2e-4")
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([override]), resolve=False)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"command line: {override!r}: {str(error).splitlines()[0]}") from error


def merge(below: Any, above: Any) -> Any:
    """`above` over `below`; mappings merge by key unless they name another module."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    if "module" in above and above["module"] != below.get("module"):
        return above
    return below | {key: merge(below.get(key), value) for key, value in above.items()}


def source(layers: list[tuple[str, dict]], path: str) -> str:
    """The file that set a key path, or its longest prefix that any file set; the last file wins a tie."""
    keys = re.findall(r"\w+", path)
    depths = []
    for _, tree in layers:
        depth = 0
        while depth < len(keys) and isinstance(tree, dict) and keys[depth] in tree:
            tree, depth = tree[keys[depth]], depth + 1
        depths.append(depth)
    deepest = max(range(len(layers)), key=lambda i: (depths[i], i))
    return layers[deepest][0]


# ---- schema: one traversal that checks values and, if `build`, constructs objects ----


def visit_root(key: str, value: Any, build: bool) -> Any:
    """A top-level section. Raises Problem, as do the functions below."""
    if key not in ROOT:
        raise Problem(key, f"unknown section{suggest(key, list(ROOT))}")
    wanted = ROOT[key]
    if isinstance(wanted, str):
        return call(named(wanted, key), value, key, build)
    return visit(value, wanted, key, build)


def visit(value: Any, wanted: Any, path: str, build: bool) -> Any:
    """`value` as annotated by `wanted`: plain values are coerced, parts checked and, if `build`, constructed."""
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        return visit_union(value, arguments, path, build)
    if origin is Literal:
        if value not in arguments:
            raise Problem(path, f"expected one of {', '.join(map(repr, arguments))}, got {value!r}")
        return value

    if origin in (tuple, list):
        return visit_sequence(value, wanted, path, build)
    if origin is dict:
        if not isinstance(value, dict):
            raise mismatch(value, wanted, path)
        return {key: visit(item, arguments[1], f"{path}.{key}", build) for key, item in value.items()}

    # plain value, section, swappable part
    if wanted in PLAIN:
        return coerce(value, wanted, path)
    if is_dataclass(wanted):
        return call(wanted, value, path, build)
    return swap(value, path, build)


def visit_union(value: Any, arms: tuple, path: str, build: bool) -> Any:
    """The first alternative of a union that `value` fits; otherwise the error of the closest one."""
    if value is None and types.NoneType in arms:
        return None
    arms = tuple(arm for arm in arms if arm is not types.NoneType)
    if len(arms) == 1:
        return visit(value, arms[0], path, build)

    # exact type first, before types it can be coerced to
    problems = []
    for arm in sorted(arms, key=lambda arm: type(value) is not arm):
        try:
            return visit(value, arm, path, build)
        except Problem as problem:
            problems.append(problem)

    # the closest alternative is the one whose error is at the deepest key path
    deepest = max(problems, key=lambda problem: len(problem.path))
    raise deepest if deepest.path != path else mismatch(value, arms, path)


def visit_sequence(value: Any, wanted: Any, path: str, build: bool) -> Any:
    origin, arguments = get_origin(wanted), get_args(wanted)
    if not isinstance(value, (list, tuple)):
        raise mismatch(value, wanted, path)
    fixed = origin is tuple and Ellipsis not in arguments
    if fixed and len(value) != len(arguments):
        raise Problem(path, f"expected {len(arguments)} values, got {len(value)}: {list(value)}")
    kinds = arguments if fixed else [arguments[0]] * len(value)
    return origin(visit(v, kind, f"{path}[{i}]", build) for i, (v, kind) in enumerate(zip(value, kinds, strict=True)))


def coerce(value: Any, wanted: type, path: str) -> Any:
    """A plain value. Integers are accepted as floats, and 0 and 1 (common in environment variables) as booleans."""
    if wanted is float and type(value) is int:
        return float(value)
    if wanted is bool and type(value) is int and value in (0, 1):
        return bool(value)
    if wanted is Path and isinstance(value, str):
        return Path(value)
    if type(value) is not wanted or (wanted is float and math.isnan(value)):
        raise mismatch(value, wanted, path)
    return value


def swap(value: Any, path: str, build: bool) -> Any:
    """A swappable part: {module: dotted.path.Class, params: {...}}."""
    if not isinstance(value, Mapping) or not isinstance(value.get("module"), str):
        raise Problem(path, f"expected a part {{module: dotted.path.Class, params: {{...}}}}, got {value!r}")
    for key in value:
        if key not in ("module", "params"):
            raise Problem(f"{path}.{key}", "unknown key; a part has the keys module and params")
    params = call(named(value["module"], f"{path}.module"), value.get("params") or {}, f"{path}.params", build)
    return params if build else {"module": value["module"], "params": params}


def call(target: Callable, values: Any, path: str, build: bool) -> Any:
    """Arguments of a constructor, checked against its signature; if `build`, the object."""
    if not isinstance(values, Mapping):
        raise Problem(path, f"expected a mapping of keys, got {values!r}")

    # unknown keys, then missing ones; ??? marks a value that another file has to set
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    parameters = {name: p for name, p in inspect.signature(target).parameters.items() if name != "self"}
    for key in values:
        if key not in parameters:
            raise Problem(f"{path}.{key}", f"unknown key{suggest(key, list(parameters))}")
    given = {key: value for key, value in values.items() if value != "???"}
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in given:
            raise Problem(f"{path}.{name}", "missing; this key has no default, give it a value")

    arguments = {key: visit(value, hints[key], f"{path}.{key}", build) for key, value in given.items()}
    if not build:
        return arguments
    try:
        return target(**arguments)
    except UserError:
        raise
    except ValueError as error:
        raise Problem(path, str(error)) from error


def named(dotted: str, path: str) -> Callable:
    """Import `package.module.Name`."""
    module, _, name = dotted.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except ImportError as error:
        raise Problem(path, f"cannot import {dotted}: {error}") from error
    except (AttributeError, ValueError) as error:
        raise Problem(path, f"{dotted!r} is not the dotted path of a class: {error}") from error


def suggest(key: Any, valid: list[str]) -> str:
    """The nearest valid key, or all of them, to append to an error message."""
    close = get_close_matches(str(key), valid, n=1)
    return f"; did you mean {close[0]}?" if close else f"; valid keys: {', '.join(valid)}"


def mismatch(value: Any, wanted: Any, path: str) -> Problem:
    kinds = wanted if isinstance(wanted, tuple) else (wanted,)
    names = (str(kind) if get_args(kind) else kind.__name__ for kind in kinds)
    return Problem(path, f"expected {' or '.join(names)}, got {type(value).__name__} {value!r}")
