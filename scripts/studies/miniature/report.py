"""From the miniature's evaluations to claims, plots, image grids and the page docs/miniature.md."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scoring
import torch
from miniature.cells import MILD, STEPS, own_ratio
from miniature.page import LABELS, Study, page, plots, readme_table
from models import Cell, Run
from PIL import Image, ImageDraw

from selfe.config import load
from selfe.device import device_name
from selfe.io.image_encode import grid

MARKS = "<!-- table written by scripts/studies/run.py miniature -->", "<!-- end of it -->"
RESULTS = Path(__file__).with_name("results.json")
TERMS_OF = "selfe_1"  # the model whose data term and self-evaluation term are shown
KINDS = {"": "plain", "contrast": "contrast"}  # of real images, by their names in results.json
MEANS = ("ok", "shape", "foreground", "background", "fd", "fd_of_means", "extent", "gamut", "log_norm")
SPREADS = {"place": ("centre_x", "centre_y"), "spread": ("red", "green", "blue")}


def terms_path(out: Path) -> Path:
    return out / TERMS_OF / "terms.npz"


def collect(out: Path, runs: list[Run], count: int, command: str) -> dict[str, Any]:
    """The content of results.json, from the evaluations in a folder of runs."""
    rows = [measures(row) for row in scoring.rows(out, runs, count)]
    evaluated = [run for run in runs if any(row["model"] == run.config for row in rows)]
    real = real_measures(out, count)
    return {
        "claims": claims(Study({"rows": rows}), real),
        "command": command,
        "setting": setting(out / evaluated[0].name),
        "images_per_cell": count,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {device_name(torch.device('cpu'))}",
        "cpu_seconds": scoring.cpu_seconds(out, evaluated),
        "real": real,
        "terms": terms(out),
        "rows": rows,
    }


def measures(row: dict[str, Any]) -> dict[str, Any]:
    """The measures of the page in a row of `scoring.rows`; means over seeds, ok with its interval."""
    chosen = {name: row[name] for name in ("model", "steps", "guidance", "eta", "cell", "seeds")}
    chosen |= {name: row[name] for name in ("ok_low", "ok_high", "ok_seeds", "fd_seeds", *MEANS)}
    chosen |= {"held_out": row["ok/held_out"], "trained": row["ok/trained"]}
    for name, axes in SPREADS.items():
        chosen[name] = float(np.mean([row[f"{axis}_std"] for axis in axes]))
    return chosen


def real_measures(out: Path, count: int) -> dict[str, dict[str, float]]:
    """The measures of real images, plain and of varied contrast."""
    real = {}
    for name, kind in KINDS.items():
        if evaluation := scoring.read(scoring.real_folder(out, f"real_{kind}", count)):
            values = {metric: estimate.value for metric, estimate in scoring.values(evaluation, 0).items()}
            real[name] = {metric: values[metric] for metric in ("ok", "log_norm", "fd")}
            for spread, axes in SPREADS.items():
                real[name][spread] = float(np.mean([values[f"{axis}_std"] for axis in axes]))
    return real


def setting(folder: Path) -> dict[str, int]:
    """Width, patch, steps and batch of the main runs, from the config.yaml of the first."""
    settings = load(folder / "config.yaml")
    return {
        "width": settings["system"]["backbone"]["params"]["width"],
        "patch": settings["system"]["autoencoder"]["params"]["patch"],
        "steps": settings["trainer"]["max_steps"],
        "batch": settings["trainer"]["total_batch_size"],
    }


def terms(out: Path) -> dict[str, list] | None:
    """Mean squares of the data term and of the self-evaluation term over (t, s); None where s > t."""
    if not terms_path(out).exists():
        return None
    with np.load(terms_path(out)) as stored:
        tables = {name: stored[name] for name in stored.files}
    return {name: np.where(np.isnan(table), None, table).tolist() for name, table in tables.items()}


def claims(study: Study, real: dict) -> list[dict]:
    """Every claim with its bound; a claim whose runs are missing has no value and does not pass."""
    ok = lambda config, n, w, r=None: study.row(config, n, w, ratio=r)["ok"]  # noqa: E731
    best = lambda config, n: study.best(config, n)["ok"]  # noqa: E731
    fd = lambda config, n, r=None: study.row(config, n, 1.0, ratio=r)["fd"]  # noqa: E731
    claims_made = []

    def claim(name: str, value: Callable[[], float], sign: str, bound: float) -> None:
        try:
            number = float(value())
        except (TypeError, ValueError):
            number = None
        passed = number is not None and (number >= bound if sign == ">=" else number <= bound)
        claims_made.append({"name": name, "value": number, "bound": f"{sign} {bound:g}", "pass": passed})

    fm = "flow_matching"
    claim("real images: ok", lambda: real[""]["ok"], ">=", 0.99)
    forms = {
        "selfe": "Self-E (paper's form)",
        "selfe_floor": "Self-E with the floor",
        "floor_late": "late Self-E with the floor",
    }
    for config, label in forms.items():

        def gain(n: int, w: float, config: str = config, r: float | None = None) -> Callable[[], float]:
            return lambda: ok(config, n, w, r) - ok(fm, n, w)

        def gain_best(n: int, config: str = config) -> Callable[[], float]:
            return lambda: best(config, n) - best(fm, n)

        claim(f"N=2, guidance 1: {label} minus flow matching", gain(2, 1.0), ">=", 0.20)
        claim(f"N=2, guidance 2: {label} minus flow matching", gain(2, 2.0), ">=", 0.08)
        claim(f"N=2, each at its best guidance: {label} minus flow matching", gain_best(2), ">=", 0.04)
        claim(f"N=4, guidance 1: {label} minus flow matching", gain(4, 1.0), ">=", 0.12)
        claim(f"N=4, each at its best guidance: {label} minus flow matching", gain_best(4), ">=", -0.02)
        claim(f"N=32, each at its best guidance: {label} minus flow matching", gain_best(32), ">=", -0.03)
        claim(
            f"{label}: largest drop of ok from N=2 to 32, at best guidance",
            lambda config=config: largest_fall([best(config, n) for n in STEPS[1:]]), "<=", 0.01,
        )  # fmt: skip
        for n, bound, least in ((2, 0.6, 0.20), (4, 1.0, 0.12)):
            for r in (None, *MILD[n]):
                name = f"N={n}, guidance 1" + (f", s ratio {r}" if r else "")
                claim(
                    f"{name}: FD of {label} / flow matching",
                    lambda config=config, n=n, r=r: fd(config, n, r) / fd(fm, n), "<=", bound,
                )  # fmt: skip
                if r:
                    claim(f"{name}: {label} minus flow matching", gain(n, 1.0, r=r), ">=", least)
    claim("N=1, guidance 1: Self-E (paper's form), s = 0.75", lambda: ok("selfe", 1, 1.0), ">=", 0.65)
    claim("N=1, guidance 1: Self-E with the floor, s = t_{k+1}", lambda: ok("selfe_floor", 1, 1.0), ">=", 0.80)
    claim("N=1, guidance 1: late Self-E with the floor, s = t_{k+1}", lambda: ok("floor_late", 1, 1.0), ">=", 0.80)
    claim("N=1, guidance 1: flow matching", lambda: ok(fm, 1, 1.0), "<=", 0.05)
    # a quick study has no shorter runs of its own
    complete, base = ("short_floor", "short_flow_matching") if study.seeds("short_floor") else ("selfe_floor", fm)
    true_gain = lambda: ok(complete, 2, 1.0) - ok(base, 2, 1.0)  # noqa: E731
    for config, label in {
        "wrong_sign": "sign of the classifier score reversed",
        "no_self_evaluation": "score difference set to 0",
    }.items():
        claim(
            f"N=2, guidance 1: share of the gain that remains with the {label}",
            lambda config=config: (ok(config, 2, 1.0) - ok(base, 2, 1.0)) / true_gain(), "<=", 0.25,
        )  # fmt: skip
    return claims_made


def largest_fall(values: list[float]) -> float:
    """How far a later value lies below any earlier one."""
    return max(0.0, *(early - late for i, early in enumerate(values) for late in values[i + 1 :]))


def image_grid(out: Path, runs: list[Run], count: int, path: Path, zoom: int = 4) -> None:
    """Rows: models; columns: steps; in each 2 x 4 captions, the same captions and noise throughout."""
    shown = np.arange(0, 48, 6) + np.arange(8) % 3
    rows, names = [], []
    for config, name in LABELS.items():
        folders = [scoring.images_folder(out, run, count) for run in runs if run.config == config]
        folders = [folder for folder in folders if scoring.read(folder)]
        if folders:
            cells = [Cell(steps, 1.0, 0.0, own_ratio(config, steps)) for steps in STEPS]
            files = scoring.image_files(folders[0], cells)
            images = [[enlarged(files[cell][i], zoom) for i in shown] for cell in cells if cell in files]
            rows.append([grid([each[:4], each[4:]], gap=2) for each in images])
            names.append(name)
    labelled(grid(rows, gap=10), rows[0][0], names).quantize(256).save(path, optimize=True)


def labelled(sheet: Image.Image, block: Image.Image, names: list[str], left: int = 116, top: int = 16) -> Image.Image:
    """The sheet of blocks with the models' names beside its rows and the steps above its columns."""
    framed = Image.new("RGB", (sheet.width + left, sheet.height + top), "white")
    framed.paste(sheet, (left, top))
    pen = ImageDraw.Draw(framed)
    for x, steps in enumerate(STEPS):
        pen.text((left + x * (block.width + 10), 2), f"{steps} step{'s' * (steps > 1)}", fill="black")
    for y, name in enumerate(names):
        pen.text((2, top + y * (block.height + 10) + block.height // 2 - 6), name, fill="black")
    return framed


def enlarged(path: Path, zoom: int) -> Image.Image:
    with Image.open(path) as image:
        return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


def report(out: Path, runs: list[Run], count: int, command: str, docs: Path | None) -> None:
    """Print the claims; with a folder `docs`, write results.json beside the study, the page and the images there."""
    results = collect(out, runs, count, command)
    for claim in results["claims"]:
        value = "missing" if claim["value"] is None else f"{claim['value']:.3f}"
        outcome = "holds" if claim["pass"] else "does not hold"
        print(f"{outcome:13}  {claim['name']}: {value} ({claim['bound']})")

    target = docs or out
    target.mkdir(exist_ok=True)
    file = RESULTS if docs else out / "results.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    image_grid(out, runs, count, target / "miniature_grid.png")
    plots(results, target)
    if docs:
        write_page(results, docs)


def write_page(results: dict[str, Any], docs: Path) -> None:
    """The page in `docs` and the table of the README, from results.json."""
    (docs / "miniature.md").write_text(page(results), encoding="utf-8")
    readme = docs.parent / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    text = before + MARKS[0] + "\n" + readme_table(Study(results)) + "\n" + MARKS[1] + after
    readme.write_text(text, encoding="utf-8")
