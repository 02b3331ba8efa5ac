"""Configuration: merging, typing and strictness, every mistake one line with file, key path and remedy."""

import types
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Literal, Union, get_args, get_origin

import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from selfe import config, signatures
from selfe.errors import UserError
from selfe.objectives.self_evaluation import SelfEvaluation
from selfe.samplers.renoise import Renoise

ROOT = Path(__file__).parents[2]
FRAGMENTS = ("short.yaml", "smooth.yaml")  # laid over other files
CONFIGS = [path for path in sorted(ROOT.glob("configs/*/*.yaml")) if path.name not in FRAGMENTS]
SMOKE = ROOT / "configs/debug/selfe_smoke.yaml"


@dataclass(frozen=True)
class Section:
    size: int = 3


class Part:
    """What a swappable part may ask for."""

    def __init__(
        self,
        needed: str,
        rate: float = 0.5,
        flag: bool = False,
        mode: Literal["a", "b"] = "a",
        pair: tuple[int, int] = (1, 2),
        many: tuple[float, ...] = (),
        maybe: int | None = None,
        either: str | list[str] = "x",
        table: dict[str, int] | None = None,
        section: Section = Section(),
    ):
        self.given = locals()

    def resolution(self, step): ...

    def costs(self, seed, step, samples, split): ...

    def batch(self, seed, step, samples, positions, split): ...

    has_val, multiple = False, 1


def write(folder: Path, **trees: dict) -> Path:
    for name, tree in trees.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return folder / f"{next(iter(trees))}.yaml"


def part(**params) -> dict:
    return {"data": {"module": "tests.training.test_config.Part", "params": {"needed": "yes"} | params}}


def error(path: Path, *overrides: str) -> str:
    """The message of a mistake; the check without imports says the same, or leaves it to the complete check."""
    with pytest.raises(UserError) as caught:
        config.load(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert message_without_imports(path, *overrides) in (message, "")
    return message


def message_without_imports(path: Path, *overrides: str) -> str:
    """What the check before the import of torch says; empty if it finds nothing."""
    try:
        config.check(path, overrides, (), files=False)
    except UserError as error:
        return str(error)
    return ""


# --- what is right


@pytest.mark.parametrize("value", [True, False, 1, 0, 8])
def test_of_two_types_it_is_the_one_that_it_has(value):
    settings = config.load(SMOKE, [f"trainer.gathering={{reshard_after_forward: {value}}}"])
    found = settings["trainer"]["gathering"]["reshard_after_forward"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_build_without_weights_or_cache(path, monkeypatch):
    monkeypatch.delenv("SELFE_CACHE_DIR", raising=False)
    sections = {"train": ("system", "data", "trainer"), "infer": ("system", "inferencer")}
    config.check(path, (), sections.get(path.parent.name, ("system",)), files=False)
    settings = config.load(path)
    with torch.device("meta"):
        system = config.build(settings, "system")
    assert system.backbone.image_in.weight.is_meta
    for section in {"trainer", "inferencer"} & settings.keys():
        config.build(settings, section)


def test_resolved_settings_load_to_the_same(tmp_path):
    settings = config.load(SMOKE, ["trainer.lr=1e-4"])
    config.save(settings, tmp_path / "config.yaml")
    assert config.load(tmp_path / "config.yaml") == settings


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.one_of(st.text(), st.from_regex(r"[\\${}:#~'\"\n a-z0-9.e+_-]*", fullmatch=True)))
@example(r"a sign that says ${price}")
@example(r"\${oc.env:HOME}")
@example("\\\\\\${x}")
@example("${")
@example("1e3")
@example("1:30")
@example("\u0085 \ufeff \u2028")
def test_every_text_is_saved_and_loaded_as_it_is(tmp_path, text):
    assume(text != "???")  # stands for a missing value
    path, again = tmp_path / "config.yaml", tmp_path / "again.yaml"
    config.save({"seed": 0} | part(needed=text, either=[text, text]), path)
    loaded = config.load(path)
    assert loaded["data"]["params"] == {"needed": text, "either": [text, text]}
    config.save(loaded, again)
    assert again.read_bytes() == path.read_bytes()


def test_later_files_and_then_the_command_line_win(tmp_path):
    path = write(
        tmp_path,
        top={"base": ["left.yaml", "right.yaml"], "data": {"params": {"rate": 3}}},
        left=part(rate=1, pair=[1, 1], maybe=1),
        right=part(rate=2, pair=[2, 2]),
    )
    params = config.load(path, ["data.params.maybe=7", "seed=5"])["data"]["params"]
    assert params == {"needed": "yes", "rate": 3.0, "pair": (2, 2), "maybe": 7}
    assert config.load(path, ["seed=5"])["seed"] == 5
    assert config.load(path)["seed"] == 0


def test_another_module_drops_the_params_of_the_one_it_replaces(tmp_path):
    path = write(
        tmp_path,
        top={"base": "below.yaml", "inferencer": {"defaults": {"sampler": {"module": "selfe.samplers.euler.Euler"}}}},
        below=yaml.safe_load((ROOT / "configs/infer/selfe.yaml").read_text()) | {"base": []},
    )
    sampler = config.load(path)["inferencer"]["defaults"]["sampler"]
    assert sampler == {"module": "selfe.samplers.euler.Euler", "params": {}}


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"rate": 2}, 2.0),
        ({"flag": 1}, True),
        ({"flag": False}, False),
        ({"mode": "b"}, "b"),
        ({"pair": [3, 4]}, (3, 4)),
        ({"many": [1, 2.5]}, (1.0, 2.5)),
        ({"maybe": None}, None),
        ({"either": ["p", "q"]}, ["p", "q"]),
        ({"table": {"k": 1}}, {"k": 1}),
        ({"section": {"size": 9}}, Section(9)),
    ],
)
def test_values_arrive_with_their_types(tmp_path, params, expected):
    given = config.build(config.load(write(tmp_path, top=part(**params))), "data").given
    (name,) = params
    assert given[name] == expected
    assert type(given[name]) is type(expected)


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("3", 3.0), (".inf", float("inf"))])
def test_numbers_are_numbers(tmp_path, text, value):
    path = tmp_path / "top.yaml"
    path.write_text(f"data: {{module: tests.training.test_config.Part, params: {{needed: a, rate: {text}}}}}")
    assert config.load(path)["data"]["params"]["rate"] == value
    assert config.load(path, [f"data.params.rate={text}"])["data"]["params"]["rate"] == value


def test_environment_is_read_through_the_file(tmp_path, monkeypatch):
    path = write(tmp_path, top=part(needed="${oc.env:SELFE_TEST_NAME}"))
    monkeypatch.setenv("SELFE_TEST_NAME", "from outside")
    assert config.load(path)["data"]["params"]["needed"] == "from outside"
    monkeypatch.delenv("SELFE_TEST_NAME")
    assert "SELFE_TEST_NAME" in error(path)


def test_ablations_of_table_2_are_overrides():
    path, key = ROOT / "configs/train/selfe_0.5b.yaml", "system.objective.params"

    def objective(*overrides: str) -> SelfEvaluation:
        settings = config.load(path, overrides)
        with torch.device("meta"):
            return config.build(settings, "system").objective

    paper = objective()
    assert (paper.batch_multiple, paper.auxiliary(300_000), paper.energy_preserving) == (2, False, True)
    assert objective(f"{key}.p_equal=1").eval_rows(8, 10) == []
    assert not objective(f"{key}.energy_preserving=false").energy_preserving
    assert objective(f"{key}.aux_start_step=0").auxiliary(1)


def classes_of(tree: object) -> set[str]:
    """The classes that settings name."""
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    own = {tree["module"]} if isinstance(tree, dict) and "module" in tree else set()
    return own.union(*map(classes_of, items))


SHIPPED = set(config.SECTIONS.values()).union(*(classes_of(config.resolve(path)) for path in CONFIGS))


@pytest.mark.parametrize("dotted", sorted(SHIPPED))
def test_signatures_read_from_source_are_those_of_the_imported_classes(dotted):
    """Keys, which of them are required, and types, down to those of sections within sections."""
    pairs = [(config.imported(dotted), signatures.find(dotted))]
    for actual, read in pairs:
        expected, parameters = signatures.of(actual), signatures.of(read)
        assert list(parameters) == list(expected)
        for name, parameter in parameters.items():
            assert parameter.required == expected[name].required, name
            assert described(parameter.type) == described(expected[name].type), name
            if is_dataclass(expected[name].type):
                pairs.append((expected[name].type, parameter.type))


OWN_CLASSES = """
from __future__ import annotations

import dataclasses
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar, Optional

import torch

from .sizes import Size, Sizes as Several

try:
    from fast import Number
except ImportError:
    Number = float

class Plain:
    def __init__(self, size: Size, *, several: "Several", maybe: Optional[int] = None, number: Number = 1, other=3): ...

class Child(Plain): ...

@dataclass
class Fields:
    count: ClassVar[int] = 0
    first: int
    _: KW_ONLY
    second: list[str] = field(default_factory=list)
    third: float = field(init=False)
    fourth: str = dataclasses.field(metadata={})

@dataclass
class MoreFields(Fields):
    fifth: bool = False

class Anything:
    def __init__(self, **options): ...

class Net(torch.nn.Module): ...

class Both(Plain, Fields): ...

class Meta(metaclass=type):
    def __init__(self, size: int): ...

def decorated(kind): return kind

@decorated
class Decorated:
    def __init__(self, size: int): ...
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Plain", "size: Size! several: tuple[Size, ...]! maybe: int | None number: Any other: Any"),
        ("Child", "size: Size! several: tuple[Size, ...]! maybe: int | None number: Any other: Any"),
        ("Fields", "first: int! second: list[str] fourth: str!"),
        ("MoreFields", "first: int! second: list[str] fourth: str! fifth: bool"),
        *((name, None) for name in ("Anything", "Net", "Both", "Meta", "Decorated")),
    ],
)
def test_what_source_does_not_tell_is_left_to_the_import(tmp_path, monkeypatch, name, expected):
    """`!`: required. None: any arguments may be right."""
    package = tmp_path / "own_classes"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "parts.py").write_text(OWN_CLASSES)
    (package / "sizes.py").write_text("class Size: ...\nSizes = tuple[Size, ...]\n")
    monkeypatch.chdir(tmp_path)
    signatures.module.cache_clear()

    parameters = signatures.of(signatures.find(f"own_classes.parts.{name}"))
    if expected is None:
        assert parameters is None
    else:
        texts = (f"{key}: {readable(p.type)}{'!' if p.required else ''}" for key, p in parameters.items())
        assert " ".join(texts) == expected


def readable(kind: object) -> str:
    text = kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
    text = "int | None" if text == "typing.Optional[int]" else text
    return text.replace("own_classes.sizes.", "").replace("typing.", "")


def described(kind: object) -> str:
    """A type as text, the same for a class and for what was read from its source."""
    if get_args(kind) and get_origin(kind) is not Literal:
        origin = "Union" if get_origin(kind) in (Union, types.UnionType) else get_origin(kind).__name__
        return f"{origin}[{', '.join(map(described, get_args(kind)))}]"
    return kind.__name__ if isinstance(kind, type) else str(kind)


# --- what is wrong


def test_unknown_keys_name_their_nearest(tmp_path):
    path = write(tmp_path, top=part(section={"sise": 3}), other=part(rat=3))
    assert error(path) == f"{path}: data.params.section.sise: unknown key; did you mean size?"
    assert "data.params.rat: unknown key; did you mean rate?" in error(tmp_path / "other.yaml")
    assert "command line: trainer.max_stepz: unknown key; did you mean max_steps?" in error(
        SMOKE, "trainer.max_stepz=3"
    )
    assert "trainerr: unknown section; did you mean trainer?" in error(SMOKE, "trainerr.lr=1")
    assert "valid keys: needed, rate" in error(write(tmp_path, top=part(zzz=1)))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"needed": 3}, "data.params.needed: expected str, got int 3"),
        ({"rate": "fast"}, "data.params.rate: expected float, got str 'fast'"),
        ({"rate": float("nan")}, "data.params.rate: expected float, got float nan"),
        ({"rate": True}, "data.params.rate: expected float, got bool True"),
        ({"flag": "yes"}, "data.params.flag: expected bool, got str 'yes'"),
        ({"flag": 2}, "data.params.flag: expected bool, got int 2"),
        ({"maybe": 1.5}, "data.params.maybe: expected int, got float 1.5"),
        ({"mode": "c"}, "data.params.mode: expected one of 'a', 'b', got 'c'"),
        ({"pair": [1]}, "data.params.pair: expected 2 values, got 1: [1]"),
        ({"pair": 1}, "data.params.pair: expected tuple[int, int], got int 1"),
        ({"many": [1, "x"]}, "data.params.many[1]: expected float, got str 'x'"),
        ({"either": 3}, "data.params.either: expected str or list[str], got int 3"),
        ({"table": {"k": "v"}}, "data.params.table.k: expected int, got str 'v'"),
        ({"section": 3}, "data.params.section: expected a mapping of keys, got 3"),
        ({"section": {"size": "big"}}, "data.params.section.size: expected int, got str 'big'"),
    ],
)
def test_wrong_types_are_named(tmp_path, params, message):
    path = write(tmp_path, top=part(**params))
    assert error(path) == f"{path}: {message}"


@pytest.mark.parametrize("text", ["010", "-017", "1:30", "1:30.5", "[1, 010]", "{a: 1:30}"])
def test_numbers_in_octal_and_base_60_are_refused(tmp_path, text):
    path = tmp_path / "top.yaml"
    path.write_text(f"data:\n  module: tests.training.test_config.Part\n  params: {{needed: a, many: {text}}}")
    assert f"{path}, line 3: " in error(path)
    assert "write it in base 10, or in quotes" in error(path)
    assert "write it in base 10, or in quotes" in error(SMOKE, f"trainer.max_steps={text}")
    path.write_text(path.read_text().replace(text, "[0, 0.5, 1_000, 0x10]").replace("needed: a", "needed: '010'"))
    assert config.load(path)["data"]["params"] == {"needed": "010", "many": (0, 0.5, 1000, 16)}


def test_the_text_none_is_not_null(tmp_path):
    message = "trainer.init_from: got the text 'None'; the absent value is written null"
    assert message in error(SMOKE, "trainer.init_from=None")
    assert config.load(SMOKE, ["trainer.init_from=null"])["trainer"]["init_from"] is None
    assert config.load(write(tmp_path, top=part(needed="None")))["data"]["params"]["needed"] == "None"


def test_a_key_with_dots_is_blamed_on_the_file_that_has_it(tmp_path):
    base = str(SMOKE)
    path = write(tmp_path, top={"base": base, "trainer.lr": 1e-3})
    assert error(path) == (
        f"{path}: trainer.lr: unknown section; keys with dots are for the command line, nest them in a file"
    )
    path = write(tmp_path, top={"base": base, "trainer": {"samples.every": 3}})
    assert error(path) == f"{path}: trainer.samples.every: unknown key; nest keys instead of writing dots"


def test_missing_values_are_named(tmp_path):
    path = write(tmp_path, top={"data": {"module": "tests.training.test_config.Part", "params": {}}})
    assert "data.params.needed: missing" in error(path)
    assert "data.params.needed: missing" in error(write(tmp_path, top=part(needed="???")))
    with pytest.raises(UserError, match=r"trainer: this section is missing"):
        config.build(config.load(write(tmp_path, top=part())), "trainer")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("selfe.nowhere.Thing", "cannot import selfe.nowhere.Thing"),
        ("selfe.flow.Thing", "'selfe.flow.Thing' is not the dotted path of a class"),
        ("Thing", "'Thing' is not the dotted path of a class"),
        ("os.system", "data.module: <built-in function system> is not a class"),
        ("selfe.launch.start", "is not a class"),
        ("pathlib.Path", "data.module: Path is not a Data: it has no batch, costs, resolution"),
        ("selfe.samplers.euler.Euler", "Euler is not a Data"),
        (None, "expected a part {module: dotted.path.Class, params: {...}}"),
    ],
)
def test_modules_that_cannot_be_had(tmp_path, module, message):
    path = write(tmp_path, top={"data": {"module": module}})
    assert message in error(path)
    assert str(path) in error(path)


def test_a_module_that_fails_to_import_is_one_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fails.py").write_text("import nothing_of_this_name\n\nclass Thing: ...")
    path = write(tmp_path, top={"data": {"module": "fails.Thing"}})
    assert "data.module: cannot import fails.Thing: No module named 'nothing_of_this_name'" in error(path)


def test_base_files(tmp_path):
    write(tmp_path, a={"base": "b.yaml"}, b={"base": ["c.yaml"]}, c={"base": "a.yaml"}, lost={"base": "nowhere.yaml"})
    assert "is a cycle" in error(tmp_path / "a.yaml")
    assert "lost.yaml: base:" in error(tmp_path / "lost.yaml")
    assert "nowhere.yaml: no such config file" in error(tmp_path / "lost.yaml")
    assert "no such config file" in error(tmp_path / "nothing.yaml")
    assert "give a file name or a list of file names" in error(write(tmp_path, odd={"base": 3}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"data: [1, 2", "line 1: not valid YAML"),
        (b"data: {a: 1}\n  b: 2", "line 2: not valid YAML"),
        (b"- 1\n- 2", "must be a mapping of sections"),
        (b"data: \xff\xfe", "not a YAML file in UTF-8"),
        (b"seed: ${nowhere}", "nowhere"),
        (b"trainer:\n  output_dir: runs/${", "trainer.output_dir: "),
        (b"trainer: {output_dir: 'runs/${'}", r"trainer.output_dir: "),
    ],
)
def test_files_that_are_no_configuration(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    assert message in error(path)
    assert str(path) in error(path)


@pytest.mark.parametrize("override", ["trainer", "=3", "trainer.lr = 3", "trainer..lr=3", "trainer.betas=[1"])
def test_overrides_that_are_none(override):
    assert error(SMOKE, override).startswith(f"command line: {override!r}")


def test_a_value_the_constructor_refuses_is_named(tmp_path):
    sampler = {"module": "selfe.samplers.renoise.Renoise", "params": {"eta": 2}}
    path = write(tmp_path, top={"inferencer": {"ckpt_dir": "a", "output_dir": "b", "defaults": {"sampler": sampler}}})
    with pytest.raises(UserError, match=r"inferencer.defaults.sampler.params: eta must be between 0 and 1, got 2.0"):
        config.build(config.load(path), "inferencer")
    assert Renoise(1.0).eta == 1


def test_a_config_beside_weights_may_name_parts_of_this_package_only(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "hostile.py").write_text("raise SystemExit('imported')")
    assert config.load(SMOKE, trust=False) == config.load(SMOKE)
    for path, tree in {
        "system": {"system": {"backbone": {"module": "hostile.Net"}}},
        "nested": {"inferencer": {"defaults": {"sampler": {"module": "hostile.Sampler"}}}},
        "listed": {"trainer": {"samples": [{"module": "hostile.Sampler"}]}},
    }.items():
        with pytest.raises(UserError, match=r"names hostile\.\w+, which is not part of selfe.*--trust"):
            config.load(write(tmp_path, **{path: tree}), trust=False)
