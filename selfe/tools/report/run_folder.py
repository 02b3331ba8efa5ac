"""What the output folder of a training run contains, read for the page and read again while the run trains."""

from __future__ import annotations

import json
import math
import time
from bisect import bisect_right
from pathlib import Path
from typing import Any

import yaml

from selfe import compare, config
from selfe.errors import UserError
from selfe.evaluation import results
from selfe.evaluation.results import Evaluation
from selfe.io import folder_lock
from selfe.protocols import Objective
from selfe.signals import process_start
from selfe.tools.report import sheets
from selfe.tools.report.columns import AXES, Columns
from selfe.tools.report.lines import JsonLines

MOST_POINTS = 2000  # per metric
MOST_CELLS = 100  # tables over (t, s) per metric
RECENT = 20  # logged lines from which the current speed is computed


class RunFolder:
    """A run: its metrics, tables over (t, s), sample sheets, config and starts.

    Raises UserError if the folder is not that of a run.
    """

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name
        self.files = {kind: JsonLines(path / f"{kind}.jsonl") for kind in ("metrics", "cells", "starts")}
        self.metrics, self.cells, self.starts = Columns(), [], []
        self.settings: dict = {}
        self.config_time = 0.0
        self.objective: Objective | None = None
        self.notes: list[str] = []  # shown with the run
        self.version = 0  # increases whenever something in the folder has changed
        self.sheets: dict[str, dict[int, tuple[Path, int]]] = {}  # weights -> step -> path, time of modification
        self.evaluations: dict[Path, tuple[int, Evaluation]] = {}  # file -> time of modification, content

        if not path.is_dir():
            raise UserError(f"{path}: no such folder; pass the output folder of a training run (trainer.output_dir)")
        self.refresh()
        if not self.settings and not self.metrics.num_lines and not self.evaluations:
            raise UserError(f"{path}: neither config.yaml nor metrics.jsonl; pass the output folder of a training run")

    def refresh(self) -> None:
        """Read what has changed since the last call. Raises UserError for files that cannot be read."""
        changed = [self.refresh_config(), self.refresh_metrics(), self.refresh_lists(), self.refresh_sheets()]
        changed.append(self.refresh_evaluations())
        self.version += any(changed)

    def refresh_config(self) -> bool:
        path = self.path / "config.yaml"
        try:
            modified = path.stat().st_mtime
        except FileNotFoundError:
            return False
        if modified == self.config_time:
            return False

        self.settings = config.resolve(path)
        self.notes = []
        try:
            self.objective = own_objective(self.settings)
        except UserError as error:
            self.objective = None
            self.notes.append(f"Changes of the objective are not marked: {error}")
        self.config_time = modified
        return True

    def refresh_metrics(self) -> bool:
        file = self.files["metrics"]
        replaced, lines = file.read_new()
        if replaced:
            self.metrics = Columns()
        try:
            for line in lines:
                self.metrics.add(line, f"{file.path}: line {self.metrics.num_lines + 1}")
        except UserError:
            # the next call reads the file from the start, whether it was corrected or not
            self.files["metrics"], self.metrics = JsonLines(file.path), Columns()
            raise
        return replaced or bool(lines)

    def refresh_lists(self) -> bool:
        changed = False
        for kind, known in (("cells", self.cells), ("starts", self.starts)):
            replaced, lines = self.files[kind].read_new()
            if replaced:
                known.clear()
            known += lines
            changed |= replaced or bool(lines)
        return changed

    def refresh_sheets(self) -> bool:
        before = self.sheets
        self.sheets = {weights: sheets.files(self.path, weights) for weights in sheets.FOLDERS}
        return self.sheets != before

    def refresh_evaluations(self) -> bool:
        """Read the evaluations of sampling jobs in the folder or of a job itself, and the newest of training."""
        before = self.evaluations
        files = [file for pattern in (".", "*", "*/*") for file in sorted(self.path.glob(f"{pattern}/{results.FILE}"))]
        files += sorted(self.path.glob(f"{results.DURING_TRAINING}/step_*.json"))[-1:]
        modified = {file: file.stat().st_mtime_ns for file in files}
        self.evaluations = {
            file: before[file] if file in before and before[file][0] == time_ns else (time_ns, Evaluation.read(file))
            for file, time_ns in modified.items()
        }
        return self.evaluations != before

    # ---- for the page ----

    def describe(self) -> dict:
        """Everything but images and state, as JSON."""
        return {
            "name": self.name,
            "path": str(self.path),
            **self.metrics.reduced(MOST_POINTS),
            "marks": self.marks(),
            "cells": self.tables(),
            "config": {key: plain_text(value) for key, value in compare.flat(self.settings).items()},
            "starts": [start | {"command": typed_command(start)} for start in self.starts],
            "notes": self.notes,
            "evaluations": self.quality(),
        }

    def quality(self) -> list[dict]:
        """Curves of metrics over the number of steps: extractor, metric, label, and points by steps."""
        curves = []
        for file, (_, evaluation) in self.evaluations.items():
            is_job = file.name == results.FILE
            origin = file.parent.name if is_job else f"step {evaluation.cells[0]['settings']['step']}"
            origin = f"{origin}, " if len(self.evaluations) > 1 or not is_job else ""
            for curve in results.curves(evaluation):
                curves.append(curve | {"label": origin + curve["label"]})
        return curves

    def tables(self) -> dict:
        """At most `MOST_CELLS` tables [t][s] per metric, with their steps: step, and name -> tables."""
        kept = [self.cells[i] for i in sheets.evenly(len(self.cells), MOST_CELLS)]
        names = dict.fromkeys(name for line in kept for name in line if name not in AXES)
        return {
            "total": len(self.cells),
            "steps": [line["step"] for line in kept],
            "tables": {name: [line.get(name) for line in kept] for name in names},
        }

    def marks(self) -> list[dict]:
        """Steps at which the objective or the schedule changes: `step` (completed before it), `text`."""
        marks = [{"step": step, "text": text} for step, text in self.objective_changes()]

        # schedules of learning rate, batch size and resolution
        for key, phases in compare.flat(self.settings).items():
            if key.endswith(".phases") and isinstance(phases, (list, tuple)):
                for phase in phases:
                    changes = [f"{name} {plain_text(value)}" for name, value in phase.items() if name != "step"]
                    marks.append({"step": phase["step"], "text": ", ".join(changes)})
        return [mark for mark in marks if mark["step"] > 0]

    def objective_changes(self) -> list[tuple[int, str]]:
        """Steps at which the objective gets other terms, and their names, up to the newest logged step."""
        if self.objective is None:
            return []
        phase = self.objective.phase

        changes, before = [], 0
        for completed in map(int, self.metrics.axes["step"]):
            # the step with index i is the one after i completed steps
            last = max(completed - 1, 0)
            if phase(last) != phase(before):
                first = bisect_right(range(before, last + 1), False, key=lambda i, old=before: phase(i) != phase(old))
                changes.append((before + first, phase(last)))
            before = last
        return changes

    # ---- state ----

    def state(self) -> dict:
        """What a run does at present, for the line that is shown while it trains."""
        last = self.metrics.last
        step, end = int(last("step") or 0), self.last_step()
        seconds = self.seconds_per_step()
        checkpoint = self.checkpoint()
        running = self.is_running()
        finished = end is not None and step >= end

        written = last("time")
        return {
            "state": "running" if running else "finished" if finished else "stopped",
            "step": step,
            "end": end,
            "seconds_per_step": seconds,
            "eta": seconds * (end - step) if running and seconds and end is not None and end > step else None,
            "elapsed": last("elapsed"),
            "age": None if written is None else time.time() - written,
            "loss": last("train/loss"),
            "skipped": last("train/skipped"),
            "checkpoint": checkpoint,
            "memory_gib": last("memory/peak_gib"),
            "mfu": last("speed/mfu"),
            "images_per_second": last("speed/images_per_second"),
        }

    def last_step(self) -> int | None:
        """The step at which the run ends; None if its config is not known."""
        trainer = self.settings.get("trainer", {})
        ends = [trainer[key] for key in ("max_steps", "stop_step") if trainer.get(key) is not None]
        return min(ends, default=None)

    def seconds_per_step(self) -> float | None:
        """Over the last `RECENT` lines, with all pauses for validation, samples and checkpoints."""
        steps, elapsed = (self.metrics.axes[name][-RECENT:] for name in ("step", "elapsed"))
        if len(steps) < 2 or steps[-1] == steps[0]:
            return None
        seconds = (elapsed[-1] - elapsed[0]) / (steps[-1] - steps[0])
        return seconds if math.isfinite(seconds) else None

    def checkpoint(self) -> dict | None:
        """Step and age in seconds of the newest complete checkpoint."""
        folders = sorted(self.path.glob("checkpoints/step_*/progress.json"))
        if not folders:
            return None
        return {"step": int(folders[-1].parent.name[5:]), "age": time.time() - folders[-1].stat().st_mtime}

    def is_running(self) -> bool:
        """Whether a live process holds the folder's lock. Writes nothing, unlike `FolderLock`."""
        path = self.path / folder_lock.FILE
        try:
            holder = json.loads(path.read_bytes())
            if holder.get("machine") == folder_lock.machine():
                return process_start(holder["pid"]) == holder["started"]
            return time.time() - path.stat().st_mtime < folder_lock.STALE
        except FileNotFoundError:
            return False
        except ValueError:
            return True  # the holder is writing it


def own_objective(settings: dict) -> Objective | None:
    """The objective of a config, None if the config has none.

    Raises:
        UserError: it cannot be built, or is not part of selfe, so that building it would run code of others.
    """
    described = settings.get("system", {}).get("objective")
    if not described:
        return None
    if foreign := config.foreign_modules([described]):
        raise UserError(f"{foreign[0]} is not part of selfe")
    return config.build_part(described, "system.objective")


def typed_command(start: dict) -> list[str]:
    """The command that starts a run as the recorded one, which is that of a single process: its file and arguments."""
    command = start.get("command") or []
    if not command or Path(command[0]).name != "train.py":
        return command
    return ["selfe", "train", *command[1:2], str(start.get("processes", 1)), *command[2:]]


def plain_text(value: Any) -> str:
    """A value of a config as one line of YAML."""
    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
        .removesuffix("\n...\n")
        .strip()
    )
