"""This rank's micro-batches of a dataset, prefetched by worker processes."""

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
    """Iterate over the micro-batches of (step, place) pairs, in order."""
    loader = DataLoader(
        part,
        sampler=order,
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=signals.ignore,
        generator=torch.Generator(),  # keeps DataLoader from advancing the global generator
    )
    return iter(loader)


@dataclass(frozen=True)
class MicroBatches(Dataset):
    """One rank's micro-batches by (step, place), balanced over ranks. Stateless.

    A `UserError` is returned, not raised: DataLoader would wrap an exception of a worker in its traceback.
    """

    data: Data
    seed: int
    samples_at: Callable[[int], range]  # training step -> sample numbers of its global batch, counted over the run
    micro: int
    multiple: int  # neighbouring positions that stay on one rank
    world: World
    split: Split

    def __getitem__(self, index: tuple[int, int]) -> Batch | UserError:
        """Micro-batch `place` of a step on this rank."""
        step, place = index
        samples = self.samples(step)

        try:
            costs = self.data.costs(self.seed, step, samples, self.split)
            positions = balance(costs, self.world.size, self.micro, self.multiple)[self.world.rank][place]
            return self.data.batch(self.seed, step, samples, positions, self.split)
        except UserError as error:
            return error

    def samples(self, step: int) -> range:
        """Sample numbers of the global batch of a step."""
        if self.split == "train":
            return self.samples_at(step)

        # validation keeps the batch size of step 0, so that its loss is comparable over a run
        total = len(self.samples_at(0))
        return range(step * total, (step + 1) * total)


def raise_if_error(batch: Batch | UserError) -> Batch:
    """The batch, or raise the error that a worker returned."""
    if isinstance(batch, UserError):
        raise batch
    return batch
