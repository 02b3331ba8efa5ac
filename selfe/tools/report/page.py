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

SCRIPTS = ("core.js", "curves.js", "shares.js", "maps.js", "samples.js", "evaluations.js", "runs.js", "main.js")


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
    """The data of a page that is a file: sheets are embedded, of at most `most_sheets` evenly spaced steps of a run."""
    described = []
    for run in runs:
        table = sheet_totals(run)
        for weights, by_step in run.sheets.items():
            steps = list(by_step)
            kept = [steps[i] for i in sheets.evenly(len(steps), most_sheets)]
            table[weights] = [{"step": step} | sheets.embed(by_step[step][0]) for step in kept]
        described.append(run.describe() | {"sheets": table})
    return common(runs) | {"runs": described, "refresh_seconds": None}


def live(runs: Sequence[RunFolder], refresh_seconds: float) -> dict:
    """The data of a page that is served: sheets are addresses on the same server, complete files only."""
    described = []
    for index, run in enumerate(runs):
        table = sheet_totals(run)
        for weights, by_step in run.sheets.items():
            layouts = {step: sheets.layout_of_file(*file) for step, file in by_step.items()}
            table[weights] = [
                # another address when the file changes, for the browser's cache
                layout | {"step": step, "source": f"sheet/{index}/{weights}/{step}?{by_step[step][1]}"}
                for step, layout in layouts.items()
                if layout is not None
            ]
        described.append(run.describe() | {"sheets": table})
    return common(runs) | {"runs": described, "refresh_seconds": refresh_seconds}


def sheet_totals(run: RunFolder) -> dict:
    return {"totals": {weights: len(by_step) for weights, by_step in run.sheets.items()}}


def common(runs: Sequence[RunFolder]) -> dict:
    """What pages have besides the runs."""
    return {
        "made": time.time(),
        "version": [run.version for run in runs],
        "states": [run.state() for run in runs],
        "warnings": comparability.warnings(runs),
    }
