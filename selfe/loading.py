"""From a data set to this rank's micro-batches, loaded ahead by worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch.utils.data import DataLoader, Dataset

from selfe.dist import World
from selfe.types import Batch, Data, UserError


def ahead(part: MicroBatches, order: Iterable[tuple[int, int]], num_workers: int) -> Iterator[Batch | UserError]:
    """The micro-batches of (step, place) pairs."""
    loader = DataLoader(
        part,
        sampler=order,
        batch_size=None,
        num_workers=num_workers,
        generator=torch.Generator(),  # the loader would otherwise draw from the global one
    )
    return iter(loader)


@dataclass(frozen=True)
class MicroBatches(Dataset):
    """One rank's micro-batches by step and place.

    A user's mistake is handed over, not raised: an exception that crosses processes arrives as a traceback.
    """

    data: Data
    seed: int
    total_at: Callable[[int], int]  # step -> size of the global batch
    micro: int
    world: World
    split: Literal["train", "val"]

    def __getitem__(self, index: tuple[int, int]) -> Batch | UserError:
        """This rank's micro-batch number `place` of a step."""
        step, place = index
        total = self.total_at(step if self.split == "train" else 0)
        first = self.world.rank * (total // self.world.size) + place * self.micro
        try:
            return self.data.batch(self.seed, step, total, range(first, first + self.micro), self.split)
        except UserError as error:
            return error


def expect(batch: Batch | UserError) -> Batch:
    if isinstance(batch, UserError):
        raise batch
    return batch
