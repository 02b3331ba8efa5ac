"""From the miniature's scores to claims, plots, image grids and the page docs/miniature.md."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from measures import frechet, interval
from miniature.cells import MILD, STEPS, SWEEP, own_ratio
from miniature.page import LABELS, page, plots, readme_table
from miniature.score import COMBINATIONS, held_out, real, score, trained_scorer
from models import Cell
from PIL import Image, ImageDraw

from selfe.config import load
from selfe.data.shapes import ShapesData
from selfe.device import device_name
from selfe.io.image_encode import grid, to_image

MARKS = "<!-- table written by scripts/studies/run.py miniature -->", "<!-- end of it -->"


class Study:
    """All scores that lie in a folder of runs."""

    def __init__(self, out: Path, runs: list, count: int):
        self.out, self.count, self.which = out, count, np.arange(count) % len(COMBINATIONS)
        self.runs = [run for run in runs if (out / run.name / f"cells_{count}").is_dir()]
        self.unseen = np.isin(self.which, held_out(ShapesData()))

    def seeds(self, config: str) -> list[int]:
        return [run.seed for run in self.runs if run.config == config]

    def scores(self, config: str, cell: str) -> list[dict[str, np.ndarray]]:
        """One table of scores per seed that has this cell."""
        paths = [self.out / f"{config}_{seed}" / f"cells_{self.count}" / f"{cell}.npz" for seed in self.seeds(config)]
        return [dict(np.load(path)) for path in paths if path.exists()]

    def cell(self, config: str, steps: int, guidance: float, eta: float = 0, ratio: float | None = None) -> str:
        """The name of a cell; without a ratio, the config's own rule for the secondary time."""
        return Cell(steps, guidance, eta, own_ratio(config, steps) if ratio is None else ratio).name

    @cached_property
    def real(self) -> dict[str, dict[str, np.ndarray]]:
        """Scores of real images of the same captions, plain and of varied contrast."""
        scores = {}
        for name, contrast in {"": (1.0, 1.0), "contrast": (0.15, 1.0)}.items():
            path = self.out / ("scorer_contrast" if name else "scorer") / "scorer.safetensors"
            if path.exists():
                data = ShapesData(contrast=contrast)
                which = np.arange(4 * self.count) % len(COMBINATIONS)
                scores[name] = score(trained_scorer(data, path), real(data, which, "reference", name)[0], which)
        return scores

    def reference(self, config: str) -> dict[str, np.ndarray]:
        return self.real["contrast" if config.startswith("contrast") else ""]

    def distance(self, config: str, cell: str) -> list[float]:
        """Frechet distance, seed by seed."""
        return [frechet(s["features"], self.reference(config)["features"]) for s in self.scores(config, cell)]

    def row(self, config: str, steps: int, guidance: float, eta: float = 0, ratio: float | None = None) -> dict | None:
        """Everything measured in a cell, means over seeds, `+-` being half of a 95 % interval."""
        cell = self.cell(config, steps, guidance, eta, ratio)
        scores = self.scores(config, cell)
        if not scores:
            return None
        right = np.stack([s["right"].all(axis=1) for s in scores])
        low, high = interval(right)
        distances = self.distance(config, cell)
        features = self.reference(config)["features"]
        extent_of_real = np.cov(features, rowvar=False).trace()
        return {
            "model": config, "steps": steps, "guidance": guidance, "eta": eta, "cell": cell, "seeds": len(scores),
            "ok": right.mean(), "ok_low": low, "ok_high": high, "ok_seeds": right.mean(axis=1).tolist(),
            "shape": np.mean([s["right"][:, 0].mean() for s in scores]),
            "foreground": np.mean([s["right"][:, 1].mean() for s in scores]),
            "background": np.mean([s["right"][:, 2].mean() for s in scores]),
            "held_out": right[:, self.unseen].mean(), "trained": right[:, ~self.unseen].mean(),
            "fd": np.mean(distances), "fd_seeds": distances,
            "fd_of_means": np.mean([np.square(s["features"].mean(0) - features.mean(0)).sum() for s in scores]),
            "extent": np.mean([np.cov(s["features"], rowvar=False).trace() for s in scores]) / extent_of_real,
            "place": np.mean([s["place"].std(axis=0).mean() for s in scores]),
            "spread": np.mean([s["background"].std(axis=0).mean() for s in scores]),
            "gamut": np.mean([s["gamut"].mean() for s in scores]),
            "log_norm": np.mean([np.log(s["norm"]).mean() for s in scores]),
        }  # fmt: skip

    def best(self, config: str, steps: int) -> dict | None:
        """The row of the guidance that scores best."""
        rows = [row for w in SWEEP if (row := self.row(config, steps, w))]
        rows = [row for row in rows if row["seeds"] == max(r["seeds"] for r in rows)]
        return max(rows, key=lambda row: row["ok"], default=None)

    @property
    def setting(self) -> dict[str, int]:
        """Width, patch, steps and batch of the main runs, from the config.yaml of the first."""
        settings = load(self.out / self.runs[0].name / "config.yaml")
        return {
            "width": settings["system"]["backbone"]["params"]["width"],
            "patch": settings["system"]["autoencoder"]["params"]["patch"],
            "steps": settings["trainer"]["max_steps"],
            "batch": settings["trainer"]["total_batch_size"],
        }

    def cpu_seconds(self, config: str) -> float | None:
        paths = [self.out / f"{config}_{seed}" / "cpu_seconds.json" for seed in self.seeds(config)]
        seconds = [json.loads(path.read_text())["seconds"] for path in paths if path.exists()]
        return float(np.mean(seconds)) if seconds else None


def claims(study: Study) -> list[dict]:
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
    claim("real images: ok", lambda: study.real[""]["right"].all(axis=1).mean(), ">=", 0.99)
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


def image_grid(study: Study, path: Path, guidance: float = 1.0, zoom: int = 4) -> None:
    """Rows: models; columns: steps; in each 2 x 4 captions, the same captions and noise throughout."""
    shown = np.arange(0, 48, 6) + np.arange(8) % 3
    rows, names = [], []
    for config, name in LABELS.items():
        row = []
        for steps in STEPS:
            scores = study.scores(config, study.cell(config, steps, guidance))
            if scores:
                images = [enlarged(scores[0]["images"][i], zoom) for i in shown]
                row.append(grid([images[:4], images[4:]], gap=2))
        if row:
            rows.append(row)
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


def enlarged(pixels: np.ndarray, zoom: int) -> Image.Image:
    image = to_image(torch.from_numpy(pixels))
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


def rows(study: Study) -> list[dict]:
    """Every cell of every model."""
    cells = dict.fromkeys((run.config, c.steps, c.guidance, c.eta, c.s_ratio) for run in study.runs for c in run.cells)
    return [row for cell in cells if (row := study.row(*cell))]


def report(out: Path, runs: list, count: int, command: str, docs: Path | None) -> None:
    """Print the claims; with a folder `docs`, write results.json beside the study, the page and the images there."""
    study = Study(out, runs, count)

    # the claims, each with its value
    results = claims(study)
    for claim in results:
        value = "missing" if claim["value"] is None else f"{claim['value']:.3f}"
        outcome = "holds" if claim["pass"] else "does not hold"
        print(f"{outcome:13}  {claim['name']}: {value} ({claim['bound']})")

    # everything that the page and the plots show, as JSON
    target = docs or out
    target.mkdir(exist_ok=True)
    everything = {
        "claims": results,
        "command": command,
        "setting": study.setting,
        "images_per_cell": count,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {device_name(torch.device('cpu'))}",
        "cpu_seconds": {c: study.cpu_seconds(c) for c in dict.fromkeys(run.config for run in study.runs)},
        "real": {
            name: {"ok": float(s["right"].all(axis=1).mean()), "place": float(s["place"].std(axis=0).mean()),
                   "spread": float(s["background"].std(axis=0).mean()), "log_norm": float(np.log(s["norm"]).mean()),
                   "fd": frechet(s["features"][:count], s["features"][count:])}
            for name, s in study.real.items()
        },
        "rows": rows(study),
    }  # fmt: skip
    results = Path(__file__).with_name("results.json") if docs else out / "results.json"
    results.write_text(json.dumps(everything, indent=1, default=rounded) + "\n")

    # images, plots, and in `docs` the page and the table of the README
    image_grid(study, target / "miniature_grid.png")
    plots(study, everything, target)
    if docs:
        (docs / "miniature.md").write_text(page(study, everything))
        readme = docs.parent / "README.md"
        before, rest = readme.read_text().split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        readme.write_text(before + MARKS[0] + "\n" + readme_table(study) + "\n" + MARKS[1] + after)


def rounded(value: float) -> float:
    return float(value)
