"""The process group, and all communication between ranks except that of gradients and parameters."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from selfe.device import choose_device, to_device
from selfe.errors import PeerFailure, UserError
from selfe.signals import Stopped

Group = dist.ProcessGroup
# Global, like the default process group: the store that carries notes, and the group for objects in host memory.
_notes: dist.Store
_host: Group
_posted = False  # whether this process has published its failure
LOST = "lost the connection to node 0; the output of its launcher names the reason"
# Of several algorithms that NCCL may choose, those that always add in the same order. Read when a group is set up.
DETERMINISTIC = {"NCCL_NVLS_ENABLE": "0", "NCCL_COLLNET_ENABLE": "0", "NCCL_ALGO": "Ring"}


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
def process_group(timeout_minutes: float = 10, deterministic: bool = False) -> Iterator[World]:
    """Set up the default process group from torchrun's environment variables, or a group of one; destroy it on exit.

    An error that leaves the block is published for the other processes (`post_failure`). If it was caused by the end of
    another process, that process's failure is raised instead.

    Raises:
        PeerFailure: another process has failed.
    """
    global _notes, _host, _posted
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(int(os.environ.get("LOCAL_RANK", 0)))
    if deterministic:
        os.environ |= DETERMINISTIC

    # The store that sets up the group also carries notes; a clone, because a wait of one thread blocks the others.
    store = dist.HashStore() if size == 1 else open_store(size)
    _notes, _posted = with_notes(store.clone()), False

    # On accelerators the default group gets one backend, bound to the device, and objects go through a second group.
    on_host = device.type == "cpu"
    options = {"timeout": timedelta(minutes=timeout_minutes)} | ({} if on_host else {"device_id": device})
    dist.init_process_group(store=store, rank=rank, world_size=size, **options)
    _host = dist.group.WORLD if on_host else host_group(timeout_minutes)

    failed = True
    try:
        yield World(rank, size, device)
        failed = False
    except Stopped:
        raise
    except Exception as error:
        if size == 1:
            raise
        # A process that ends breaks the collectives of the others, possibly before its failure is published.
        if isinstance(error, RuntimeError) and (failure := wait_for_failure(seconds=3)):
            raise PeerFailure(failure) from error
        node, what = os.environ.get("GROUP_RANK", "0"), f"{type(error).__name__}: {error}".splitlines()[0]
        post_failure(str(error) if isinstance(error, UserError) else f"process {rank} of node {node} failed: {what}")
        raise
    finally:
        # After a failure the other ranks may be blocked in a collective; destroying the group would wait for them and
        # delay the error report.
        if size == 1 or not failed:
            dist.destroy_process_group()


def open_store(size: int) -> dist.Store:
    """Rendezvous store: a file if the launcher sets SELFE_STORE, otherwise torchrun's address and port."""
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if path := os.environ.get("SELFE_STORE"):
        return dist.FileStore(f"{path}_{restart}", size)
    store, _, _ = next(dist.rendezvous("env://"))
    return dist.PrefixStore(restart, store)


def with_notes(store: dist.Store) -> dist.Store:
    """The part of a store that carries notes."""
    return dist.PrefixStore("notes", store)


def launcher_notes(restart: str, size: int, address: tuple[str, int] | None) -> dist.Store:
    """The notes of the ranks, for their launcher: through SELFE_STORE, or through an address and port."""
    if address is None:
        return with_notes(dist.FileStore(f"{os.environ['SELFE_STORE']}_{restart}", size))
    store = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=10))
    return with_notes(dist.PrefixStore(restart, store))


def local_size(world: World) -> int:
    """Number of processes of the job on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world.size))


def set_note(name: str, note: str) -> None:
    """Publish a note for the other processes through the store; works even if collectives hang."""
    _notes.set(name, note)


def get_note(name: str) -> str | None:
    """The note published under this name by any process, or None."""
    return _notes.get(name).decode() if _notes.check([name]) else None


def post_failure(message: str) -> None:
    """Publish why this process fails, unless another failure was published before."""

    def publish() -> None:
        global _posted
        with suppress(dist.DistError):
            _posted = publish_failure(_notes, message)

    briefly(publish, 3)


def publish_failure(notes: dist.Store, message: str) -> bool:
    """Publish the failure of a process; False if another failure was published before."""
    if notes.check(["failure"]):
        return False
    notes.set("failure", message)
    return True


def failure_of_another() -> str | None:
    """Why another process has failed; None as long as all run, and if the store does not respond."""
    with suppress(dist.DistError):
        return None if _posted else get_note("failure")
    return None


def wait_for_failure(seconds: float) -> str | None:
    """After a collective has failed: wait at most some seconds until another process has published its failure."""
    end = time.monotonic() + seconds

    def look() -> str | None:
        while True:
            try:
                failure = None if _posted else get_note("failure")
            except dist.DistError:
                return LOST
            if failure or time.monotonic() > end:
                return failure
            time.sleep(0.1)

    return briefly(look, seconds + 2, otherwise=LOST)


def briefly(action: Callable[[], Any], seconds: float, otherwise: Any = None) -> Any:
    """The result of `action()`, or `otherwise` if it takes longer: the machine that holds the store may be gone."""
    results = []
    thread = threading.Thread(target=lambda: results.append(action()), daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else otherwise


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
    dist.gather_object(value, values, group=_host)
    return values or []


def gather_on_all(value: Any, world: World) -> list[Any]:
    """The values of all ranks on every rank. For small picklable objects."""
    values = [None] * world.size
    dist.all_gather_object(values, value, group=_host)
    return values


def broadcast(value: Any, world: World) -> Any:
    """Rank 0's value on every rank. For small picklable objects."""
    values = [value if world.is_main else None]
    dist.broadcast_object_list(values, src=0, group=_host)
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
    dist.barrier(group=_host)
