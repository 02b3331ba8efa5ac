"""Complete runs of three steps inside of the processes of `on_ranks`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from selfe import config
from selfe.distributed import collectives
from selfe.distributed.collectives import World
from selfe.train import Trainer
from tests.helpers.train_processes import QUICK, files, lines

HALF, LAST = Path("checkpoints/step_00000002"), Path("checkpoints/step_00000003")


def train(world: World, folder: Path, overrides: Sequence[str], path: Path = QUICK) -> None:
    """Train to step 3 with a checkpoint after step 2; relative paths are those of the root of the repository."""
    settings = config.load(path, [*overrides, f"trainer.output_dir={folder}", "trainer.stop_step=3"])
    with torch.device("meta"):
        system = config.build(settings, "system")
    data, trainer = config.build(settings, "data"), config.build(settings, "trainer")
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        config.save(settings, folder / "config.yaml")
    Trainer(trainer, system, data, settings["seed"], world).run(settings)


def train_and_resume(world: World, runs: dict[str, Sequence[str]], folder: str) -> dict:
    """For each list of overrides: three steps, and the third of them again from the checkpoint of the second."""
    for name, overrides in runs.items():
        once, resumed = Path(folder, name, "once"), Path(folder, name, "resumed")
        train(world, once, overrides)
        if world.is_main:
            shutil.copytree(once / HALF, resumed / HALF)
        collectives.barrier()
        train(world, resumed, overrides)
    return {}


def assert_resumed(folder: Path) -> None:
    """Both runs of `train_and_resume` end with the same state and the same metrics."""
    once, resumed = folder / "once", folder / "resumed"
    assert files(once / LAST) == files(resumed / LAST), folder.name
    assert lines(once)[-1] == lines(resumed)[-1], folder.name
