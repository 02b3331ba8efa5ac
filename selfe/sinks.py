"""Where a run's numbers and pictures go: a file always, Weights & Biases and TensorBoard when asked."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from selfe.types import UserError


@dataclass(frozen=True)
class Wandb:
    mode: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "selfe"


class Sink(Protocol):
    """One place. `step` counts finished steps less one; a resumed run writes steps that were lost again."""

    def numbers(self, step: int, values: dict[str, float]) -> None: ...

    def picture(self, step: int, name: str, path: Path) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """`metrics.jsonl`, one object per logged step.

    On resuming at `start`, lines of steps that will be run again are dropped, so that the file reads as one run.
    """

    def __init__(self, folder: Path, start: int, name: str = "metrics.jsonl"):
        self.path = folder / name
        kept = []
        if self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < start]
        aside = self.path.with_name(self.path.name + ".partial")  # a kill leaves the old file or the new one
        aside.write_text("".join(kept))
        aside.rename(self.path)

    def numbers(self, step: int, values: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")

    def picture(self, step: int, name: str, path: Path) -> None:
        """The picture is a file already."""

    def close(self) -> None: ...


class WandbRun:
    """Weights & Biases; started again, a run folder goes on with the same run."""

    def __init__(self, folder: Path, settings: Wandb):
        import wandb  # slow to import and not needed otherwise

        known = folder / "wandb_run.txt"
        if not known.is_file():
            known.write_text(f"{folder.name}-{secrets.token_hex(4)}\n")
        name = known.read_text().strip()
        self.wandb = wandb
        where = {"project": settings.project, "name": folder.name, "id": name, "dir": folder, "mode": settings.mode}
        try:
            self.run = wandb.init(**where, resume="allow")
        except wandb.Error as error:
            raise UserError(
                f"trainer.wandb: {str(error).splitlines()[0]}; run .venv/bin/wandb login, or set mode=offline"
            ) from error

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self.run.log({name: self.wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    """Event files in `tensorboard/`; steps from `start` on that an interrupted run wrote are hidden."""

    def __init__(self, folder: Path, start: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "trainer.tensorboard: its package is not installed; run scripts/setup.sh --extra tensorboard"
            ) from error
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start or None)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self.writer.add_image(name, np.asarray(Image.open(path)), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class Sinks:
    """All that a run writes to; on ranks other than the first there are none."""

    def __init__(self, folder: Path, start: int, wandb: Wandb, tensorboard: bool, is_main: bool):
        self.sinks: list[Sink] = []
        if is_main:
            self.sinks.append(JsonLines(folder, start))
            JsonLines(folder, start, "cells.jsonl")  # written elsewhere, but it too reads as one run
            self.sinks += [WandbRun(folder, wandb)] if wandb.mode != "disabled" else []
            self.sinks += [TensorBoard(folder, start)] if tensorboard else []

    def numbers(self, step: int, values: dict[str, float]) -> None:
        for sink in self.sinks:
            sink.numbers(step, values)

    def picture(self, step: int, name: str, path: Path) -> None:
        for sink in self.sinks:
            sink.picture(step, name, path)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()
