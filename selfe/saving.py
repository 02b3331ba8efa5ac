"""Saving in the background: training goes on with the next step while a copy of the state goes to the disk.

A checkpoint is complete or not there: written into `step_N.partial`, synced, the marker last, then renamed. A save that
fails (disk full, no permission) is told and counted; training goes on, and nothing that was saved earlier is touched.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from selfe import checkpoint, dist, log
from selfe.dist import World
from selfe.draft import Draft
from selfe.types import UserError

ASIDE, GONE = ".partial", ".removed"  # suffixes of folders that are no checkpoints (yet, or any more)


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay, and how many saves in a row may fail."""

    keep_last: int = 3
    keep_every: int | None = None  # steps whose multiples stay for good
    keep_best: int = 1  # by validation loss, of those that were validated at their step
    max_failed_saves: int = 3

    def __post_init__(self):
        if self.keep_last < 1 or self.keep_best < 0 or self.max_failed_saves < 1 or self.keep_every == 0:
            raise ValueError("keep_last, keep_every and max_failed_saves must be at least 1, keep_best at least 0")


class Saver:
    """A run's checkpoint folder, on every rank. `begin` and `finish` are called by all ranks alike."""

    def __init__(self, folder: Path, keep: Keep, world: World):
        self.folder, self.keep, self.world = folder, keep, world
        # a slow disk is no reason to give up: the limit only ends a wait for processes that are gone
        self.group = dist.host_group(timeout_minutes=120)
        self.draft: Draft | None = None
        self.thread = ThreadPoolExecutor(1, "save")
        self.pending: Future | None = None
        self.saved: Path | None = None  # the last that succeeded
        self.failures: list[str] = []  # since then
        if world.is_main:
            clear(folder)

    def begin(self, step: int, state: dict, notes: dict | None = None) -> None:
        """Copy the state of `step` finished steps and start to write it; waits for the save before it.

        Raises UserError when too many saves in a row have failed. `notes` go into the marker; a `score` among
        them, lower is better, ranks it.
        """
        self.wait()
        if len(self.failures) >= self.keep.max_failed_saves:
            raise UserError(
                f"{self.folder}: {len(self.failures)} saves in a row failed, the last because {self.failures[-1]}; "
                f"mend that and start again: the run continues from {self.saved or 'its newest checkpoint'}"
            )
        self.stage(state)
        self.pending = self.thread.submit(self.write, step, notes or {})

    def stage(self, state: dict) -> None:
        """Copy a state to host memory. The first one, and one with other names or shapes, is laid out before."""
        fits = self.draft is not None and self.draft.fill(state)
        if not all(dist.together(lambda: fits, self.world, self.group)):
            self.draft = Draft(state, self.world, self.group)
            self.draft.fill(state)

    def wait(self) -> None:
        """Until no save is under way; counts one that failed."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        try:
            self.saved, self.failures = pending.result(), []
        except OSError as error:
            self.failures.append(str(error))

    def finish(self) -> Path:
        """Wait for the last save and return its folder; that it failed is an error, as work would be lost."""
        self.wait()
        if self.failures:
            raise UserError(
                f"{self.folder}: the last save failed because {self.failures[-1]}; mend that and start again: "
                f"the run continues from {self.saved or 'its newest checkpoint, if it has one'}"
            )
        return self.saved

    def write(self, step: int, notes: dict) -> Path:
        """What is staged as a checkpoint, in every rank's background thread. OSError on all ranks if any failed."""
        final = self.folder / f"step_{step:08d}"
        aside = final.with_name(final.name + ASIDE)
        world, group, draft = self.world, self.group, self.draft

        def on_main(action: Callable[[], None]) -> None:
            dist.together(lambda: world.is_main and action(), world, group)

        try:
            on_main(lambda: prepare(aside, draft.num_bytes))
            parts = dist.together(lambda: draft.write(aside), world, group)
            files = {name: entry for part in parts for name, entry in part.items()}
            marker = {"step": step, "processes": world.size, "files": files} | notes
            on_main(lambda: publish(aside, final, marker))
        except OSError as error:
            if world.is_main:
                log.say(f"the checkpoint of step {step} could not be saved: {error}")
                shutil.rmtree(aside, ignore_errors=True)
            raise
        if world.is_main:
            prune(self.folder, self.keep)
        return final


def prepare(aside: Path, needed: int) -> None:
    """An empty folder on a disk with room for `needed` bytes."""
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    free = shutil.disk_usage(aside).free
    if free < needed:
        raise OSError(f"{aside.parent}: {needed / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free on the disk")


def publish(aside: Path, final: Path, marker: dict) -> None:
    """The marker, then the name, each on the disk before the next."""
    with (aside / checkpoint.MARKER).open("w") as file:
        file.write(json.dumps(marker) + "\n")
        file.flush()
        os.fsync(file.fileno())
    sync(aside)
    if final.exists():  # a damaged one, or the run would have continued from it
        remove(final)
    aside.rename(final)
    sync(final.parent)


def sync(folder: Path) -> None:
    """Make the names in a folder durable."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def remove(path: Path) -> None:
    """Renamed first, so that a removal that is interrupted does not look like a damaged checkpoint."""
    gone = path.with_name(path.name + GONE)
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def clear(folder: Path) -> None:
    """Remove what an interrupted save or removal left."""
    for suffix in (ASIDE, GONE):
        for path in folder.glob(f"step_*{suffix}"):
            shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, keep: Keep) -> None:
    """Remove the checkpoints that `keep` does not name; damaged ones are neither counted nor touched."""
    markers = {
        path: checkpoint.read_marker(path) for path in checkpoint.candidates(folder) if checkpoint.is_whole(path)
    }
    scored = [path for path, marker in markers.items() if marker.get("score") is not None]
    best = sorted(scored, key=lambda path: markers[path]["score"])[: keep.keep_best]
    last = list(markers)[: keep.keep_last]
    for path, marker in markers.items():
        milestone = keep.keep_every and marker["step"] % keep.keep_every == 0
        if path not in best + last and not milestone:
            remove(path)
