"""Loggers for metrics and images: `metrics.jsonl` always, Weights & Biases and TensorBoard on request.

All use the same names and the same step: the number of completed steps, as checkpoints and sample grids do.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import yaml
from PIL import Image

from selfe.errors import UserError
from selfe.protocols import Logger


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases settings."""

    mode: Literal["disabled", "offline", "online"] = "disabled"  # offline runs are uploaded later by `wandb sync`
    project: str = "selfe"  # name of the project
    entity: str | None = None  # user or team; null: that of the login
    group: str | None = None  # name under which wandb groups runs
    tags: tuple[str, ...] = ()  # labels of the run
    name: str | None = None  # of the run; null: the name of output_dir


class Sink(Protocol):
    """One logger. `step`: completed steps; a resumed run logs the steps since its checkpoint again."""

    def numbers(self, step: int, values: dict[str, float]) -> None: ...

    def image(self, step: int, name: str, path: Path) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """`metrics.jsonl`, one object per logged step; the values of an evaluation have an object of their own.

    On resuming after `start` steps, lines of steps that will be repeated are dropped, so that nothing is in the file
    twice.
    """

    def __init__(self, folder: Path, start: int, name: str = "metrics.jsonl"):
        self.path = folder / name
        kept = []
        if self.path.exists():
            *complete, _ = self.path.read_bytes().split(b"\n")
            kept = [line + b"\n" for line in complete if json.loads(line)["step"] <= start]

        # write and rename, so that a kill leaves either the old or the new file
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_bytes(b"".join(kept))
        partial.rename(self.path)

    def numbers(self, step: int, values: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "time": time.time()} | values) + "\n")

    def image(self, step: int, name: str, path: Path) -> None:
        """Nothing to do: the image is already in the output directory."""

    def close(self) -> None: ...


class WandbRun:
    """Weights & Biases. A resumed run continues the same W&B run, whose id is in `wandb_run.txt`."""

    def __init__(self, folder: Path, settings: WandbConfig, record: dict):
        import wandb  # slow to import and only used here

        # id of the W&B run, created once
        known = folder / "wandb_run.txt"
        if not known.is_file():
            known.write_text(f"{folder.name}-{secrets.token_hex(4)}\n")
        run_id = known.read_text().strip()

        self.wandb = wandb
        try:
            self.run = wandb.init(
                mode=settings.mode,
                project=settings.project,
                entity=settings.entity,
                group=settings.group,
                tags=settings.tags or None,
                name=settings.name or folder.name,
                id=run_id,
                resume="allow",
                dir=folder,
                config=record,
            )
        except wandb.Error as error:
            raise UserError(
                f"trainer.wandb: {str(error).splitlines()[0]}; run .venv/bin/wandb login, or set mode=offline"
            ) from error

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self.run.log({name: self.wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    """Event files in `tensorboard/`. Steps after `start`, logged before an interruption, are purged."""

    def __init__(self, folder: Path, start: int, record: dict):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "trainer.tensorboard: package tensorboard is not installed; run scripts/setup.sh --extra tensorboard"
            ) from error

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        text = yaml.safe_dump(record, sort_keys=False, allow_unicode=True)
        self.writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()), start)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, path: Path) -> None:
        self.writer.add_image(name, np.asarray(Image.open(path)), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class Loggers:
    """All loggers of a run; none on ranks other than 0."""

    def __init__(
        self,
        folder: Path,
        start: int,
        wandb: WandbConfig,
        tensorboard: bool,
        others: Sequence[Logger],
        record: dict,
        is_main: bool,
    ):
        """
        Args:
            folder: output directory of the run.
            start: completed steps of the checkpoint that the run continues from.
            others: loggers of the config, which are opened here.
            record: the complete config as YAML types, for all loggers but `metrics.jsonl`.
        """
        self.loggers: list[Sink] = []
        if is_main:
            self.loggers.append(JsonLines(folder, start))
            JsonLines(folder, start, "cells.jsonl")  # drops repeated steps; `metrics.write_cells` writes this file
            self.loggers += [WandbRun(folder, wandb, record)] if wandb.mode != "disabled" else []
            self.loggers += [TensorBoard(folder, start, record)] if tensorboard else []
            for logger in others:
                logger.open(folder, start, record)
                self.loggers.append(logger)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        for sink in self.loggers:
            sink.numbers(step, values)

    def image(self, step: int, name: str, path: Path) -> None:
        for sink in self.loggers:
            sink.image(step, name, path)

    def close(self) -> None:
        for sink in self.loggers:
            sink.close()
