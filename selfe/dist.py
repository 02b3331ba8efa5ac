"""Processes: the only home of the process group and FSDP2."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from selfe import blocks
from selfe.blocks import Recompute
from selfe.device import choose_device
from selfe.types import DTYPES, Precision, Read, UserError, at_least

Group = dist.ProcessGroup
_notes: dist.Store  # beside the process group, as global as it is


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def world(timeout_minutes: float = 10) -> Iterator[World]:
    """Join the process group that torchrun's variables describe, or form a group of one; leave it at the end."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(int(os.environ.get("LOCAL_RANK", 0)))
    global _notes
    store = _store(size)
    _notes = dist.PrefixStore("notes", store)
    dist.init_process_group(store=store, rank=rank, world_size=size, timeout=timedelta(minutes=timeout_minutes))
    failed = True
    try:
        yield World(rank, size, device)
        failed = False
    finally:
        # after a failure peers wait in another call; to wait for them here would keep it from being told
        if size == 1 or not failed:
            dist.destroy_process_group()


def _store(size: int) -> dist.Store:
    """Where the processes meet: a file if the launcher names one, else torchrun's address and port."""
    if size == 1:
        return dist.HashStore()
    if path := os.environ.get("SELFE_STORE"):
        return dist.FileStore(f"{path}_{os.environ['TORCHELASTIC_RESTART_COUNT']}", size)
    store, _, _ = next(dist.rendezvous("env://"))
    return store


def post(name: str, note: str) -> None:
    """Leave a note for the other processes. Works when collective calls do not."""
    _notes.set(name, note)


def posted(name: str) -> str | None:
    """A note that some process has left, None if there is none (yet)."""
    return _notes.get(name).decode() if _notes.check([name]) else None


def make_mesh(world: World, shard_size: int | None) -> DeviceMesh:
    """(replicate, shard): parameters are cut over `shard_size` ranks, by default all, and copied over the others."""
    shard_size = shard_size or world.size
    if world.size % shard_size:
        raise UserError(
            f"trainer.shard_size: {world.size} processes cannot form groups of {shard_size}; "
            f"choose a divisor of {world.size}"
        )
    return init_device_mesh(
        world.device.type, (world.size // shard_size, shard_size), mesh_dim_names=("replicate", "shard")
    )


@dataclass(frozen=True)
class Gathering:
    """When a rank has whole blocks rather than its part of them: memory against traffic."""

    # after a forward pass: let go (true), keep for the backward pass (false), or keep cut over so many ranks, whose
    # links should be fast; the EMA weights are let go in any case
    reshard_after_forward: bool | int = True
    prefetch: int = 1  # blocks whose gathering is begun ahead; 0: when they are needed

    def __post_init__(self):
        at_least(0, self, "prefetch")


def shard(
    module: nn.Module,
    mesh: DeviceMesh,
    *,
    precision: Precision,
    activation_checkpointing: Recompute = False,
    compile: bool = False,
    gathering: Gathering = Gathering(),
) -> None:
    """Cut the parameters of a module (on the meta device or not) over the mesh, block by block.

    Stored in fp32, computed in `precision`, gradients reduced in fp32. The module casts its own inputs, because times
    must not be rounded to bf16. What is computed again in the backward pass is for `blocks.save_memory` to say.
    """
    blocks.save_memory(module, activation_checkpointing)
    if compile:
        blocks.compile(module)
    after, size = gathering.reshard_after_forward, mesh["shard"].size()
    if type(after) is int and (after < 1 or size % after):
        raise UserError(
            f"trainer.gathering.reshard_after_forward: {after} does not divide the {size} ranks that share one copy "
            "of the parameters; choose a divisor, true or false"
        )
    if mesh["replicate"].size() == 1:
        mesh = mesh["shard"]  # spares an all-reduce of every gradient over one rank
    policy = MixedPrecisionPolicy(DTYPES[precision], reduce_dtype=torch.float32, cast_forward_inputs=False)
    parts = [block for _, block in blocks.blocks(module)]
    for block in parts:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=after)
    # the root too: an EMA twin never runs a backward pass that would free it
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=after or True)
    for number, part in enumerate([module, *parts] if gathering.prefetch else ()):
        part.set_modules_to_forward_prefetch(parts[number : number + gathering.prefetch])


def reshard(module: nn.Module) -> None:
    """Let go of what forward passes without a backward pass have kept whole."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def materialise(module: nn.Module, device: torch.device, seed: int) -> None:
    """Give a sharded module its memory and its initial values, the same on any number of ranks."""
    module.to_empty(device=device)
    for name, parameter in module.named_parameters():
        fill(parameter, module.initial(name, parameter.shape, seed))


@torch.no_grad()
def fill(parameter: Tensor, full: Tensor) -> None:
    """Give a sharded parameter the values of `full`, which every rank has."""
    full = full.to(parameter.device)
    parameter.copy_(distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None))


@torch.no_grad()
def place_sharded(module: nn.Module, blocks: Iterable[nn.Module], read: Read, *, mesh: DeviceMesh) -> None:
    """Cut a frozen module on the meta device over the mesh, block by block; a rank reads the rows it keeps."""
    cut(module, blocks, mesh)
    module.to_empty(device=mesh.device_type)
    for name, parameter in module.named_parameters():
        shape, start = compute_local_shape_and_global_offset(parameter.shape, mesh, parameter.placements)
        if shape[0]:
            parameter.to_local().copy_(read(name, slice(start[0], start[0] + shape[0])))


def cut(module: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Cut a frozen module over the mesh, block by block; it stays where it is."""
    for part in (*blocks, module):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


def twins(
    module: nn.Module, world: World, precision: Precision, seed: int, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """The live and the EMA denoiser from one on the meta device, sharded alike, with the same initial values.

    `options` are those of `cut_twins`.
    """
    nets = cut_twins(module, world, precision, **options)
    for part in nets:
        materialise(part, world.device, seed)
    return nets


def cut_twins(
    module: nn.Module,
    world: World,
    precision: Precision,
    *,
    shard_size: int | None = None,
    activation_checkpointing: Recompute = False,
    compile: bool = False,
    gathering: Gathering = Gathering(),
) -> tuple[nn.Module, nn.Module]:
    """As `twins`, but still on the meta device, without memory."""
    mesh = make_mesh(world, shard_size)
    net, ema = module, copy.deepcopy(module).requires_grad_(False)
    how = {"precision": precision, "compile": compile}
    shard(net, mesh, **how, activation_checkpointing=activation_checkpointing, gathering=gathering)
    # what the average keeps whole would be out of date after its update
    shard(ema, mesh, **how, gathering=replace(gathering, reshard_after_forward=True))
    return net, ema


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip_grad_norm(module: nn.Module, max_norm: float) -> Tensor:
    """Clip by the norm over all ranks; returns that norm, a scalar on the device."""
    return nn.utils.clip_grad_norm_(module.parameters(), max_norm).full_tensor()


def agree(grad_norm: Tensor, signal: int, device: torch.device) -> tuple[float, int]:
    """What all ranks know after a step, with one small exchange and one wait for the device.

    The gradient norm, to the bit the same on all, and the signal that asked any of them to stop (0: none).
    """
    heard = torch.tensor([float(signal > 0), float(signal)], dtype=torch.float64).to(device)
    values = torch.cat([grad_norm.double().reshape(1), heard])
    dist.all_reduce(values)
    norm, stops, signals = values.tolist()
    return norm / dist.get_world_size(), round(signals / max(stops, 1))


def compare_replicas(module: nn.Module, world: World, shard_size: int | None, when: str) -> None:
    """Raise UserError if two ranks that should hold the same part of the weights do not, to the bit."""
    sums = [local(p.detach()).view(torch.int32).sum(dtype=torch.int64) for p in module.parameters()]
    everyone = [None] * world.size
    dist.all_gather_object(everyone, torch.stack(sums).tolist())
    for rank, mine in enumerate(everyone):
        if mine != everyone[rank % (shard_size or world.size)]:
            raise UserError(
                f"{when}: process {rank} holds other weights than its replica, process "
                f"{rank % shard_size}; a device or a link is at fault: go on from a checkpoint on other hardware"
            )


def mean_over_ranks(rows: dict[str, list[Tensor]], device: torch.device) -> dict[str, float]:
    """Means over everything that all ranks measured: name -> list of 1-D tensors, the same names on every rank."""
    names = sorted(rows)
    values = [torch.cat(rows[name]).double() for name in names]
    sums = torch.stack([torch.stack([v.sum() for v in values]), torch.tensor([len(v) for v in values]).to(device)])
    dist.all_reduce(sums)
    return dict(zip(names, (sums[0] / sums[1]).tolist(), strict=True))


def sum_over_ranks(values: Tensor) -> Tensor:
    """In place, the same on every rank."""
    dist.all_reduce(values)
    return values


def gather(value: Any, world: World) -> list[Any]:
    """Every rank's value on rank 0, an empty list elsewhere. For small host-side things."""
    values = [None] * world.size if world.is_main else None
    dist.gather_object(value, values)
    return values or []


def broadcast(value: Any, world: World) -> Any:
    """Rank 0's value on every rank. For small host-side things."""
    values = [value if world.is_main else None]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def host_group(timeout_minutes: float) -> Group:
    """A second way to talk between all ranks, over host memory, for a thread that must not disturb training."""
    return dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))


def together(action: Callable[[], Any], world: World, group: Group) -> list[Any]:
    """`action()` on every rank; every rank's result. If it raises OSError on any, OSError is raised on all."""
    try:
        mine = (action(), None)
    except OSError as error:
        mine = (None, f"process {world.rank}: {error}")
    everyone = [None] * world.size
    dist.all_gather_object(everyone, mine, group=group)
    if errors := [error for _, error in everyone if error]:
        raise OSError(errors[0])
    return [result for result, _ in everyone]


def barrier() -> None:
    dist.barrier()
