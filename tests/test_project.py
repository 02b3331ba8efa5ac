"""The house itself: layers, one home for each thing that differs, and no tracked file that holds what it must not."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "selfe"
LAYERS = {
    room: layer
    for layer, rooms in {
        0: "device",
        0.1: "types attention",
        0.2: "draws weights images buckets index cache",
        0.3: "flow order",
        0.4: "feed",
        1: "backbones encoders objectives samplers data",
        2: "system",
        3: "config blocks dist ema checkpoint draft saving loading flux_format log sinks folder pictures sheets "
        "prompts jobs gallery signals watch health clock observe",
        4: "launch",
        5: "train infer",
    }.items()
    for room in rooms.split()
}
FOLDERS = {room.name for room in PACKAGE.iterdir() if room.is_dir() and room.name != "__pycache__"}
FILES = sorted(PACKAGE.rglob("*.py"))


def tracked() -> list[Path]:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in names.split("\0") if name]


def texts() -> dict[str, str]:
    found = {}
    for path in tracked():
        try:
            found[str(path.relative_to(ROOT))] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Modules that a file imports when it runs, `from a import b` as a.b; imports for type checkers are left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    """A room imports lower layers; within a folder only what the same part needs."""
    if path.name == "__init__.py":
        return
    mine = room(path)
    for name in imports(path):
        if not name.startswith("selfe."):
            continue
        other = name.split(".")[1]
        assert other in LAYERS, f"{other} has no layer yet"
        if other == mine:
            continue
        below = LAYERS[other] < LAYERS[mine] or (LAYERS[other] == LAYERS[mine] == 3)
        assert below, f"{mine} (layer {LAYERS[mine]}) imports {other} (layer {LAYERS[other]})"


def test_rooms_of_layer_one_are_one_level_deep():
    for folder in FOLDERS:
        assert not [inner for inner in (PACKAGE / folder).iterdir() if inner.is_dir() and inner.name != "__pycache__"]


def test_one_home_for_each_thing_that_differs():
    """Device and backend choice, the process group and the environment have one place each."""
    homes = {
        r"torch\.distributed": {"dist", "checkpoint", "draft", "launch"},
        r"os\.environ": {"dist", "launch"},
        r"\bcuda\b": set(),
        r"\bnccl\b": set(),
        r"torch\.accelerator": {"device"},
    }
    for pattern, allowed in homes.items():
        found = {room(path) for path in FILES if re.search(pattern, path.read_text())}
        assert found <= allowed, f"{pattern} stands in {found - allowed}"


def test_rooms_fit_on_a_few_screens():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: n for name, n in lengths.items() if n > 340} == {}


def test_no_address_of_a_package_registry():
    """uv.lock included: it holds names and versions only (`scripts/strip_lock.py`)."""
    hosts = re.compile(
        r"https?://[^\s\"']*(?:/simple\b|/packages/[0-9a-f]{2}/)|python[h]osted|\bpyp[i]\.[a-z]", re.IGNORECASE
    )
    assert hosts.search("https://any.host" + "/simple")
    found = {name: hosts.search(text).group() for name, text in texts().items() if hosts.search(text)}
    committed = subprocess.run(["git", "show", ":uv.lock"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found.pop("uv.lock", None)  # the file on disk may be uv's own; what counts is what git holds of it
    assert found == {}
    assert not hosts.search(committed)
    assert len(re.findall(r"^version = ", committed, re.MULTILINE)) > 50


def test_nothing_unsafe():
    """No pickle, no swallowed errors, no assert for input in the package's public doors."""
    patterns = r"weights_only\s*=\s*False|\bpickle\b|except\s*:|except (Base)?Exception:\s*(pass)?$|verify\s*=\s*False"
    for path in FILES:
        lines = [line for line in path.read_text().splitlines() if re.search(patterns, line)]
        allowed = ["    except Exception:"] if path.name == "launch.py" else []  # told, not swallowed
        assert lines == allowed, f"{path}: {lines}"


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
    for config in re.findall(r"(?:run|infer)\.sh (configs/\S+\.yaml)", text):
        assert (ROOT / config).is_file(), f"README: {config}"
    (command,) = re.findall(r"^exec (\S+)$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert f"\n{command}\n" in text, "CI runs another command than the README names"
