"""The repository: imports between folders, one place for each kind of access, and what no tracked file may contain."""

import ast
import importlib.util
import inspect
import re
import runpy
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

from selfe import config, protocols
from selfe.data.dataset import BucketedDataset
from selfe.errors import UserError
from selfe.objectives.flow_map import FlowMap

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "selfe"
# which folders and files of selfe/ a folder may import from, besides itself
BASE = {"balance", "types", "protocols", "flow", "rng", "device", "errors", "log", "packaged", "signals"}
PARTS = BASE | {"io"}
EDGES = {
    "balance": set(),
    "device": set(),
    "errors": set(),
    "log": set(),
    "signals": set(),
    "packaged": set(),
    "signatures": set(),
    "types": {"device", "errors"},
    "rng": {"device", "types"},
    "protocols": {"rng", "types"},
    "flow": {"device", "rng", "types"},
    "config": {"errors", "packaged", "signatures"},
    "compare": {"config", "errors"},
    "io": BASE | {"compare"},  # the fingerprint of a feature cache
    "backbones": PARTS,
    "encoders": PARTS,
    "objectives": PARTS,
    "samplers": PARTS,
    "optimizers": PARTS | {"distributed"},  # matrices that are updated as a whole are gathered
    "system": PARTS | {"samplers"},  # guidance
    "distributed": BASE | {"backbones"},  # the attention kernels that selective checkpointing keeps
    "data": PARTS | {"compare", "distributed"},  # a loader reads what its rank trains on
    # FLUX files hold a denoiser and a VAE; the checkpoint of an adapter holds the low-rank matrices of a denoiser
    "checkpoint": PARTS | {"backbones", "distributed", "encoders"},
    "training": PARTS
    | {"backbones", "checkpoint", "compare", "config", "data", "distributed", "optimizers", "samplers", "system"}
    | {"evaluation", "inference"},  # evaluation during training
    "inference": PARTS | {"compare", "config", "samplers"},
    # reads manifests and shards, and checks pretrained models
    "evaluation": PARTS | {"config", "data", "distributed", "encoders"},
    # prompts and files of official scorers, whose results are evaluations; a detector is an extractor
    "benchmarks": PARTS | {"encoders", "evaluation"},  # a detector is read as encoders are
    "gallery": {"config", "errors", "inference", "io", "types"},
    "launch": BASE | {"config", "distributed"},  # the failure of one process is published for the others
    "recorded_run": {"compare", "config"},
    "generator": PARTS | {"checkpoint", "compare", "config", "encoders", "inference", "recorded_run", "system"},
    "cli": {"errors"},
    "__main__": {"cli"},
    "__init__": set(),
}
EDGES["train"] = set(EDGES) - {"cli", "inference", "gallery"}
EDGES["infer"] = set(EDGES) - {"cli", "train", "training"}
EDGES["evaluate"] = set(EDGES) - {"cli", "train", "training"}
EDGES["tune_sampler"] = set(EDGES) - {"cli", "train"}
EDGES["tools"] = set(EDGES) - {"cli"}
FILES = sorted(PACKAGE.rglob("*.py"))
ABSTRACT = BucketedDataset, FlowMap  # what parts have in common


def tracked() -> list[Path]:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in names.split("\0") if name]


def texts() -> dict[str, str]:
    contents = {}
    for path in tracked():
        try:
            contents[str(path.relative_to(ROOT))] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # an image
    return contents


def folder_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Modules that a file imports when it runs, `from a import b` as a.b; imports for type checkers are left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_table(path):
    mine = folder_of(path)
    others = {name.split(".")[1] for name in imports(path) if name.startswith("selfe.")} - {mine}
    assert others <= EDGES[mine], f"{mine} may not import {sorted(others - EDGES[mine])}; see EDGES"


def test_the_table_and_the_modules_have_no_circle():
    """Of single modules, so that files of one folder have no circle either."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
    edges = {}
    for name, path in modules.items():
        imported = imports(path) | {name.rpartition(".")[0] for name in imports(path)}
        edges[name] = imported & set(modules) - {name, "selfe"}
    tuple(TopologicalSorter(edges).static_order())  # raises CycleError
    tuple(TopologicalSorter(EDGES).static_order())


def test_folders_are_one_level_deep():
    """Except for a verb of `tools/`, which may be a folder."""
    for folder in PACKAGE.iterdir():
        if folder.is_dir() and folder.name not in ("tools", "__pycache__"):
            assert not [inner for inner in folder.iterdir() if inner.is_dir() and inner.name != "__pycache__"]


def test_one_home_for_each_thing_that_differs():
    """Device and backend choice, the process group and the environment have one place each."""
    homes = {
        r"torch\.distributed": {"distributed", "checkpoint", "launch", "tools"},
        r"os\.environ": {"distributed", "launch", "tools", "cli", "recorded_run"},
        r"\bcuda\b": {"tools"},
        r"\bnccl\b": {"tools"},
        r"torch\.accelerator": {"device"},
    }
    for pattern, allowed in homes.items():
        folders = {folder_of(path) for path in FILES if re.search(pattern, path.read_text())}
        assert folders <= allowed, f"{pattern} occurs in {folders - allowed}"


def test_no_address_of_a_package_registry():
    """uv.lock included: it holds names and versions only (`scripts/strip_lock.py`)."""
    hosts = re.compile(
        r"https?://[^\s\"']*(?:/simple\b|/packages/[0-9a-f]{2}/)|python[h]osted|\bpyp[i]\.[a-z]", re.IGNORECASE
    )
    assert hosts.search("https://any.host" + "/simple")
    addresses = {name: hosts.search(text).group() for name, text in texts().items() if hosts.search(text)}
    committed = subprocess.run(["git", "show", ":uv.lock"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    addresses.pop("uv.lock", None)  # the file on disk may be uv's own; what counts is what git holds of it
    assert addresses == {}
    assert not hosts.search(committed)
    assert len(re.findall(r"^version = ", committed, re.MULTILINE)) > 50


def test_nothing_unsafe():
    """No pickle, no swallowed errors, no assert for input in the package's public doors."""
    patterns = r"weights_only\s*=\s*False|\bpickle\b|except\s*:|except (Base)?Exception:\s*(pass)?$|verify\s*=\s*False"
    for path in FILES:
        lines = [line for line in path.read_text().splitlines() if re.search(patterns, line)]
        assert lines == [], f"{path}: {lines}"


def test_lock_is_stripped_of_everything_but_versions():
    lock = (
        'version = 1\n\n[[package]]\nname = "a"\nversion = "1"\nsource = { registry = "https://host/index" }\n'
        'sdist = { url = "https://host/a.tar.gz" }\nwheels = [\n    { url = "https://host/a.whl" },\n]\n\n'
        '[package.metadata]\nrequires-dist = [{ name = "b" }]\n\n[[package]]\nname = "b"\nversion = "2"\n'
    )
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/strip_lock.py"], input=lock, capture_output=True, text=True, check=True
    )
    assert done.stdout == (
        'version = 1\n\n[[package]]\nname = "a"\nversion = "1"\nsource = { registry = "default" }\n\n'
        '[[package]]\nname = "b"\nversion = "2"\n'
    )


def test_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "9. Accepting Warranty or Additional Liability" in text
    assert "APPENDIX: How to apply the Apache License to your work." in text


def test_readme_names_only_what_exists():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"`((?:configs|scripts|selfe|tests|docs|debug_data)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), f"README: {name}"
    for command in re.findall(r"(\./[\w/]+\.sh)", text):
        assert (ROOT / command).stat().st_mode & 0o111, f"README: {command} cannot be run"
    for path in re.findall(r"(?:run|infer)\.sh (configs/\S+\.yaml)", text):
        assert (ROOT / path).is_file(), f"README: {path}"
    (command,) = re.findall(r"^exec (\S+)$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert f"\n{command}\n" in text, "CI runs another command than the README names"


@pytest.mark.parametrize("script", ["plot_growth.py", "tables.py"])
def test_scripts_that_plot_are_imported_without_matplotlib(script, monkeypatch):
    """So that --help works; the missing package is reported by the first plot."""
    path = ROOT / "scripts/studies" / script
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"matplotlib is not installed; run scripts/setup\.sh --dev"):
        runpy.run_path(str(path), run_name="imported")["pyplot"]()


def test_the_key_reference_is_current_and_has_every_shipped_part():
    """If this fails, run scripts/make_keys.py."""
    spec = importlib.util.spec_from_file_location("make_keys", ROOT / "scripts/make_keys.py")
    make_keys = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_keys)
    text = make_keys.page()
    assert (ROOT / "docs/keys.md").read_text() == text, "docs/keys.md is not current; run scripts/make_keys.py"

    offered = {"backbones": "Backbone", "encoders": "TextEncoder", "objectives": "Objective", "samplers": "Sampler"}
    offered = {folder: [getattr(protocols, name)] for folder, name in offered.items()} | {"data": [protocols.Data]}
    offered["encoders"].append(protocols.Autoencoder)
    for path in FILES:
        if folder_of(path) not in offered:
            continue
        module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for name, kind in vars(module).items():
            if not inspect.isclass(kind) or kind.__module__ != module.__name__ or kind in ABSTRACT:
                continue
            if any(offers(kind, protocol) for protocol in offered[folder_of(path)]):
                assert f"`{module.__name__}.{name}`" in text, f"{module.__name__}.{name} is not in make_keys.PARTS"


def offers(kind: type, protocol: type) -> bool:
    try:
        config.expect_offers(kind, protocol, "")
    except config.Problem:
        return False
    return True
