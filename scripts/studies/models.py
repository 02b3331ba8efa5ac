"""What the studies have in common: models to train, sampling settings to evaluate, training."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from selfe import config

ROOT = Path(__file__).parents[2]
SCHEDULES = ("start_step", "tau_steps", "alpha_end_step", "r_steps")  # keys of objectives that count steps


@dataclass(frozen=True)
class Cell:
    """One sampling setting: steps, guidance, eta, and r in s_k = t_{k+1} + r (t_k - t_{k+1})."""

    steps: int
    guidance: float = 1.0
    eta: float = 0.0
    s_ratio: float = 0.0

    @property
    def name(self) -> str:
        return f"n{self.steps}_w{self.guidance:g}_eta{self.eta:g}_s{self.s_ratio:g}"


@dataclass(frozen=True)
class Run:
    """One model: a config, a seed, and the sampling settings to evaluate."""

    config: str  # without .yaml
    seed: int
    cells: tuple[Cell, ...]
    configs: str  # folder of the config: configs/mini or configs/emoji
    variant: str = ""  # distinguishes models of the same config
    share: float = 1.0  # of the steps of the config

    @property
    def model(self) -> str:
        return f"{self.config}{self.variant}"

    @property
    def name(self) -> str:
        return f"{self.model}_{self.seed}"

    @property
    def path(self) -> Path:
        return ROOT / self.configs / f"{self.config}.yaml"


def shortened(run: Run, short: tuple[int, int] | None) -> list[str]:
    """Overrides that shorten a run, and scale its schedules in proportion.

    Args:
        short: steps and batch size in place of the config's; `run.share` of these steps are trained.
    """
    if short is None and run.share == 1:
        return []
    settings = config.load(run.path)
    trainer, objective = settings["trainer"], settings["system"]["objective"].get("params", {})

    steps, batch = short or (trainer["max_steps"], trainer["total_batch_size"])
    scale = run.share * steps / trainer["max_steps"]
    lengths = {f"trainer.{key}": trainer[key] for key in ("max_steps", "decay_start")}
    lengths |= {f"system.objective.params.{key}": objective[key] for key in SCHEDULES if key in objective}
    sizes = [f"trainer.{key}={batch}" for key in ("total_batch_size", "micro_batch_size")]
    return sizes + [f"{key}={round(scale * value)}" for key, value in lengths.items()]


def train(run: Run, out: Path, short: tuple[int, int] | None) -> None:
    """Run `selfe.train` in a subprocess, resuming an interrupted run; accumulates its CPU seconds in a file."""
    folder = out / run.name
    if (folder / "cpu_seconds.json").exists() and json.loads((folder / "cpu_seconds.json").read_text())["done"]:
        return

    folder.mkdir(parents=True, exist_ok=True)
    arguments = [str(run.path), f"seed={run.seed}", f"trainer.output_dir={folder}"]
    arguments += shortened(run, short)

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with (folder / "train.log").open("a") as log:
        done = subprocess.run([sys.executable, "-m", "selfe.train", *arguments], cwd=ROOT, stdout=log, stderr=log)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)

    # CPU seconds, those of earlier interrupted attempts included
    path = folder / "cpu_seconds.json"
    seconds = json.loads(path.read_text())["seconds"] if path.exists() else 0
    seconds += after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    path.write_text(json.dumps({"seconds": round(seconds, 1), "done": done.returncode == 0}) + "\n")
    if done.returncode:
        raise SystemExit(f"{run.name}: training failed; see {folder / 'train.log'}")
