"""The page: data of runs, style, charting library and scripts in one HTML file."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Sequence
from importlib.resources import files

from selfe.tools.report import comparability, sheets
from selfe.tools.report.run_folder import RunFolder

SCRIPTS = ("core.js", "curves.js", "shares.js", "maps.js", "samples.js", "runs.js", "main.js")


def page(data: dict) -> str:
    """The HTML file with its data.

    Characters that could end the JSON element are escaped, and the Content Security Policy allows only the scripts of
    this package.
    """
    folder = files("selfe.tools.report")
    library = (folder / "vendor" / "plotly-cartesian.min.js").read_text(encoding="utf-8")
    code = "\n".join((folder / "page" / name).read_text(encoding="utf-8") for name in SCRIPTS)

    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")

    parts = {
        "hashes": f"'{digest(library)}' '{digest(code)}'",
        "style": (folder / "page" / "style.css").read_text(encoding="utf-8"),
        "data": text,
        "library": library,
        "code": code,
    }
    template = (folder / "page" / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def digest(script: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def static(runs: Sequence[RunFolder], most_sheets: int) -> dict:
    """The data of a page that is a file: sheets are embedded, at most `most_sheets` steps of every run."""
    described = []
    for run in runs:
        embedded = {weights: embedded_sheets(run, weights, most_sheets) for weights in sheets.FOLDERS}
        described.append(run.describe() | {"sheets": sheet_table(run, embedded)})
    return everything(runs, described) | {"refresh_seconds": None}


def live(runs: Sequence[RunFolder], refresh_seconds: float) -> dict:
    """The data of a page that is served: sheets are addresses on the same server."""
    described = []
    for index, run in enumerate(runs):
        layout = sheets.Layout(run.settings)
        listed = {
            weights: [
                {"step": step, "source": f"sheet/{index}/{weights}/{step}", "size": [layout.width, layout.height]}
                for step in run.sheet_paths[weights]
            ]
            for weights in sheets.FOLDERS
        }
        described.append(run.describe() | {"sheets": sheet_table(run, listed)})
    return everything(runs, described) | {"refresh_seconds": refresh_seconds}


def everything(runs: Sequence[RunFolder], described: list[dict]) -> dict:
    return {
        "made": time.time(),
        "version": [run.version for run in runs],
        "runs": described,
        "states": [run.state() for run in runs],
        "warnings": comparability.warnings(runs),
    }


def embedded_sheets(run: RunFolder, weights: str, most: int) -> list[dict]:
    """Evenly spaced sheets of a run, as data URLs."""
    layout, paths = sheets.Layout(run.settings), run.sheet_paths[weights]
    steps = list(paths)
    return [{"step": steps[i]} | sheets.embed(paths[steps[i]], layout) for i in sheets.evenly(len(steps), most)]


def sheet_table(run: RunFolder, listed: dict[str, list[dict]]) -> dict:
    """The sheets of a run with their rows and columns."""
    layout = sheets.Layout(run.settings)
    return {
        "prompts": layout.prompts,
        "num_steps": layout.num_steps,
        "gap": sheets.GAP,
        "totals": {weights: len(paths) for weights, paths in run.sheet_paths.items()},
        **listed,
    }
