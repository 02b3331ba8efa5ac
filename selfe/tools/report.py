"""The verb `selfe report`: compare runs on one page.

Writes one self-contained HTML file: a curve per metric, the newest heat maps over (t, s), and sample grids.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import math
from pathlib import Path

import torch
from PIL import Image

from selfe.io import image_encode
from selfe.types import UserError

COLOURS = ("#1f6fb4", "#d9541e", "#2f9e44", "#9c36b5", "#c2255c", "#5f6b7a", "#b08900", "#0b7285")
# shown first; the others follow in alphabetical order
FIRST = ("train/loss", "val_plain/loss", "val/loss", "val_ema/loss", "train/grad_norm", "train/lr")
WIDTH, HEIGHT, LEFT, BELOW = 420, 240, 62, 26
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Self-E runs</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2em; color: #222 }}
h2 {{ margin-top: 2em }} figure {{ display: inline-block; margin: 0 1.5em 1.5em 0; vertical-align: top }}
figcaption {{ font-weight: 600 }} svg text {{ font-size: 11px; fill: #555 }} table {{ border-collapse: collapse }}
td, th {{ text-align: left; padding: .2em 1em .2em 0; vertical-align: top }} img {{ max-width: 100% }}
.key {{ display: inline-block; width: 1em; height: .6em; margin-right: .4em }}
</style>
<h1>Self-E runs</h1>{body}</html>
"""


def main(options: argparse.Namespace) -> None:
    """Entry point of `selfe report`."""
    metrics = {run: read(run / "metrics.jsonl") for run in options.runs}
    for run, lines in metrics.items():
        if not lines:
            raise UserError(f"{run}: no metrics.jsonl, or an empty one; pass run folders (trainer.output_dir)")

    parts = [summary(metrics), curves(metrics)] + [part(run) for run in metrics for part in (heat_maps, samples)]
    options.out.write_text(PAGE.format(body="\n".join(parts)), encoding="utf-8")
    print(f"{options.out}: {len(metrics)} runs")


def read(path: Path) -> list[dict]:
    """The complete lines of a JSON-lines file; the last line of a running job may be partial and is dropped."""
    if not path.is_file():
        return []
    *complete, _ = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in complete]


def summary(metrics: dict[Path, list[dict]]) -> str:
    """A table with a row per run: colour, steps, last loss, revision and command."""
    rows = []
    for number, (run, lines) in enumerate(metrics.items()):
        start = (read(run / "starts.jsonl") or [{}])[-1]
        losses = [line["train/loss"] for line in lines if "train/loss" in line]

        cells = [
            f'<span class="key" style="background:{colour(number)}"></span>{html.escape(str(run))}',
            str(lines[-1]["step"]),
            f"{losses[-1]:.4f}" if losses else "",
            html.escape((start.get("revision") or "")[:10]),
            html.escape(" ".join(start.get("command", []))),
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")

    head = "".join(f"<th>{name}</th>" for name in ("run", "steps", "last loss", "revision", "command"))
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def curves(metrics: dict[Path, list[dict]]) -> str:
    """A plot per metric with a line per run."""
    names = sorted({name for lines in metrics.values() for line in lines for name in line} - {"step", "time"})
    names = [name for name in FIRST if name in names] + [name for name in names if name not in FIRST]
    return "<h2>Curves</h2>" + "".join(
        plot(name, [[(line["step"], line[name]) for line in lines if name in line] for lines in metrics.values()])
        for name in names
    )


def plot(name: str, runs: list[list[tuple[int, float]]]) -> str:
    """One metric over steps as SVG; non-finite values are omitted."""
    runs = [[(step, value) for step, value in points if math.isfinite(value)] for points in runs]
    flat = [point for points in runs for point in points]
    if not flat:
        return ""

    # axis ranges over all runs
    (x0, x1), (y0, y1) = ((min(axis), max(axis)) for axis in zip(*flat, strict=True))
    wide, high = max(x1 - x0, 1), (y1 - y0) or abs(y1) or 1

    def place(step: int, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - 8) * (step - x0) / wide
        return f"{x:.1f},{8 + (HEIGHT - BELOW - 8) * (1 - (value - y0) / high):.1f}"

    lines = "".join(
        f'<polyline fill="none" stroke="{colour(number)}" stroke-width="1.5" '
        f'points="{" ".join(place(*point) for point in thin(points))}"/>'
        for number, points in enumerate(runs)
        if points
    )
    labels = (
        f'<text x="{LEFT - 6}" y="16" text-anchor="end">{y1:.4g}</text>'
        f'<text x="{LEFT - 6}" y="{HEIGHT - BELOW}" text-anchor="end">{y0:.4g}</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 8}">{x0}</text>'
        f'<text x="{WIDTH - 8}" y="{HEIGHT - 8}" text-anchor="end">step {x1}</text>'
    )
    frame = (
        f'<rect x="{LEFT}" y="8" width="{WIDTH - LEFT - 8}" height="{HEIGHT - BELOW - 8}" fill="none" stroke="#ccc"/>'
    )
    svg = f'<svg width="{WIDTH}" height="{HEIGHT}">{frame}{lines}{labels}</svg>'
    return f"<figure><figcaption>{html.escape(name)}</figcaption>{svg}</figure>"


def thin(points: list[tuple[int, float]], most: int = 1000) -> list[tuple[int, float]]:
    """At most `most` points, each the mean of adjacent ones."""
    size = math.ceil(len(points) / most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def heat_maps(run: Path) -> str:
    """Heat maps of the newest table of every metric binned over (t, s)."""
    lines = read(run / "cells.jsonl")
    if not lines:
        return ""

    step = lines[-1].pop("step")
    tables = {
        name: torch.tensor([[math.nan if value is None else value for value in row] for row in table]).double()
        for name, table in lines[-1].items()
    }
    image = embed(image_encode.heat_maps(tables))
    return f"<h2>{html.escape(str(run))}: means over (t, s), step {step}; t to the right, s upwards</h2>{image}"


def samples(run: Path, most: int = 6) -> str:
    """Sample grids of a run from early to late, generated with EMA weights."""
    paths = sorted((run / "samples").glob("step_*.png"))
    chosen = sorted({round(i * (len(paths) - 1) / max(most - 1, 1)) for i in range(most)}) if paths else []
    strips = "".join(
        f"<figure><figcaption>step {int(paths[i].stem[5:])}</figcaption>{embed(Image.open(paths[i]))}</figure>"
        for i in chosen
    )
    return f"<h2>{html.escape(str(run))}: samples</h2>{strips}" if strips else ""


def embed(image: Image.Image, most: int = 640) -> str:
    """An `<img>` with the image embedded as a data URL, downscaled to at most `most` pixels wide."""
    image = image.convert("RGB")
    image.thumbnail((most, 10 * most))
    data = io.BytesIO()
    image.save(data, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'
