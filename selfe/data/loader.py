"""This rank's micro-batches of a dataset, prefetched by worker processes."""

from __future__ import annotations

import math
import multiprocessing
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from selfe import signals
from selfe.data.buckets import balance
from selfe.device import is_accelerator
from selfe.distributed import collectives
from selfe.distributed.collectives import World
from selfe.errors import UserError
from selfe.protocols import Data
from selfe.types import Batch, Split, StoredCaptions

OPTION = "trainer.num_workers"
AHEAD = 2  # batches that each worker prepares in advance
SHARED = Path("/dev/shm")  # through which workers hand over batches (Linux)
MORE_SHARED = "start the container with --ipc=host or --shm-size=8g, or lower"  # the number of workers


def make_loader(part: MicroBatches, order: Iterable[tuple[int, int]], num_workers: int) -> Iterator[Batch | UserError]:
    """Iterate over the micro-batches of (step, place) pairs, in order."""
    loader = DataLoader(
        Shared(part, num_workers),
        sampler=order,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=AHEAD if num_workers else None,
        pin_memory=is_accelerator(part.world.device),
        worker_init_fn=signals.outlast_stops,
        generator=torch.Generator(),  # keeps DataLoader from advancing the global generator
    )
    return WatchedLoader(loader, f"rank {part.world.rank}", OPTION)


class WatchedLoader(Iterator):
    """The items of a DataLoader; a worker that was ended by a signal is reported in one line.

    torch raises an error wherever the main thread is when a worker ends. Here it is raised instead of the next item
    that is missing, within seconds.
    """

    def __init__(self, loader: DataLoader, owner: str, option: str):
        """`owner` of the workers and the `option` that sets their number, for error messages."""
        self.owner, self.option = owner, option

        # start the workers, without torch's handler for the end of a child process
        handler, children = signal.getsignal(signal.SIGCHLD), set(multiprocessing.active_children())
        try:
            self.items = iter(loader)
        except OSError as error:
            message = f"the data workers of {owner} cannot be started: {error.strerror}; {MORE_SHARED} {option}"
            raise UserError(message) from error
        self.workers = [child for child in multiprocessing.active_children() if child not in children]
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)

    def __next__(self) -> Any:
        try:
            return next(self.items)
        except (RuntimeError, OSError, EOFError) as error:  # OSError: the batch of a worker that has just ended
            self.raise_if_worker_ended(error)
            raise

    def raise_if_worker_ended(self, error: Exception) -> None:
        """Raise UserError if a worker was ended by a signal."""
        ended = connection.wait([worker.sentinel for worker in self.workers], timeout=1)
        for worker in self.workers:
            if worker.sentinel in ended:
                worker.join(1)  # its exit code is there a moment after its files are closed
            if (worker.exitcode or 0) < 0:
                name = signal.Signals(-worker.exitcode).name
                causes = {"SIGKILL": " (often: out of memory)", "SIGBUS": f" (often: {SHARED} is full)"}
                remedy = f"{MORE_SHARED} {self.option}" if name == "SIGBUS" else f"lower {self.option}"
                message = f"data worker of {self.owner} was ended by {name}{causes.get(name, '')}; {remedy}"
                raise UserError(message) from error


class Shared(Dataset):
    """Micro-batches; in a worker process, in shared memory, where a lack of it can be reported."""

    def __init__(self, part: MicroBatches, num_workers: int):
        self.part = part
        # the most that can be waiting: those prepared in advance, and the one in use, by every process of this machine
        self.copies = (AHEAD * num_workers + 1) * collectives.local_size(part.world)
        self.room = shutil.disk_usage(SHARED).free if SHARED.is_dir() else math.inf

    def __getitem__(self, index: tuple[int, int]) -> Batch | UserError:
        batch = self.part[index]
        if isinstance(batch, UserError) or get_worker_info() is None:
            return batch

        needed = self.copies * batch.num_bytes
        if needed > self.room:
            sizes = f"need {needed / 1e6:.1f} MB of {SHARED}, which has {self.room / 1e6:.1f}"
            return UserError(f"the data workers {sizes}; {MORE_SHARED} {OPTION}")
        batch = batch.flattened()
        try:
            share(batch, OPTION)
        except UserError as error:
            return error
        return batch


def share(item: Tensor | Batch, option: str) -> None:
    """Move an item to shared memory if this is a worker process, so that a lack of it is an error here.

    Otherwise torch would do so in a thread, print a traceback there, and the main process would wait for ever.

    Raises:
        UserError: there is not enough; the message names the `option` that sets the number of workers.
    """
    if get_worker_info() is None:
        return
    try:
        item.share_memory_()
    except RuntimeError as error:
        raise UserError(f"{SHARED} is full ({error}); {MORE_SHARED} {option}") from error


@dataclass(frozen=True)
class MicroBatches(Dataset):
    """One rank's micro-batches by (step, place), balanced over ranks. Stateless.

    A `UserError` is returned, not raised: DataLoader would wrap an exception of a worker in its traceback.
    """

    data: Data
    seed: int
    samples_at: Callable[[int], range]  # training step -> sample numbers of its global batch, counted over the run
    micro: int  # samples of a micro-batch, at most
    multiple: int  # neighbouring positions that stay on one rank
    world: World
    split: Split
    # (prompts, positions, step) -> stored encodings of the captions that the step needs
    read_captions: Callable[[Sequence[str], Sequence[int], int], StoredCaptions] | None = None

    def __getitem__(self, index: tuple[int, int]) -> Batch | UserError:
        """Micro-batch `place` of a step on this rank."""
        step, place = index
        samples = self.samples(step)
        micro = micro_batch_size(len(samples) // self.world.size, self.micro, self.multiple)

        try:
            costs = self.data.costs(self.seed, step, samples, self.split)
            positions = balance(costs, self.world.size, micro, self.multiple)[self.world.rank][place]
            batch = self.data.batch(self.seed, step, samples, positions, self.split)
            if self.read_captions is None:
                return batch
            return replace(batch, text=self.read_captions(batch.prompts, batch.positions, step))
        except UserError as error:
            return error

    def samples(self, step: int) -> range:
        """Sample numbers of the global batch of a step."""
        if self.split == "train":
            return self.samples_at(step)

        # validation keeps the batch size of step 0, so that its loss is comparable over a run
        total = len(self.samples_at(0))
        return range(step * total, (step + 1) * total)


def micro_batch_size(per_rank: int, most: int, multiple: int) -> int:
    """The largest divisor of the `per_rank` samples of a step that is a multiple of `multiple` and at most `most`.

    Returns 0 if there is none.
    """
    sizes = range(multiple, min(per_rank, most) + 1, multiple)
    return max((size for size in sizes if per_rank % size == 0), default=0)


def raise_if_error(batch: Batch | UserError) -> Batch:
    """The batch, or raise the error that a worker returned."""
    if isinstance(batch, UserError):
        raise batch
    return batch
