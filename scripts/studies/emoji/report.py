"""From the evaluations of the emoji study to results.json, plots, a grid of images and the page docs/emoji.md."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import scoring
import torch
from emoji import judge
from emoji.cells import DATA, LABELS, RATIOS, STEPS, SWEEP, own_ratio, prompts
from emoji.extractor import COPY
from models import Cell, Run
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tables import number, pyplot, table

from selfe.config import load as load_config
from selfe.device import device_name
from selfe.io.image_encode import grid, wrap

SETS = {
    "train": "trained",
    "held_out_pairs": "held-out pairs",
    "held_out_concepts": "held-out emoji",
}
COLOURS = {"flow_matching": "#777777", "selfe": "#1f77b4", "selfe_floor": "#d62728", "floor_late": "#2ca02c"}
REAL = Cell(0)  # sampling setting of the real images
RESULTS = Path(__file__).with_name("results.json")


class Rows:
    """The rows of results.json."""

    def __init__(self, results: dict):
        self.rows = {(row["model"], row["cell"]): row for row in results["rows"]}
        self.models = [model for model in LABELS if any(row["model"] == model for row in results["rows"])]

    def row(self, model: str, steps: int, guidance: float = 1.0, ratio: float | None = None) -> dict | None:
        """All metrics of a sampling setting; None if it was not evaluated."""
        cell = Cell(steps, guidance, 0.0, own_ratio(model) if ratio is None else ratio)
        return self.rows.get((model, cell.name))


def collect(out: Path, runs: list[Run], count: int, command: str) -> dict:
    """The content of results.json, from the evaluations in a folder of runs."""
    rows = scoring.rows(out, runs, count)
    evaluated = [run for run in runs if any(row["model"] == run.config for row in rows)]
    trainer = load_config(out / evaluated[0].name / "config.yaml")["trainer"]
    real = scoring.read(scoring.real_folder(out, "real", count))
    return {
        "command": command,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {device_name(torch.device('cpu'))}",
        "images_per_cell": count,
        "images": {split: len(judge.real_images(DATA, split)) for split in judge.SPLITS},
        "steps": trainer["max_steps"],
        "batch": trainer["total_batch_size"],
        "cpu_seconds": scoring.cpu_seconds(out, evaluated),
        "real": {metric: estimate.value for metric, estimate in scoring.values(real, 0).items()},
        "rows": rows,
    }


# ---- tables ----


def table_of_sets(results: dict, guidance: float = 1.0) -> str:
    """concept@1 by steps, model and set of captions, with intervals; FD, style, concept@5 and copies."""
    rows, lines = Rows(results), []
    others = {
        "concept@5/train": 2,
        "concept@5/held_out_pairs": 2,
        "style/held_out_pairs": 2,
        "fd": 2,
        "copies/train": 2,
        "copies/held_out_pairs": 2,
    }
    for steps in STEPS:
        for model in rows.models:
            if row := rows.row(model, steps, guidance):
                cells = [str(steps), LABELS[model]]
                for name in SETS:
                    low, high = row[f"concept@1/{name}_low"], row[f"concept@1/{name}_high"]
                    cells.append(f"{row[f'concept@1/{name}']:.3f} ({low:.3f}-{high:.3f})")
                lines.append([*cells, *(number(row[name], digits) for name, digits in others.items())])

    real, chance = results["real"], 1 / len(judge.labels())
    cells = [number(real[f"concept@1/{name}"]) for name in SETS]
    cells += [number(real[name], digits) for name, digits in others.items()]
    lines.append(["", "real images", *cells])
    lines.append(["", "chance", *[f"{chance:.4f}"] * 3, *[f"{5 * chance:.4f}"] * 2, "0.25", "", "", ""])
    head = ["N", "model", *(f"concept@1, {label}" for label in SETS.values()), "concept@5, trained"]
    head += ["concept@5, held-out pairs", "style, held-out pairs", "FD", "copies, trained", "copies, held-out pairs"]
    return table(head, lines)


def sweep_table(results: dict) -> str:
    """concept@1 / FD by guidance, first seed."""
    rows, lines = Rows(results), []
    for model in rows.models:
        for steps in STEPS:
            cells = [first_seed(rows.row(model, steps, w)) for w in (1.0, *SWEEP)]
            lines.append([LABELS[model], str(steps), *cells])
    return table(["model", "N", *(f"w = {w:g}" for w in (1.0, *SWEEP))], lines)


def ratio_table(results: dict) -> str:
    """concept@1 / FD by the s ratio, first seed."""
    rows, lines = Rows(results), []
    for model in rows.models:
        for steps in (1, 2, 4):
            cells = [first_seed(rows.row(model, steps, 1.0, ratio)) for ratio in RATIOS]
            if set(cells) != {"-"}:
                lines.append([LABELS[model], str(steps), *cells])
    return table(["model", "N", *(f"r = {ratio:g}" for ratio in RATIOS)], lines)


def first_seed(row: dict | None) -> str:
    """concept@1 / FD of the first seed."""
    return f"{row['concept@1_seeds'][0]:.3f} / {row['fd_seeds'][0]:.2f}" if row else "-"


# ---- images ----


def curves(results: dict, path: Path) -> None:
    """concept@1 of trained captions and of held-out pairs, and FD, over steps."""
    plt, table_rows = pyplot(), Rows(results)
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    panels = (
        ("concept@1/train", "concept@1, trained captions"),
        ("concept@1/held_out_pairs", "concept@1, held-out pairs"),
    )
    for model in table_rows.models:
        rows = [row for steps in STEPS if (row := table_rows.row(model, steps))]
        steps, colour = [row["steps"] for row in rows], COLOURS[model]
        for axis, (name, title) in zip(axes, panels, strict=False):
            axis.plot(steps, [row[name] for row in rows], "o-", color=colour, label=LABELS[model])
            bounds = ([row[f"{name}_{side}"] for row in rows] for side in ("low", "high"))
            axis.fill_between(steps, *bounds, color=colour, alpha=0.2)
            axis.set(title=title, ylim=(0, 1))
        axes[2].plot(steps, [row["fd"] for row in rows], "o-", color=colour)
    for axis in axes:
        axis.set(xscale="log", xlabel="steps", xticks=STEPS, xticklabels=STEPS)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[2].set(title="FD", yscale="log")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def image_grid(out: Path, runs: list[Run], count: int, path: Path, zoom: int = 2) -> None:
    """Rows: captions of all sets; a block of columns per model: 1, 2, 4, 8, 32 steps from the same noise."""
    captions, categories = prompts(count).captions, prompts(count).categories
    shown = [index for name in SETS for index in places(categories, name)[:4]]
    blocks, names = [], []
    for model, label in LABELS.items():
        folders = [scoring.images_folder(out, run, count) for run in runs if run.config == model]
        folders = [folder for folder in folders if scoring.read(folder)]
        if folders:
            cells = [Cell(steps, 1.0, 0.0, own_ratio(model)) for steps in STEPS]
            files = scoring.image_files(folders[0], cells)
            rows = [[enlarged(files[cell][index], zoom) for cell in cells if cell in files] for index in shown]
            blocks.append(grid(rows))
            names.append(label)
    (real,) = scoring.image_files(scoring.real_folder(out, "real", count), [REAL]).values()
    blocks.append(grid([[enlarged(real[index], zoom)] for index in shown]))

    # labels: captions on the left, models above
    font, left, top, gap = ImageFont.load_default(size=12), 150, 22, 14
    width = left + sum(block.width + gap for block in blocks)
    sheet = Image.new("RGB", (width, top + blocks[0].height), "white")
    pen = ImageDraw.Draw(sheet)
    for y, index in enumerate(shown):
        text = wrap(captions[index], font, left - 8, max_lines=4)
        pen.multiline_text((4, top + y * blocks[0].height // len(shown) + 4), text, fill="black", font=font)
    x = left
    for block, name in zip(blocks, [*names, "real"], strict=True):
        pen.text((x, 4), name, fill="black", font=font)
        sheet.paste(block, (x, top))
        x += block.width + gap
    sheet.quantize(256).save(path, optimize=True)


def places(categories: tuple[str, ...], name: str) -> list[int]:
    """The prompts of a category."""
    return [index for index, category in enumerate(categories) if category == name]


def enlarged(path: Path, zoom: int) -> Image.Image:
    with Image.open(path) as image:
        return ImageOps.scale(image.convert("RGB"), zoom, Image.Resampling.NEAREST)


def report(out: Path, runs: list[Run], count: int, command: str, docs: Path | None) -> None:
    """Print concept@1 of every model; with a folder `docs`, write results.json, the page and its images there."""
    results = collect(out, runs, count, command)
    target = docs or out
    target.mkdir(exist_ok=True)
    file = RESULTS if docs else out / "results.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    image_grid(out, runs, count, target / "emoji_grid.png")
    curves(results, target / "emoji_curves.png")
    print(table_of_sets(results))
    if docs:
        write_page(results, docs)


def write_page(results: dict, docs: Path) -> None:
    """The page in `docs` from results.json."""
    (docs / "emoji.md").write_text(page(results), encoding="utf-8")


def page(results: dict) -> str:
    """docs/emoji.md."""
    seconds = results["cpu_seconds"]
    facts = {
        **{key: results[key] for key in ("command", "machine", "steps", "batch")},
        "train": results["images"]["train"],
        "pairs": results["images"]["held_out_pairs"],
        "concepts": results["images"]["held_out_concepts"],
        "count": results["images_per_cell"],
        "seeds": " to ".join(map(str, sorted({row["seeds"] for row in results["rows"]}))),
        "best": max(row["concept@1/train"] for row in results["rows"]),
        "ceiling": results["real"]["concept@1/train"],
        "main": table_of_sets(results),
        "guided": table_of_sets(results, 2.0),
        "sweep": sweep_table(results),
        "ratios": ratio_table(results),
        "copy": COPY,
        "cost": table(
            ["model", "CPU-seconds of one training run"],
            [[LABELS[model], number(seconds[model], 0)] for model in LABELS if model in seconds],
        ),
    }
    return Path(__file__).with_name("page.md").read_text(encoding="utf-8").format(**facts)
