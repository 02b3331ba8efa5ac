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


def describe(folder: Path, settings: dict, command: list[str], processes: int) -> None:
    """Write `config.yaml`, `packages.txt`, `changes.diff` and a line of `starts.jsonl`; print config changes.

    The first three describe the latest start and are overwritten; `starts.jsonl` keeps a line for every start.
    """
    # compare with the config of the previous start, if that start saved a checkpoint to resume from
    path = folder / "config.yaml"
    changed = []
    if path.is_file() and any(folder.glob("checkpoints/step_*")):
        compare.check_run(path, settings, settings["trainer"].get("allow_changes", ()), "trainer")
        changed = difference(yaml.safe_load(path.read_text(encoding="utf-8")), config.plain(settings))
        for line in changed:
            log.print_line(f"config differs from the run so far: {line}")

    config.save(settings, path)
    installed = sorted({f"{package.name}=={package.version}" for package in metadata.distributions()}, key=str.lower)
    (folder / "packages.txt").write_text("\n".join(installed) + "\n", encoding="utf-8")
    (folder / "changes.diff").write_text(git("diff", "HEAD") or "", encoding="utf-8")

    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command,
        "processes": processes,
        "revision": (git("rev-parse", "HEAD") or "").strip() or None,
        "python": platform.python_version(),
        "config_changes": changed,
    }
    with (folder / "starts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(start, ensure_ascii=False) + "\n")


def difference(before: dict, after: dict) -> list[str]:
    """`key: old -> new` for every key that differs; a missing key is `(none)`."""
    changed = compare.differences(compare.flat(before), compare.flat(after))
    return [f"{key}: {old} -> {new}" for key, (old, new) in changed.items()]


def git(*arguments: str) -> str | None:
    """Output of a git command in the repository of this code, None without git or a repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=CODE, capture_output=True, text=True, errors="replace")
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None
