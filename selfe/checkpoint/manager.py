"""Asynchronous checkpointing: the state is copied to host memory, then written in the background during training.

Checkpoints are atomic: torch writes and syncs its files to `step_N.partial`, then the marker with their checksums is
written, then the folder is renamed. A failed save (disk full, no permission) is logged and counted; training continues
and earlier checkpoints are not touched.
"""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from selfe import log
from selfe.checkpoint import verify
from selfe.device import is_accelerator
from selfe.distributed import collectives
from selfe.distributed.collectives import World
from selfe.errors import UserError
from selfe.types import MOST_STEPS, check_period, check_range, is_due

PARTIAL, REMOVED = ".partial", ".removed"  # suffixes of folders being written or removed
BEST, RECORD = "best", "best.json"  # the folder of the checkpoint with the best evaluation, and a file in it


@dataclass(frozen=True)
class RetentionPolicy:
    """Which checkpoints are kept, and how many consecutive saves may fail."""

    keep_last: int = 3  # number of newest checkpoints that are kept
    keep_every: int | None = None  # also keep checkpoints whose step is a multiple of this; null: none
    keep_best: int = 1  # also keep this many with the lowest validation loss
    max_failed_saves: int = 3  # failed saves in a row after which the run stops

    def __post_init__(self):
        check_range("keep_last", self.keep_last, 1, MOST_STEPS)
        check_period("keep_every", self.keep_every)
        check_range("keep_best", self.keep_best, 0, MOST_STEPS)
        check_range("max_failed_saves", self.max_failed_saves, 1, MOST_STEPS)


class CheckpointManager:
    """Saves checkpoints of a run. Exists on every rank; `begin` and `finish` must be called by all ranks."""

    def __init__(self, folder: Path, keep: RetentionPolicy, world: World):
        self.folder, self.keep, self.world = folder, keep, world
        # Long timeout: a slow disk must not fail a save, only lost processes should.
        self.group = collectives.host_group(timeout_minutes=120)
        # With an accelerator, the copy in host memory is pinned, which makes copying fast, and kept for the next save.
        self.stager = BlockingAsyncStager(cache_staged_state_dict=is_accelerator(world.device))
        self.thread = ThreadPoolExecutor(1, "save")
        self.pending: Future | None = None
        self.saved: Path | None = None  # last successful save
        self.failures: list[str] = []  # errors since the last successful save
        if world.is_main:
            clear(folder)

    def begin(self, step: int, state: dict, notes: dict | None = None) -> None:
        """Copy the state after `step` steps and start writing it; waits for the previous save.

        Args:
            step: number of finished steps.
            state: training state, copied before this returns.
            notes: extra entries of the marker file; `score` (lower is better) ranks the checkpoint for `keep_best`.

        Raises:
            UserError: too many consecutive saves have failed.
        """
        self.wait()
        if len(self.failures) >= self.keep.max_failed_saves:
            raise UserError(
                f"{self.folder}: {len(self.failures)} consecutive saves failed, the last because {self.failures[-1]}; "
                f"fix this and restart: the run resumes from {self.saved or 'its newest checkpoint'}"
            )
        partial = self.folder / f"step_{step:08d}{PARTIAL}"
        upload = dcp.async_save(
            state,
            storage_writer=dcp.FileSystemWriter(partial),  # syncs every file
            process_group=self.group,
            async_stager=self.stager,
        )
        self.pending = self.thread.submit(self.complete, upload, partial, step, notes or {})

    def wait(self) -> None:
        """Wait for the pending save, if any, and record whether it failed."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        try:
            self.saved, self.failures = pending.result(), []
        except OSError as error:
            self.failures.append(str(error))

    def finish(self) -> Path | None:
        """Wait for the last save and return its folder; None if nothing was saved.

        Raises:
            UserError: the last save failed.
        """
        self.wait()
        if self.failures:
            raise UserError(
                f"{self.folder}: the last save failed because {self.failures[-1]}; fix this and restart: "
                f"the run resumes from {self.saved or 'its newest checkpoint, if there is one'}"
            )
        return self.saved

    def best(self) -> dict[str, Any] | None:
        """The record of the checkpoint that `keep_best` has kept; None without one."""
        path = self.folder / BEST / RECORD
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            log.print_line(f"{path}: cannot be read; the next evaluated checkpoint counts as the best")
            return None

    def keep_best(self, step: int, record: dict[str, Any]) -> bool:
        """Keep the saved checkpoint of a step as the folder `best`, which `prune` never removes; call it on rank 0.

        Files are hard links where the file system has them. Returns False, with a message, if it was not possible.

        Args:
            record: stored in the folder, JSON values.
        """
        source = self.folder / f"step_{step:08d}"
        if not verify.is_complete(source):
            log.print_line(f"{source}: no complete checkpoint, so it is not kept as {self.folder / BEST}")
            return False

        partial, final = self.folder / (BEST + PARTIAL), self.folder / BEST
        try:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source, partial, copy_function=link_or_copy)
            (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            sync(partial)
            if final.exists():
                remove(final)
            partial.rename(final)
            sync(self.folder)
        except OSError as error:
            log.print_line(f"the checkpoint of step {step} could not be kept as {final}: {error}")
            return False
        return True

    def complete(self, upload: Future, partial: Path, step: int, notes: dict) -> Path:
        """Wait until torch has written the files, then publish them; runs in a background thread of every rank.

        Raises:
            OSError: on all ranks, if writing failed on any of them.
        """
        world, group = self.world, self.group
        final = partial.with_suffix("")
        try:
            wait_for(upload, self.folder)
            parts = collectives.run_on_all_ranks(lambda: written_files(partial, world.rank), world, group)
            files = {name: entry for part in parts for name, entry in part.items()}
            marker = {"step": step, "processes": world.size, "files": files} | notes
            collectives.run_on_all_ranks(lambda: world.is_main and publish(partial, final, marker), world, group)
        except OSError as error:
            if world.is_main:
                log.print_line(f"the checkpoint of step {step} could not be saved: {error}")
                shutil.rmtree(partial, ignore_errors=True)
            raise

        if world.is_main:
            prune(self.folder, self.keep)
        return final


def wait_for(upload: Future, folder: Path) -> None:
    """Wait until torch has written the files of all ranks.

    Raises:
        OSError: on all ranks, if writing failed on any of them.
    """
    try:
        upload.result()
    except CheckpointException as error:  # not an Exception; holds the errors of the ranks that failed
        rank, (cause, _) = next(iter(error.failures.items()))
        # A full disk is a RuntimeError of torch's zip writer.
        if not isinstance(cause, OSError | RuntimeError):
            raise RuntimeError(str(error)) from error
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        what = f"{cause}".splitlines()[0]
        raise OSError(f"process {rank}: {what}; {free / 2**20:.0f} MiB free in {folder}") from error


def written_files(partial: Path, rank: int) -> dict[str, list[int]]:
    """{name: [size in bytes, CRC-32]} of the files that this rank has written."""
    names = [*partial.glob(f"__{rank}_*"), *([partial / ".metadata"] if rank == 0 else ())]
    return {path.name: [path.stat().st_size, verify.checksum(path)] for path in names}


def publish(partial: Path, final: Path, marker: dict) -> None:
    """Write the marker, then rename the folder; each step is synced before the next."""
    verify.write_marker(partial, marker)
    sync(partial)

    if final.exists():  # damaged: a valid one would have been resumed from
        remove(final)
    partial.rename(final)
    sync(final.parent)


def sync(folder: Path) -> None:
    """fsync a folder, which makes its file names durable."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def link_or_copy(source: str, target: str) -> None:
    """A hard link, or a copy where the file system has no links. Files of a checkpoint never change."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def remove(path: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that an interrupted removal does not leave a damaged checkpoint."""
    gone = path.with_name(path.name + REMOVED)
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def clear(folder: Path) -> None:
    """Remove leftovers of interrupted saves and removals."""
    for name, suffix in product(("step_*", BEST), (PARTIAL, REMOVED)):
        for path in folder.glob(f"{name}{suffix}"):
            shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, keep: RetentionPolicy) -> None:
    """Remove the checkpoints that the policy does not keep. Damaged ones are neither counted nor removed."""
    markers = {path: verify.read_marker(path) for path in verify.list_checkpoints(folder) if verify.is_complete(path)}
    scored = [path for path, marker in markers.items() if marker.get("score") is not None]
    best = sorted(scored, key=lambda path: markers[path]["score"])[: keep.keep_best]
    last = list(markers)[: keep.keep_last]

    for path, marker in markers.items():
        if path not in best + last and not is_due(marker["step"], keep.keep_every):
            remove(path)
