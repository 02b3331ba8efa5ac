"""From the scores of the emoji study to results.json, plots, a grid of images and the page docs/emoji.md."""

from __future__ import annotations

import json
import os
import platform
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from emoji import judge
from emoji.cells import DATA, LABELS, RATIOS, STEPS, SWEEP, asked, own_ratio
from measures import frechet, interval
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
COPY = 0.15  # largest root mean square difference between an image and what counts as its copy, in [-1, 1]


class Results:
    """All scores in a folder of runs."""

    def __init__(self, out: Path, runs: list[Run], count: int):
        self.out, self.count = out, count
        self.runs = [run for run in runs if (out / run.name / f"cells_{count}").is_dir()]
        self.rows: dict[tuple[str, Cell], dict | None] = {}
        ends = np.cumsum([len(images) for images in asked(count).values()])
        self.rows_of = {
            name: np.arange(end - len(images), end)
            for (name, images), end in zip(asked(count).items(), ends, strict=True)
        }

    @cached_property
    def reference(self) -> np.ndarray:
        """Features of all real images."""
        scorer, sets = judge.load(), judge.joined(judge.real_images(DATA, split) for split in judge.SPLITS)
        return judge.score(scorer, sets.pixels, sets.concepts, sets.styles)["features"].numpy()

    def scores(self, model: str, cell: Cell) -> list[dict[str, np.ndarray]]:
        """One table of scores per seed that has this cell."""
        seeds = [run.seed for run in self.runs if run.config == model]
        paths = [self.out / f"{model}_{seed}" / f"cells_{self.count}" / f"{cell.name}.npz" for seed in seeds]
        return [dict(np.load(path)) for path in paths if path.exists()]

    def row(self, model: str, steps: int, guidance: float = 1.0, ratio: float | None = None) -> dict | None:
        """All measures of a cell, by set of captions; None if it was not evaluated."""
        cell = Cell(steps, guidance, 0.0, own_ratio(model) if ratio is None else ratio)
        if (model, cell) not in self.rows:
            scores = self.scores(model, cell)
            facts = {"model": model, "cell": cell.name, "seeds": len(scores)}
            self.rows[model, cell] = facts | self.measures(scores) if scores else None
        return self.rows[model, cell]

    def measures(self, scores: list[dict[str, np.ndarray]]) -> dict:
        """Measures of tables of scores, one per seed: shares with 95 % intervals, and the Frechet distance."""
        values: dict = {}
        for name, rows in self.rows_of.items():
            for measure in ("concept@1", "concept@5", "style"):
                right = np.stack([table[measure][rows] for table in scores])
                values[f"{name}/{measure}"] = right.mean()
                values[f"{name}/{measure}/interval"] = interval(right)
            values[f"{name}/copies"] = np.mean([table["nearest"][rows] < COPY for table in scores])
        everything = np.stack([table["concept@1"] for table in scores])
        values["fd"] = np.mean([frechet(table["features"], self.reference) for table in scores])
        return values | {"concept@1": everything.mean(), "concept@1/interval": interval(everything)}

    @property
    def setting(self) -> dict[str, int]:
        """Images by split, steps and batch size; the latter from the config.yaml of the first run."""
        trainer = load_config(self.out / self.runs[0].name / "config.yaml")["trainer"]
        names = {"train": "train", "pairs": "held_out_pairs", "concepts": "held_out_concepts"}
        counts = {name: len(judge.real_images(DATA, split)) for name, split in names.items()}
        return counts | {"steps": trainer["max_steps"], "batch": trainer["total_batch_size"]}

    def cpu_seconds(self, model: str) -> float | None:
        """CPU-seconds of training, mean over seeds."""
        folders = [self.out / run.name for run in self.runs if run.config == model]
        seconds = [json.loads((folder / "cpu_seconds.json").read_text())["seconds"] for folder in folders]
        return float(np.mean(seconds)) if seconds else None

    @cached_property
    def ceilings(self) -> dict[str, dict]:
        """The measures of real images of the same captions, and of half of all real images against the others."""
        scorer, wanted = judge.load(), judge.joined(asked(self.count).values())
        scores = judge.score(scorer, wanted.pixels, wanted.concepts, wanted.styles)
        scores["nearest"] = judge.nearest(wanted.pixels, judge.real_images(DATA, "train").pixels)
        return self.measures([{name: value.numpy() for name, value in scores.items()}])


def table_of_sets(results: Results, models: list[str], guidance: float = 1.0) -> str:
    """concept@1 by steps, model and set of captions, with intervals; FD, style, concept@5 and copies."""
    lines = []
    for steps in STEPS:
        for model in models:
            if row := results.row(model, steps, guidance):
                cells = [str(steps), LABELS[model]]
                for name in SETS:
                    low, high = row[f"{name}/concept@1/interval"]
                    cells.append(f"{row[f'{name}/concept@1']:.2f} ({low:.2f}-{high:.2f})")
                cells += [number(row["train/concept@5"]), number(row["held_out_pairs/concept@5"])]
                cells += [number(row["held_out_pairs/style"]), number(row["fd"], 1)]
                lines.append([*cells, number(row["train/copies"]), number(row["held_out_pairs/copies"])])

    real, chance = results.ceilings, 1 / len(judge.labels())
    lines.append(
        ["", "real images", *(number(real[f"{name}/concept@1"]) for name in SETS), number(real["train/concept@5"]),
         number(real["held_out_pairs/concept@5"]), number(real["held_out_pairs/style"]), number(real["fd"], 1),
         number(real["train/copies"]), number(real["held_out_pairs/copies"])]
    )  # fmt: skip
    lines.append(["", "chance", *[f"{chance:.4f}"] * 3, *[f"{5 * chance:.4f}"] * 2, "0.25", "", "", ""])
    head = ["N", "model", *(f"concept@1, {label}" for label in SETS.values()), "concept@5, trained"]
    head += ["concept@5, held-out pairs", "style, held-out pairs", "FD", "copies, trained", "copies, held-out pairs"]
    return table(head, lines)


def sweep_table(results: Results, models: list[str]) -> str:
    """concept@1 / FD by guidance."""
    lines = []
    for model in models:
        for steps in STEPS:
            rows = [results.row(model, steps, w) for w in (1.0, *SWEEP)]
            cells = [f"{row['concept@1']:.2f} / {row['fd']:.1f}" if row else "-" for row in rows]
            lines.append([LABELS[model], str(steps), *cells])
    return table(["model", "N", *(f"w = {w:g}" for w in (1.0, *SWEEP))], lines)


def ratio_table(results: Results, models: list[str]) -> str:
    """concept@1 / FD by the s ratio."""
    lines = []
    for model in models:
        for steps in (1, 2, 4):
            rows = [results.row(model, steps, 1.0, ratio) for ratio in RATIOS]
            if any(rows):
                cells = [f"{row['concept@1']:.2f} / {row['fd']:.1f}" if row else "-" for row in rows]
                lines.append([LABELS[model], str(steps), *cells])
    return table(["model", "N", *(f"r = {ratio:g}" for ratio in RATIOS)], lines)


def curves(results: Results, models: list[str], path: Path) -> None:
    """concept@1 of trained captions and of held-out pairs, and FD, over steps."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    panels = (
        ("train/concept@1", "concept@1, trained captions"),
        ("held_out_pairs/concept@1", "concept@1, held-out pairs"),
    )
    for model in models:
        rows = [(steps, row) for steps in STEPS if (row := results.row(model, steps))]
        steps = [steps for steps, _ in rows]
        for axis, (name, title) in zip(axes, panels, strict=False):
            axis.plot(steps, [row[name] for _, row in rows], "o-", color=COLOURS[model], label=LABELS[model])
            bounds = np.array([row[f"{name}/interval"] for _, row in rows]).T
            axis.fill_between(steps, *bounds, color=COLOURS[model], alpha=0.2)
            axis.set(title=title, ylim=(0, 1))
        axes[2].plot(steps, [row["fd"] for _, row in rows], "o-", color=COLOURS[model])
    for axis in axes:
        axis.set(xscale="log", xlabel="steps", xticks=STEPS, xticklabels=STEPS)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[2].set(title="FD", yscale="log")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def image_grid(results: Results, models: list[str], path: Path, zoom: int = 2) -> None:
    """Rows: captions of all sets; a block of columns per model: 1, 2, 4, 8, 32 steps from the same noise."""
    captions = judge.joined(asked(results.count).values()).captions
    shown = [index for rows in results.rows_of.values() for index in rows[:4]]
    blocks = []
    for model in models:
        tables = [results.scores(model, Cell(steps, 1.0, 0.0, own_ratio(model)))[0] for steps in STEPS]
        rows = [[enlarged(table["images"][index], zoom) for table in tables] for index in shown]
        blocks.append(grid(rows))
    real = judge.joined(asked(results.count).values()).pixels
    images = [[enlarged(((real[index] + 1) * 127.5).round().byte().numpy(), zoom)] for index in shown]
    blocks.append(grid(images))

    # labels: captions on the left, models above
    font, left, top, gap = ImageFont.load_default(size=12), 150, 22, 14
    width = left + sum(block.width + gap for block in blocks)
    sheet = Image.new("RGB", (width, top + blocks[0].height), "white")
    pen = ImageDraw.Draw(sheet)
    for y, index in enumerate(shown):
        text = wrap(captions[index], font, left - 8, max_lines=4)
        pen.multiline_text((4, top + y * blocks[0].height // len(shown) + 4), text, fill="black", font=font)
    x = left
    for block, name in zip(blocks, [*(LABELS[model] for model in models), "real"], strict=True):
        pen.text((x, 4), name, fill="black", font=font)
        sheet.paste(block, (x, top))
        x += block.width + gap
    sheet.quantize(256).save(path, optimize=True)


def enlarged(pixels: np.ndarray, zoom: int) -> Image.Image:
    """(3, H, W) uint8 -> image."""
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return ImageOps.scale(image, zoom, Image.Resampling.NEAREST)


def report(out: Path, runs: list[Run], count: int, command: str, docs: Path | None) -> None:
    """Print concept@1 of every model; with a folder `docs`, write results.json, the page and its images there."""
    results = Results(out, runs, count)
    models = [model for model in LABELS if any(run.config == model for run in results.runs)]
    target = docs or out
    target.mkdir(exist_ok=True)

    cells = dict.fromkeys((run.config, c.steps, c.guidance, c.s_ratio) for run in results.runs for c in run.cells)
    rows = [row for cell in cells if (row := results.row(*cell))]
    everything = {
        "command": command,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {device_name(torch.device('cpu'))}",
        "images_per_cell": count,
        "cpu_seconds": {model: results.cpu_seconds(model) for model in models},
        "real": results.ceilings,
        "rows": rows,
    }
    file = Path(__file__).with_name("results.json") if docs else out / "results.json"
    file.write_text(json.dumps(everything, indent=1, default=float) + "\n")

    curves(results, models, target / "emoji_curves.png")
    image_grid(results, models, target / "emoji_grid.png")
    main = table_of_sets(results, models)
    print(main)
    if docs:
        facts = {
            **{key: everything[key] for key in ("command", "machine")},
            **results.setting,
            "count": count,
            "main": main,
            "guided": table_of_sets(results, models, 2.0),
            "sweep": sweep_table(results, models),
            "ratios": ratio_table(results, models),
            "copy": COPY,
            "cost": table(
                ["model", "CPU-seconds of one training run"],
                [[LABELS[model], number(results.cpu_seconds(model), 0)] for model in models],
            ),
        }
        page = Path(__file__).with_name("page.md").read_text(encoding="utf-8")
        (docs / "emoji.md").write_text(page.format(**facts), encoding="utf-8")
