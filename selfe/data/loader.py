"""From a data set to this rank's micro-batches, loaded ahead by worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from selfe import signals
from selfe.data.buckets import balance
from selfe.distributed.collectives import World
from selfe.protocols import Data
from selfe.types import Batch, Split, UserError


def make_loader(part: MicroBatches, order: Iterable[tuple[int, int]], num_workers: int) -> Iterator[Batch | UserError]:
    """The micro-batches of (step, place) pairs."""
    loader = DataLoader(
        part,
        sampler=order,
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=signals.ignore,
        generator=torch.Generator(),  # the loader would otherwise draw from the global one
    )
    return iter(loader)


@dataclass(frozen=True)
class MicroBatches(Dataset):
    """One rank's micro-batches by step and place, dealt so that all ranks have equal work.

    A user's mistake is handed over, not raised: an exception that crosses processes arrives as a traceback.
    """

    data: Data
    seed: int
    samples_at: Callable[[int], range]  # step of training -> its global batch, numbered over the run
    micro: int
    multiple: int  # positions that stay together
    world: World
    split: Split

    def __getitem__(self, index: tuple[int, int]) -> Batch | UserError:
        """This rank's micro-batch number `place` of a step."""
        step, place = index
        samples = self.samples(step)
        try:
            costs = self.data.costs(self.seed, step, samples, self.split)
            positions = balance(costs, self.world.size, self.micro, self.multiple)[self.world.rank][place]
            return self.data.batch(self.seed, step, samples, positions, self.split)
        except UserError as error:
            return error

    def samples(self, step: int) -> range:
        if self.split == "train":
            return self.samples_at(step)
        total = len(self.samples_at(0))  # validation keeps the first size, so that only the weights change its value
        return range(step * total, (step + 1) * total)


def raise_if_error(batch: Batch | UserError) -> Batch:
    if isinstance(batch, UserError):
        raise batch
    return batch
