"""Records of a run in its output directory: config, code, packages, and what changed between starts."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

import yaml

from selfe import compare, config, log

CODE = Path(__file__).parents[2]
# what a start writes before anything is trained
RECORDS = ("config.yaml", "packages.txt", "changes.diff", "starts.jsonl", "init_from.txt")


def describe(folder: Path, settings: dict, command: list[str], processes: int) -> None:
    """Write `config.yaml`, `packages.txt`, `changes.diff` and a line of `starts.jsonl`; print config changes.

    The first three describe the latest start and are overwritten; `starts.jsonl` keeps a line for every start.
    """
    # compare with the config of the previous start
    path = folder / "config.yaml"
    changed = []
    if is_resumed(folder):
        changed = difference(yaml.safe_load(path.read_text(encoding="utf-8")), config.plain(settings))
        for line in changed:
            log.print_line(f"config differs from the run so far: {line}")

    config.save(settings, path)
    packages = (package.metadata for package in metadata.distributions())  # `metadata` reads a file at every access
    installed = sorted({f"{package['Name']}=={package['Version']}" for package in packages}, key=str.lower)
    (folder / "packages.txt").write_text("\n".join(installed) + "\n", encoding="utf-8")
    own = is_checkout(CODE)
    (folder / "changes.diff").write_text(git(CODE, "diff", "HEAD") or "" if own else "", encoding="utf-8")

    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command,
        "processes": processes,
        "version": metadata.version("selfe"),
        "revision": (git(CODE, "rev-parse", "HEAD") or "").strip() or None if own else None,
        "python": platform.python_version(),
        "config_changes": changed,
    }
    with (folder / "starts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(start, ensure_ascii=False) + "\n")


def check_system(folder: Path, settings: dict) -> None:
    """Raise UserError if a run would resume with a system that makes other images of the same weights.

    To be called before the checkpoint is loaded and before `describe` overwrites the `config.yaml` of the run so far.
    """
    if is_resumed(folder):
        compare.check_run(folder / "config.yaml", settings, settings["trainer"].get("allow_changes", ()), "trainer")


def is_resumed(folder: Path) -> bool:
    """Whether a previous start has left its config and a checkpoint to resume from."""
    return (folder / "config.yaml").is_file() and any(folder.glob("checkpoints/step_*"))


def difference(before: dict, after: dict) -> list[str]:
    """`key: old -> new` for every key that differs; a missing key is `(none)`."""
    changed = compare.differences(compare.flat(before), compare.flat(after))
    return [f"{key}: {old} -> {new}" for key, (old, new) in changed.items()]


def is_checkout(root: Path) -> bool:
    """Whether a folder is the root of a git checkout of this project.

    An installed package may lie in another project's repository, whose revision and changes are not ours to record.
    """
    top = (git(root, "rev-parse", "--show-toplevel") or "").rstrip("\n")
    tracked = git(root, "ls-files", "--error-unmatch", Path(__file__).relative_to(CODE).as_posix())
    return bool(top) and Path(top).resolve() == root.resolve() and tracked is not None


def git(root: Path, *arguments: str) -> str | None:
    """Output of a git command in a folder, None without git or a repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, errors="replace")
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None
