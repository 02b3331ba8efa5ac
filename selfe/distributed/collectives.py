"""The process group, and all communication between ranks except that of gradients and parameters."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from selfe.device import choose_device, to_device
from selfe.types import UserError

Group = dist.ProcessGroup
_notes: dist.Store  # global, like the default process group


@dataclass(frozen=True)
class World:
    """Rank of this process, number of processes, and device of this process."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def process_group(timeout_minutes: float = 10) -> Iterator[World]:
    """Set up the default process group from torchrun's environment variables, or a group of one; destroy it on exit."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(int(os.environ.get("LOCAL_RANK", 0)))

    # The store that sets up the group also carries notes (`set_note`).
    global _notes
    store = _store(size)
    _notes = dist.PrefixStore("notes", store)
    dist.init_process_group(store=store, rank=rank, world_size=size, timeout=timedelta(minutes=timeout_minutes))

    failed = True
    try:
        yield World(rank, size, device)
        failed = False
    finally:
        # After a failure the other ranks may be blocked in a collective; destroying the group would wait for them and
        # delay the error report.
        if size == 1 or not failed:
            dist.destroy_process_group()


def _store(size: int) -> dist.Store:
    """Rendezvous store: a file if the launcher sets SELFE_STORE, otherwise torchrun's address and port."""
    if size == 1:
        return dist.HashStore()
    if path := os.environ.get("SELFE_STORE"):
        return dist.FileStore(f"{path}_{os.environ['TORCHELASTIC_RESTART_COUNT']}", size)
    store, _, _ = next(dist.rendezvous("env://"))
    return store


def local_size(world: World) -> int:
    """Number of processes of the job on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world.size))


def set_note(name: str, note: str) -> None:
    """Publish a note for the other processes through the store; works even if collectives hang."""
    _notes.set(name, note)


def get_note(name: str) -> str | None:
    """The note published under this name by any process, or None."""
    return _notes.get(name).decode() if _notes.check([name]) else None


def sync_step_outcome(grad_norm: Tensor, loss: Tensor, signal: int) -> tuple[float, float, int]:
    """What all ranks know after a step, in one small all-reduce and one wait for the device.

    Returns the gradient norm (bitwise the same on all ranks), the mean of the ranks' losses, and the signal that asked
    any rank to stop (0: none).
    """
    stop = to_device(torch.tensor([float(signal > 0), float(signal)], dtype=torch.float64), grad_norm.device)
    values = torch.cat([torch.stack([grad_norm, loss]).double(), stop])
    dist.all_reduce(values)
    norm, loss, stops, signals = values.tolist()
    size = dist.get_world_size()
    return norm / size, loss / size, round(signals / max(stops, 1))


def mean_over_ranks(rows: dict[str, list[Tensor]], device: torch.device) -> dict[str, float]:
    """Mean of each metric over the values of all ranks. `rows`: name -> 1-D tensors; the same names on all ranks."""
    names = sorted(rows)
    values = [torch.cat(rows[name]).double() for name in names]
    sums = torch.stack([torch.stack([v.sum() for v in values]), torch.tensor([len(v) for v in values]).to(device)])
    dist.all_reduce(sums)
    return dict(zip(names, (sums[0] / sums[1]).tolist(), strict=True))


def sum_over_ranks(values: Tensor) -> Tensor:
    """All-reduce (sum) in place; returns `values`."""
    dist.all_reduce(values)
    return values


def gather(value: Any, world: World) -> list[Any]:
    """The values of all ranks on rank 0, an empty list on other ranks. For small picklable objects."""
    values = [None] * world.size if world.is_main else None
    dist.gather_object(value, values)
    return values or []


def broadcast(value: Any, world: World) -> Any:
    """Rank 0's value on every rank. For small picklable objects."""
    values = [value if world.is_main else None]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def host_group(timeout_minutes: float) -> Group:
    """A separate gloo group of all ranks, for background threads that must not interfere with training collectives."""
    return dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))


def run_on_all_ranks(action: Callable[[], Any], world: World, group: Group) -> list[Any]:
    """Run `action()` on every rank and return the results of all ranks.

    Raises:
        OSError: on all ranks, if `action` raised OSError on any of them.
    """
    try:
        mine = (action(), None)
    except OSError as error:
        mine = (None, f"process {world.rank}: {error}")

    everyone = [None] * world.size
    dist.all_gather_object(everyone, mine, group=group)
    if errors := [error for _, error in everyone if error]:
        raise OSError(errors[0])
    return [result for result, _ in everyone]


@contextmanager
def on_main(context: AbstractContextManager, world: World) -> Iterator[None]:
    """Enter a context on rank 0 only. A UserError that it raises on entry is raised on all ranks."""
    with ExitStack() as stack:
        problem = None
        if world.is_main:
            try:
                stack.enter_context(context)
            except UserError as error:
                problem = str(error)

        if problem := broadcast(problem, world):
            raise UserError(problem)
        yield


def barrier() -> None:
    """Wait until all ranks get here."""
    dist.barrier()
