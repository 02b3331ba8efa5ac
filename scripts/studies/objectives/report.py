"""From the evaluations of the objectives study to results.json, curves, and the tables of docs/objectives.md."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import scoring
import torch
from miniature.report import real_measures, setting
from models import Cell, Run
from objectives.cells import COST, GUIDANCE, LABELS, STEPS, ratios
from tables import number, pyplot, table

from selfe.device import device_name

MARKS = "<!-- tables written by scripts/studies/run.py objectives -->", "<!-- end of them -->"
RESULTS = Path(__file__).with_name("results.json")
EQUAL_COST = "_equal_cost"  # variant of the models that are trained for the cost of flow matching


class Rows:
    """The rows of results.json."""

    def __init__(self, results: dict[str, Any]):
        self.rows = {(row["model"], row["cell"]): row for row in results["rows"]}
        self.models = {row["model"] for row in results["rows"]}

    def configs(self, variant: str = "") -> list[str]:
        """The configs that were measured, in the order of the tables."""
        return [config for config in LABELS if config + variant in self.models]

    def row(self, config: str, steps: int, guidance: float = 1.0, variant: str = "") -> dict[str, Any] | None:
        """All measures of a sampling setting with the default rule for s; None if it was not evaluated."""
        cell = Cell(steps, guidance, 0.0, ratios(config, steps)[0])
        return self.rows.get((config + variant, cell.name))

    def best(self, config: str, steps: int, better: Callable[[dict], float], variant: str = "") -> dict | None:
        """The row of the guidance and the rule for s whose value of `better` is largest."""
        cells = (Cell(steps, w, 0.0, r) for w in GUIDANCE for r in ratios(config, steps))
        rows = [row for cell in cells if (row := self.rows.get((config + variant, cell.name)))]
        return max(rows, key=better, default=None)


def collect(out: Path, runs: Sequence[Run], count: int, command: str) -> dict[str, Any]:
    """The content of results.json, from the evaluations in a folder of runs."""
    rows = [measures(row) for row in scoring.rows(out, runs, count)]
    models = {row["model"] for row in rows}
    evaluated = [run for run in runs if run.model in models]
    if not evaluated:
        raise SystemExit(f"{out}: no model has been evaluated yet")
    return {
        "command": command,
        "setting": setting(out / evaluated[0].name),
        "images_per_cell": count,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {device_name(torch.device('cpu'))}",
        "cpu_seconds": scoring.cpu_seconds(out, evaluated),
        "failed": sorted(run.name for run in runs if has_failed(out / run.name / "cpu_seconds.json")),
        "not_run": list(dict.fromkeys(run.model for run in runs if run.model not in models)),
        "real": real_measures(out, count)[""],
        "rows": rows,
    }


def has_failed(path: Path) -> bool:
    """Whether the last training that wrote this file ended with an error."""
    return path.exists() and not json.loads(path.read_text())["done"]


def measures(row: dict[str, Any]) -> dict[str, Any]:
    """The measures of the tables in a row of `scoring.rows`."""
    axes = row["centre_x_std"], row["centre_y_std"]
    chosen = {name: row[name] for name in ("model", "cell", "steps", "guidance", "s_ratio", "seeds", "extent")}
    chosen |= {
        f"{name}{kind}": row[f"{name}{kind}"] for name in ("ok", "fd") for kind in ("", "_low", "_high", "_seeds")
    }
    return chosen | {"place": sum(axes) / 2}


# ---- tables ----


def by_steps(rows: Rows, cell: Callable[[str, int], str], variant: str = "") -> str:
    """A table with a line per objective and a column per number of steps."""
    lines = [[LABELS[config], *(cell(config, steps) for steps in STEPS)] for config in rows.configs(variant)]
    return table(["objective", *(f"N = {steps}" for steps in STEPS)], lines)


def interval(row: dict[str, Any] | None, name: str, digits: int) -> str:
    """A measure with its interval."""
    if row is None:
        return "-"
    value, low, high = (row[f"{name}{kind}"] for kind in ("", "_low", "_high"))
    return f"{value:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def with_setting(row: dict[str, Any] | None) -> str:
    """ok / FD, and the guidance and the s ratio that gave them."""
    return "-" if row is None else f"{row['ok']:.2f} / {row['fd']:.0f} ({row['guidance']:g}, {row['s_ratio']:g})"


def cost_table(results: dict[str, Any]) -> str:
    """FLOPs of a step, CPU-seconds of a run, and the spread of positions in few steps."""
    rows, seconds, lines = Rows(results), results["cpu_seconds"], []
    for config in rows.configs():
        places = [rows.row(config, steps) for steps in (1, 2, 4)]
        cells = [
            number(COST[config]),
            number(seconds.get(config), 0),
            *(number(row and row["place"]) for row in places),
        ]
        seeds = max(row["seeds"] for row in rows.rows.values() if row["model"] == config)
        lines.append([LABELS[config], str(seeds), *cells])
    lines.append(["real images", "", "", "", *[number(results["real"]["place"])] * 3])
    return table(["objective", "seeds", "FLOPs", "CPU-seconds", *(f"place, N = {n}" for n in (1, 2, 4))], lines)


def tables(results: dict[str, Any]) -> str:
    """All tables of docs/objectives.md."""
    rows, facts = Rows(results), results["setting"]
    text = [
        f"`{results['command']}`: {facts['steps']} steps of batch {facts['batch']}, "
        f"{results['images_per_cell']} images per sampling setting, {results['machine']}.",
        "ok, guidance 1:",
        by_steps(rows, lambda config, steps: interval(rows.row(config, steps), "ok", 2)),
        f"FD, guidance 1 (real images: {results['real']['fd']:.1f}):",
        by_steps(rows, lambda config, steps: interval(rows.row(config, steps), "fd", 0)),
        "ok / FD at the guidance and the s ratio of the highest ok of each (in brackets):",
        by_steps(rows, lambda config, steps: with_setting(rows.best(config, steps, lambda row: row["ok"]))),
        "ok / FD at the guidance and the s ratio of the lowest FD of each:",
        by_steps(rows, lambda config, steps: with_setting(rows.best(config, steps, lambda row: -row["fd"]))),
        "Cost, and the standard deviation of the position of shapes, in pixels, guidance 1:",
        cost_table(results),
    ]
    if rows.configs(EQUAL_COST):
        text += [
            "ok / FD at guidance 1 of models trained for the cost of flow matching:",
            by_steps(rows, lambda config, steps: with_setting(rows.row(config, steps, 1.0, EQUAL_COST)), EQUAL_COST),
        ]
    for name, what in (("failed", "Failed"), ("not_run", "Not run yet")):
        if results[name]:
            text.append(f"{what}: {', '.join(f'`{model}`' for model in results[name])}.")
    return "\n\n".join(text)


# ---- curves ----


def curves(results: dict[str, Any], path: Path) -> None:
    """ok and FD over the number of steps at guidance 1, and FD against ok at their guidance scales in four steps."""
    plt, rows = pyplot(), Rows(results)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for place, config in enumerate(rows.configs()):
        points = [row for steps in STEPS if (row := rows.row(config, steps))]
        trade = [row for guidance in GUIDANCE if (row := rows.row(config, 4, guidance))]
        style = {"color": f"C{place % 10}", "linestyle": "-" if place < 10 else "--", "marker": "o", "markersize": 3}
        for axis, name in zip(axes, ("ok", "fd"), strict=False):
            steps, values = [row["steps"] for row in points], [row[name] for row in points]
            axis.plot(steps, values, label=LABELS[config], **style)
            bounds = ([row[f"{name}{kind}"] for row in points] for kind in ("_low", "_high"))
            axis.fill_between(steps, *bounds, color=style["color"], alpha=0.15)
        axes[2].plot([row["ok"] for row in trade], [row["fd"] for row in trade], **style)

    for axis, title in zip(axes, ("ok, guidance 1", "FD, guidance 1"), strict=False):
        axis.set(title=title, xscale="log", xlabel="steps", xticks=STEPS, xticklabels=STEPS)
        axis.minorticks_off()
    axes[1].set_yscale("log")
    axes[2].set(title="N = 4, by guidance", xlabel="ok", ylabel="FD")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def report(out: Path, runs: list[Run], count: int, command: str, docs: Path | None) -> None:
    """Write results.json and the curves; with a folder `docs`, beside the study, and the tables of the page there."""
    results = collect(out, runs, count, command)
    file = RESULTS if docs else out / "results.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    curves(results, (docs or out) / "objectives_curves.png")
    print(tables(results))
    if docs:
        write_page(results, docs)


def write_page(results: dict[str, Any], docs: Path) -> None:
    """The tables of docs/objectives.md, from results.json."""
    page = docs / "objectives.md"
    before, rest = page.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    page.write_text(before + MARKS[0] + "\n\n" + tables(results) + "\n\n" + MARKS[1] + after, encoding="utf-8")
