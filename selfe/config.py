"""YAML files to objects. Constructor signatures are the schema, checked completely before anything is built.

A swappable part is `{module: dotted.path.Class, params: {...}}`; a fixed one (`trainer:`, or any parameter annotated
with a dataclass) is a plain section. `base:` names files to merge first, later ones over earlier ones; naming another
`module` drops the params of the module it replaces. `key=value` arguments are merged last.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import typing_extensions
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from selfe import packaged, signatures
from selfe.errors import UserError

SECTIONS = {
    "system": "selfe.system.System",
    "trainer": "selfe.training.settings.TrainerConfig",
    "inferencer": "selfe.infer.Inferencer",
    "evaluation": "selfe.evaluation.settings.EvaluationConfig",
}
DATA = "selfe.protocols.Data"
PRETRAINED = (
    "selfe.encoders.diffusers_vae.DiffusersVAE",
    "selfe.encoders.t5_clip.T5Clip",
    "selfe.encoders.hf_text.HFText",
    "selfe.encoders.flux_vae.FluxVAE",
)  # parts whose weights are in params.cache_dir
# parts that load other parts, which their params hold
COMPOSED = ("selfe.encoders.composed_text.ComposedText", "selfe.encoders.remembered_text.RememberedText")
ROOT = ("seed", "data", *SECTIONS)
SAVED = "state.json"  # in the folder of a data set that `datasets.save_to_disk` has written
PLAIN = (int, float, str, bool, Path, types.NoneType)
LARGEST_SEED = 2**63 - 1

# keys of other programs, and what they are called here
ALIASES = {
    "learning_rate": "lr",
    "min_learning_rate": "min_lr",
    "batch_size": "total_batch_size",
    "global_batch_size": "total_batch_size",
    "train_batch_size": "micro_batch_size",
    "per_device_batch_size": "micro_batch_size",
    "steps": "max_steps",
    "num_steps": "max_steps",
    "max_train_steps": "max_steps",
    "train_steps": "max_steps",
    "iterations": "max_steps",
    "output": "output_dir",
    "out": "output_dir",
    "output_path": "output_dir",
    "logdir": "output_dir",
    "warmup": "warmup_steps",
    "lr_warmup_steps": "warmup_steps",
    "wd": "weight_decay",
    "grad_clip": "clip_norm",
    "max_grad_norm": "clip_norm",
    "mixed_precision": "precision",
    "dtype": "precision",
    "save_every": "checkpoint_every",
    "checkpointing_steps": "checkpoint_every",
    "save_steps": "checkpoint_every",
    "gradient_checkpointing": "activation_checkpointing",
    "resume": "init_from",
    "resume_from": "init_from",
    "checkpoint": "ckpt_dir",
    "ckpt": "ckpt_dir",
    "guidance": "cfg_scale",
    "guidance_scale": "cfg_scale",
    "prompt": "prompts",
    "manifest": "train_manifest",
    "data_dir": "base_dir",
    "image_dir": "base_dir",
    "resolution": "pixels",
}


class Problem(Exception):
    """An error at a key path; raised again as `UserError` with the file that set the key."""

    def __init__(self, path: str, message: str):
        super().__init__(f"{path}: {message}")
        self.path = path


def load(path: str | Path | None, overrides: Sequence[str] = (), trust: bool = True) -> dict:
    """The merged, resolved and checked settings of a file, with values of the types in the constructors' signatures.

    Without a file, those of the overrides alone.

    Checking imports the modules that the file names, which runs their code. Without `trust`, for a file that came with
    weights, it may name parts of this package only.

    Raises UserError that names the file, the key path and the nearest valid key.
    """
    layers = read_layers(path, overrides)
    resolved = resolve_layers(layers)
    if not trust and (foreign := foreign_modules(resolved)):
        raise UserError(
            f"{path}: names {foreign[0]}, which is not part of selfe; loading it runs its code. If you trust the "
            "author of this file, repeat the command with --trust"
        )
    try:
        return {"seed": 0} | {key: visit_root(key, value, build=False) for key, value in resolved.items()}
    except Problem as problem:
        raise UserError(f"{source(layers, problem.path)}: {problem}") from problem


def check(path: str | Path | None, overrides: Sequence[str], sections: Sequence[str], files: bool = True) -> None:
    """Check what can be checked without imports, from source files alone, in a fraction of a second.

    Args:
        path: the config file.
        overrides: `key=value` arguments.
        sections: the sections that the program needs.
        files: whether manifests, pretrained weights, the prompt file and the checkpoint must be there.

    Raises UserError, which names the file and the key path.
    """
    layers = read_layers(path, overrides)
    resolved = resolve_layers(layers)
    try:
        for key, value in resolved.items():
            visit_root(key, value, build=False, find=signatures.find)
        for section in sections:
            if section not in resolved:
                raise UserError(missing_section(section))
            if files:
                check_files(resolved[section], section)
        if files and "trainer" in sections:
            check_weights(resolved["system"])
    except Problem as problem:
        raise UserError(f"{source(layers, problem.path)}: {problem}") from problem


def check_files(section: dict, path: str) -> None:
    """Raise Problem if a file that a section names with a key of this package does not exist."""
    if path == "inferencer":
        expect_file(section.get("ckpt_dir"), f"{path}.ckpt_dir", "no such checkpoint directory")
        if not section.get("prompts"):
            expect_file(section.get("defaults", {}).get("prompt_file"), f"{path}.defaults.prompt_file")

    # only data sets of this package: the keys of other classes may mean anything
    part, path = section, f"{path}.params"
    while str(part.get("module")).startswith("selfe.data."):
        params = part.get("params") or {}
        expect_manifest(params.get("val_manifest"), f"{path}.val_manifest")

        # one manifest, or a list of several with weights
        train = params.get("train_manifest")
        if isinstance(train, list):
            for index, entry in enumerate(train):
                expect_manifest(entry["manifest"], f"{path}.train_manifest[{index}].manifest")
        else:
            expect_manifest(train, f"{path}.train_manifest")

        # the data set behind a feature cache
        part, path = params.get("source", {}), f"{path}.source.params"


def expect_manifest(value: str | None, path: str) -> None:
    """As `expect_file`; a manifest must not be a folder either."""
    if value and "://" in value:
        return  # in a store; opened when the run starts
    expect_file(value, path)
    if value and expand(value, path).is_dir() and not (expand(value, path) / SAVED).is_file():
        raise Problem(path, f"{value}: is a folder; a manifest is a file, selfe make-manifest makes one (docs/data.md)")


def expect_file(value: str | None, path: str, problem: str = "no such file") -> None:
    """Raise Problem if there is nothing at a path; patterns and values that are not set are not checked."""
    if value and not re.search(r"[*?\[{]", value) and not expand(value, path).exists():
        raise Problem(path, f"{value}: {problem}; relative paths start from {os.getcwd()}")


def check_weights(system: dict) -> None:
    """Raise Problem if a pretrained encoder of a training config has no weights to load."""
    for name in ("text_encoder", "autoencoder"):
        for path, part in pretrained_parts(system.get(name, {}), f"system.{name}"):
            params = part.get("params") or {}
            model = str(params.get("model", ""))  # a path or an installed model needs no cache folder
            has_folder = model.startswith((".", "~", "/")) or packaged.folder(model) is not None
            if not params.get("skip_pretrained") and not params.get("cache_dir") and not has_folder:
                raise Problem(
                    f"{path}.params.cache_dir",
                    "SELFE_CACHE_DIR is not set; set it to the directory of the weights, run "
                    f"scripts/cache_pretrained_only.sh{packaged.remedy(model)}, or set SELFE_SKIP_PRETRAINED=1 for "
                    "random weights",
                )


def pretrained_parts(part: dict, path: str) -> Iterator[tuple[str, dict]]:
    """The pretrained parts that a part at a key path loads, itself or those that it holds: (key path, part)."""
    if part.get("module") in PRETRAINED:
        yield path, part
    if part.get("module") in COMPOSED:
        for name, inner in (part.get("params") or {}).items():
            if isinstance(inner, dict):
                yield from pretrained_parts(inner, f"{path}.params.{name}")


def resolve(path: str | Path, overrides: Sequence[str] = ()) -> dict:
    """The merged and resolved settings of a file, not checked: nothing that they name is imported. Raises UserError."""
    return resolve_layers(read_layers(path, overrides))


def foreign_modules(tree: Any) -> list[str]:
    """The modules that settings name and that are not part of this package."""
    return [module for module in modules(tree) if not module.startswith("selfe.")]


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
        raise UserError(missing_section(section))
    try:
        return visit_root(section, settings[section], build=True)
    except Problem as problem:
        raise UserError(str(problem)) from problem


def build_part(part: dict, path: str) -> Any:
    """Build a part {module, params} of a config at a key path. Raises UserError."""
    try:
        return swap(part, object, path, build=True)
    except Problem as problem:
        raise UserError(str(problem)) from problem


def save(settings: dict, path: Path) -> None:
    """Write settings as a YAML file that loads to equal settings. The file is complete or not there."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(OmegaConf.to_yaml(OmegaConf.create(escape(plain(settings)))), encoding="utf-8")
    os.replace(partial, path)


def escape(value: Any) -> Any:
    r"""Settings in which `${` stands for itself: written as `\${`, with the backslashes before it doubled."""
    if isinstance(value, dict):
        return {key: escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [escape(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def plain(value: Any) -> Any:
    """Settings as YAML types: tuples become lists, paths become strings."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def missing_section(section: str) -> str:
    return f"{section}: this section is missing; add it, or name a base file that has it"


# ---- command line and files ----


def parse_command(path: str, rest: Sequence[str]) -> tuple[int | None, list[str]]:
    """CONFIG and [NGPUS] [key=value ...] -> number of processes, None for the default, and overrides.

    Raises UserError.
    """
    if Path(path).is_dir():
        raise UserError(f"{path}: is a folder; the first argument is a YAML file, see --help")
    if not Path(path).is_file():
        raise UserError(f"{path}: no such config file; the first argument is a YAML file, see --help")
    return parse_rest(rest)


def parse_rest(rest: Sequence[str]) -> tuple[int | None, list[str]]:
    """[NGPUS] [key=value ...] -> as `parse_command`."""
    rest, num_processes = list(rest), None

    # NGPUS is optional: the first argument without "="
    if rest and "=" not in rest[0]:
        if not rest[0].isdecimal() or int(rest[0]) < 1:
            raise UserError(f"NGPUS: {rest[0]!r} is not a number of at least 1; see --help")
        num_processes = int(rest.pop(0))
    if wrong := [argument for argument in rest if "=" not in argument]:
        raise UserError(f"{wrong[0]!r} is not key=value; see --help")
    return num_processes, rest


def read_layers(path: str | Path | None, overrides: Sequence[str]) -> list[tuple[str, dict]]:
    """(source, tree) of the base files, the file and the command line; later ones override earlier ones."""
    files = [] if path is None else read(Path(path), ())
    return [*files, *(("command line", parse_override(override)) for override in overrides)]


def resolve_layers(layers: list[tuple[str, dict]]) -> dict:
    """Merge layers and resolve `${...}`. Raises UserError that names the source and the key."""
    merged: dict = {}
    for _, tree in layers:
        merged = merge(merged, tree)
    try:
        return OmegaConf.to_container(OmegaConf.create(merged), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(unresolved(source(layers, error.full_key or ""), error)) from error


def unresolved(where: str, error: OmegaConfBaseException) -> str:
    """One line for an interpolation `${...}` that cannot be parsed or resolved."""
    reason = " ".join(str(error).split("full_key:")[0].split())
    return (
        f"{where}: {error.full_key}: {reason}; a literal ${{ is written \\${{"
        if error.full_key
        else f"{where}: {reason}"
    )


def read(path: Path, above: tuple[Path, ...]) -> list[tuple[str, dict]]:
    """(file name, tree) of a file and its bases, bases first. `above`: the files that lead here by `base:`."""
    named_by = f"{above[-1]}: base: " if above else ""
    if path.resolve() in [other.resolve() for other in above]:
        raise UserError(f"base: {' -> '.join(map(str, (*above, path)))} is a cycle; remove one of these base entries")
    if not path.is_file():
        raise UserError(f"{named_by}{path}: no such config file; base paths are relative to the file that names them")

    try:
        refuse_traps(yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader), str(path))
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except OmegaConfBaseException as error:
        raise UserError(unresolved(str(path), error)) from error
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
    key, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise UserError(f"command line: {override!r} is not key=value, such as trainer.lr=2e-4")
    try:
        refuse_traps(yaml.compose(value, Loader=yaml.SafeLoader), f"command line: {override!r}")
        return OmegaConf.to_container(OmegaConf.from_dotlist([override]), resolve=False)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"command line: {override!r}: {str(error).splitlines()[0]}") from error


# integers of YAML 1.1 that readers of YAML 1.2 and of Python take for something else
TRAPS = {r"[-+]?0[0-7_]+": "octal", r"[-+]?[0-9_]+(:[0-5]?[0-9])+(\.[0-9_]*)?": "base 60"}


def refuse_traps(node: yaml.Node | None, where: str) -> None:
    """Raise UserError for numbers such as 010 (8 in YAML 1.1) and 1:30 (90). Strings are written in quotes."""
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            for inner in pair:
                refuse_traps(inner, where)
    elif isinstance(node, yaml.SequenceNode):
        for inner in node.value:
            refuse_traps(inner, where)
    elif isinstance(node, yaml.ScalarNode) and node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
        for pattern, kind in TRAPS.items():
            if re.fullmatch(pattern, node.value):
                line = f", line {node.start_mark.line + 1}" if where.endswith((".yaml", ".yml")) else ""
                raise UserError(
                    f"{where}{line}: {node.value} would be read as a number in {kind}; write it in base 10, or in "
                    "quotes for a string"
                )


def merge(below: Any, above: Any) -> Any:
    """`above` over `below`; mappings merge by key unless they name another module."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    if "module" in above and above["module"] != below.get("module"):
        return above
    return below | {key: merge(below.get(key), value) for key, value in above.items()}


def source(layers: list[tuple[str, dict]], path: str) -> str:
    """The file that set a key path, or its longest prefix that any file set; the last file wins a tie."""
    lengths = [matched(tree, path) for _, tree in layers]
    longest = max(range(len(layers)), key=lambda i: (lengths[i], i))
    return layers[longest][0]


def matched(tree: Any, path: str) -> int:
    """The number of characters of a key path that the keys of a tree spell. A key may contain dots itself."""
    longest = 0
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if path == key or path.startswith((f"{key}.", f"{key}[")):
            longest = max(longest, len(str(key)) + matched(value, path[len(str(key)) :].removeprefix(".")))
    return longest


# ---- schema: one traversal that checks values and, if `build`, constructs objects ----


Find = Callable[[str], Any]  # the class of a dotted path, imported or read from its source


def visit_root(key: str, value: Any, build: bool, find: Find | None = None) -> Any:
    """A top-level section. Raises Problem, as do the functions below."""
    if key not in ROOT:
        if "." in str(key):
            raise Problem(key, "unknown section; keys with dots are for the command line, nest them in a file")
        raise Problem(key, f"unknown section{suggest_section(str(key))}")
    if key == "seed":
        seed = visit(value, int, key, build)
        if not 0 <= seed <= LARGEST_SEED:
            raise Problem(key, f"must be between 0 and {LARGEST_SEED}, got {seed}")
        return seed
    if key == "data":
        return swap(value, named(DATA, key, find), key, build)
    return call(named(SECTIONS[key], key, find), value, key, build)


def visit(value: Any, wanted: Any, path: str, build: bool) -> Any:
    """`value` as annotated by `wanted`: plain values are coerced, parts checked and, if `build`, constructed."""
    if wanted is Any:
        return value
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
    if is_dataclass(wanted) or (signatures.is_source_class(wanted) and wanted.is_dataclass()):
        return call(wanted, value, path, build)
    return swap(value, wanted, path, build)


def visit_union(value: Any, arms: tuple, path: str, build: bool) -> Any:
    """The first alternative of a union that `value` fits; otherwise the error of the closest one."""
    if value is None and types.NoneType in arms:
        return None
    if value == "" and Path in arms and types.NoneType in arms:
        return None  # such as an environment variable that is set to nothing
    if value in ("None", "none") and types.NoneType in arms:
        raise Problem(path, f"got the text {value!r}; the absent value is written null")
    arms = tuple(arm for arm in arms if arm is not types.NoneType)
    if len(arms) == 1:
        return visit(value, arms[0], path, build)

    # a path or a URL
    if {str, Path} <= set(arms) and isinstance(value, (str, Path)):
        return value if "://" in str(value) else expand(value, path)

    # exact type first, before types it can be coerced to
    problems = []
    for arm in sorted(arms, key=lambda arm: type(value) is not arm):
        try:
            return visit(value, arm, path, build)
        except Problem as problem:
            problems.append(problem)

    # the closest alternative is the one whose error is at the deepest key path
    deepest = max(problems, key=lambda problem: len(problem.path))
    if deepest.path != path:
        raise deepest

    # a section whose keys are right, but not its values together
    sections = [arm for arm in arms if is_dataclass(arm)]
    if isinstance(value, dict) and len(sections) == 1:
        raise problems[sorted(arms, key=lambda arm: type(value) is not arm).index(sections[0])]
    raise mismatch(value, arms, path)


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
    if wanted is Path and isinstance(value, (str, Path)):
        return expand(value, path)
    if type(value) is not wanted or (wanted is float and math.isnan(value)):
        raise mismatch(value, wanted, path)
    return value


def expand(value: str | Path, path: str) -> Path:
    """A path, with `~` and `~user` replaced by the home directory."""
    if not str(value):
        raise Problem(path, "expected a path, got an empty text")
    if "://" in str(value):
        raise Problem(path, "expected a path of this machine, got a URL; only data sets are read from stores")
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise Problem(path, f"{value}: {error}") from error


def swap(value: Any, wanted: Any, path: str, build: bool) -> Any:
    """A swappable part: {module: dotted.path.Class, params: {...}}, of a class that offers what `wanted` asks for."""
    if not isinstance(value, Mapping) or not isinstance(value.get("module"), str):
        raise Problem(path, f"expected a part {{module: dotted.path.Class, params: {{...}}}}, got {value!r}")
    for key in value:
        if key not in ("module", "params"):
            raise Problem(f"{path}.{key}", "unknown key; a part has the keys module and params")
    if signatures.is_source_class(wanted):
        kind = named(value["module"], f"{path}.module", signatures.find)
    else:
        kind = named(value["module"], f"{path}.module")
        expect_offers(kind, wanted, f"{path}.module")
    built = call(kind, value.get("params") or {}, f"{path}.params", build)
    if not build:
        return {"module": value["module"], "params": built}
    if typing_extensions.is_protocol(wanted):
        for name in sorted(typing_extensions.get_protocol_members(wanted)):
            if not hasattr(built, name):
                raise Problem(f"{path}.module", f"{value['module']} has no {name}, which a {wanted.__name__} needs")
    return built


def expect_offers(kind: Any, wanted: Any, path: str) -> None:
    """Raise Problem unless `kind` is a class with the methods of the protocol `wanted`, or a subclass of `wanted`.

    Other callables are refused, because a config must not be able to call any function of any module.
    """
    if not inspect.isclass(kind):
        raise Problem(path, f"{kind!r} is not a class")
    if not typing_extensions.is_protocol(wanted):
        if not issubclass(kind, wanted):
            raise Problem(path, f"{kind.__name__} is not a {wanted.__name__}")
        return

    defined = {name for base in kind.__mro__ if base is not object for name in vars(base)}
    methods = [name for name in typing_extensions.get_protocol_members(wanted) if callable(getattr(wanted, name, None))]
    if missing := sorted(set(methods) - defined):
        raise Problem(path, f"{kind.__name__} is not a {wanted.__name__}: it has no {', '.join(missing)}")


def call(target: Callable, values: Any, path: str, build: bool) -> Any:
    """Arguments of a constructor, checked against its signature; if `build`, the object."""
    if not isinstance(values, Mapping):
        raise Problem(path, f"expected a mapping of keys, got {values!r}")

    # unknown keys, then missing ones; ??? marks a value that another file has to set
    parameters = None if target is Any else signatures.of(target)
    if parameters is None:
        return values  # known after the import
    for key in values:
        if key not in parameters:
            hint = "; nest keys instead of writing dots" if "." in str(key) else suggest(key, list(parameters))
            if path.startswith("trainer.") and key in (signatures.of(signatures.find(SECTIONS["trainer"])) or ()):
                hint = f"; set trainer.{key}, which holds for every choice of this part"
            raise Problem(f"{path}.{key}", f"unknown key{hint}")
    given = {key: value for key, value in values.items() if value != "???"}
    for name, parameter in parameters.items():
        if parameter.required and name not in given:
            raise Problem(f"{path}.{name}", "missing; this key has no default, give it a value")

    arguments = {key: visit(value, parameters[key].type, f"{path}.{key}", build) for key, value in given.items()}
    if not build:
        return arguments
    try:
        return target(**arguments)
    except UserError:
        raise
    except ValueError as error:
        raise Problem(path, str(error)) from error


def named(dotted: str, path: str, find: Find | None = None) -> Any:
    """The class of a dotted path `package.module.Name`, by default by importing it."""
    try:
        return (find or imported)(dotted)
    except ImportError as error:
        package = dotted.partition(".")[0]
        remedy = f"; is the folder of {package} in PYTHONPATH?" if error.name == package else ""
        raise Problem(path, f"cannot import {dotted}: {error}{remedy}") from error
    except (AttributeError, ValueError) as error:
        hint = suggest_class(dotted) if isinstance(error, AttributeError) else ""
        raise Problem(path, f"{dotted!r} is not the dotted path of a class: {error}{hint}") from error


def imported(dotted: str) -> Any:
    """What a dotted path names. Raises ImportError, AttributeError or ValueError."""
    module, _, name = dotted.rpartition(".")
    return getattr(import_module(module), name)


def suggest_class(dotted: str) -> str:
    """The nearest name of a module that exists, to append to an error message."""
    module, _, name = dotted.rpartition(".")
    close = get_close_matches(name, signatures.names(module), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def suggest(key: Any, valid: list[str]) -> str:
    """The nearest valid key, or all of them, to append to an error message."""
    alias = ALIASES.get(str(key))
    close = [alias] if alias in valid else get_close_matches(str(key), valid, n=1)
    return f"; did you mean {close[0]}?" if close else f"; valid keys: {', '.join(valid)}"


def suggest_section(key: str) -> str:
    """As `suggest`, for the top level, where a key may belong to a section."""
    name = ALIASES.get(key, key)
    owners = [section for section in SECTIONS if name in (signatures.of(signatures.find(SECTIONS[section])) or ())]
    return f"; did you mean {owners[0]}.{name}?" if owners else suggest(key, list(ROOT))


def mismatch(value: Any, wanted: Any, path: str) -> Problem:
    kinds = wanted if isinstance(wanted, tuple) else (wanted,)
    names = (str(kind) if get_args(kind) else kind.__name__ for kind in kinds)
    return Problem(path, f"expected {' or '.join(names)}, got {type(value).__name__} {value!r}")
