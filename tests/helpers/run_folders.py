"""Output folders of training runs as the trainer writes them, without training."""

import json
import math
from pathlib import Path

from PIL import Image

from selfe import config
from selfe.evaluation import results
from selfe.evaluation.results import Evaluation, Value
from selfe.io import image_encode

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs/debug/selfe_smoke.yaml"
PROMPTS = ("a red bird on a branch", "<b>a cat</b> & 'a dog'")
ACTIVITIES = {"data": 0.05, "encode": 0.15, "forward": 0.3, "self_evaluation": 0.1, "backward": 0.35, "optimizer": 0.05}
BINS = 4


def overrides(steps: int) -> list[str]:
    return [
        f"trainer.max_steps={steps}",
        f"system.objective.params.start_step={steps // 4}",
        f"system.objective.params.aux_start_step={steps // 2}",
    ]


def line(step: int, offset: float = 0.0) -> dict:
    """A line of metrics.jsonl after `step` steps; validation at every tenth."""
    values = {
        "step": step,
        "time": 1.7e9 + 2 * step,
        "elapsed": 1.5 * step,
        "samples": 8 * step,
        "epoch": step / 4,
        "train/loss": offset + 1 + math.exp(-step / 50) + 0.1 * math.sin(step),
        "train/data_loss": offset + 0.9 + math.exp(-step / 50),
        "train/lr": 1e-4 * min(step / 10, 1),
        "train/grad_norm": 10 ** (1 - step / 100),
        "train/skipped": 0,
        "train/cosine": math.cos(step / 20),
        "speed/images_per_second": 5.0 + offset,
        "speed/mfu": 0.35,
        "memory/peak_gib": 12.5,
    }
    values |= {f"time/{name}": share for name, share in ACTIVITIES.items()}
    if step % 10 == 0:
        values |= {f"{group}/loss": offset + 1 + i / 10 for i, group in enumerate(("val", "val_ema", "val_plain"))}
        values["time/validation"] = 0.1
    return values


def cells(step: int) -> dict:
    """A line of cells.jsonl: tables [t][s], without values for s > t."""
    table = [[round(t + s / 10 + step / 100, 4) if s <= t else None for s in range(BINS)] for t in range(BINS)]
    return {"step": step, "loss": table, "cosine": [[v and round(v - 1, 4) for v in row] for row in table]}


def append(folder: Path, name: str, *lines: dict) -> None:
    with (folder / name).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(each, ensure_ascii=False) + "\n" for each in lines)


def add_sheets(folder: Path, step: int) -> None:
    """Sheets of both weights, in which every image has a colour of its own: (row, column, step)."""
    for i, name in enumerate(("samples", "samples_live")):
        images = [
            [Image.new("RGB", (24, 16), (100 * row, 80 * column, (step + i) % 256)) for column in range(3)]
            for row in range(len(PROMPTS))
        ]
        sheet = image_encode.sample_sheet(images, PROMPTS, (1, 2, 4), f"step {step}")
        image_encode.save_sheet(sheet, folder / name, step)


def make_run(folder: Path, steps: int = 40, offset: float = 0.0, *changes: str) -> Path:
    """A run of `steps` logged steps, with tables, sheets and a checkpoint at every tenth."""
    folder.mkdir(parents=True)
    config.save(config.load(SMOKE, [*overrides(steps), *changes]), folder / "config.yaml")
    start = {
        "time": "2026-01-01T00:00:00Z",
        "command": ["/home/me/selfe/train.py", "configs/debug/selfe_smoke.yaml", f"trainer.name=run {folder.name}"],
        "processes": 1,
        "version": "0.1.0",
        "revision": "0123456789abcdef",
        "config_changes": [],
    }
    append(folder, "starts.jsonl", start)
    append(folder, "metrics.jsonl", *(line(step, offset) for step in range(1, steps + 1)))
    for step in range(10, steps + 1, 10):
        append(folder, "cells.jsonl", cells(step))
        add_sheets(folder, step)
        (folder / f"checkpoints/step_{step:08d}").mkdir(parents=True)
        (folder / f"checkpoints/step_{step:08d}/progress.json").write_text("{}")
    return folder


SAMPLING = {"s_ratio": 0.0, "weights": "ema", "sampler": "renoise", "eta": 1.0, "step": 700, "fingerprint": "0123"}
SIZES = {"count": 50, "prompts": "ab", "seeds": [0], "noise": "ij", "sizes": [[32, 32]], "images": "cd"}


def evaluation(folder: str = "runs/a/images", shift: float = 0, **reference) -> Evaluation:
    """FD at guidance 1 and 3 in 1 and 4 steps, and a CLIP score without intervals."""
    grid = [(cfg_scale, steps) for cfg_scale in (1.0, 3.0) for steps in (1, 4)]
    cells = [{"settings": SAMPLING | {"cfg_scale": cfg_scale, "num_steps": steps}} | SIZES for cfg_scale, steps in grid]
    values = []
    for number, (cfg_scale, steps) in enumerate(grid):
        fd = shift + 10 / steps + cfg_scale
        values.append(Value(number, "dino", "fd", fd, fd - 0.5, fd + 0.5))
        values.append(Value(number, "clip", "clip_score", 20.123456 + steps))
    facts = {"path": "val.tsv", "count": 100, "resized": "unchanged", "images": "ef"} | reference
    records = {"dino": {"weights": "aa"}, "clip": {"weights": "bb"}}
    return Evaluation(folder, cells, facts, records, {"max_features": 10_000, "nearest_k": 5}, 100, values)


def add_evaluation(folder: Path, content: Evaluation | None = None) -> None:
    """An evaluation of a sampling job in this folder."""
    content = content or evaluation()
    image_encode.write(folder / results.FILE, content.to_json().encode())
