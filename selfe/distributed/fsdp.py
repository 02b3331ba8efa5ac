"""FSDP2: device mesh, sharding of the denoiser, its EMA copy and frozen encoders, gradient clipping."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from selfe.backbones import lora
from selfe.distributed import activation_checkpoint, collectives
from selfe.distributed.activation_checkpoint import ActivationCheckpointing
from selfe.distributed.collectives import World
from selfe.errors import UserError
from selfe.protocols import TensorReader
from selfe.types import DTYPES, Precision, check_range


def make_mesh(world: World, shard_size: int | None) -> DeviceMesh:
    """HSDP mesh (replicate, shard): parameters are sharded over `shard_size` ranks (default: all) and replicated across
    the groups. Call it once per process: every call sets up process groups.

    Raises:
        UserError: `shard_size` does not divide the number of processes.
    """
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
class GatherConfig:
    """When FSDP keeps parameters unsharded: trades memory for communication."""

    # after a forward pass: reshard (true), keep unsharded until the backward pass (false), or reshard to this number of
    # ranks, which should share a fast interconnect; EMA weights are always resharded
    reshard_after_forward: bool | int = True
    prefetch: int = 1  # blocks to all-gather ahead of time; 0 disables explicit prefetching

    def __post_init__(self):
        check_range("reshard_after_forward", self.reshard_after_forward, 0, 2**20)
        check_range("prefetch", self.prefetch, 0, 1000)


def shard(
    module: nn.Module,
    mesh: DeviceMesh,
    *,
    precision: Precision,
    activation_checkpointing: ActivationCheckpointing = False,
    compile: bool = False,
    gathering: GatherConfig = GatherConfig(),
) -> None:
    """Shard the parameters of a module (on the meta device or not) over the mesh, block by block.

    Parameters are stored in fp32, computed in `precision`, gradients are reduced in fp32. The module casts its own
    inputs, because times must not be rounded to bf16. `activation_checkpointing`: see `apply_activation_checkpointing`.

    Raises:
        UserError: `gathering.reshard_after_forward` does not divide the number of ranks of a shard group.
    """
    # Activation checkpointing and per-block compilation come before FSDP.
    activation_checkpoint.apply_activation_checkpointing(module, activation_checkpointing)
    if compile:
        activation_checkpoint.compile(module)

    after, size = gathering.reshard_after_forward, mesh["shard"].size()
    if type(after) is int and (after < 1 or size % after):
        raise UserError(
            f"trainer.gathering.reshard_after_forward: {after} does not divide the {size} ranks of a shard group; "
            "choose a divisor, true or false"
        )
    if mesh["replicate"].size() == 1:
        mesh = mesh["shard"]  # plain FSDP: avoids all-reducing every gradient over a single replica

    # Shard the blocks, then the root.
    policy = MixedPrecisionPolicy(DTYPES[precision], reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks = [block for _, block in activation_checkpoint.blocks(module)]
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=after)
    # Reshard the root too: the EMA copy has no backward pass that would free it.
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=after or True)

    # Explicit prefetching: each module all-gathers the blocks that follow it.
    if gathering.prefetch:
        for index, unit in enumerate([module, *blocks]):
            unit.set_modules_to_forward_prefetch(blocks[index : index + gathering.prefetch])


def reshard(module: nn.Module) -> None:
    """Reshard modules left unsharded by forward-only passes."""
    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            submodule.reshard()


def materialise(module: nn.Module, device: torch.device, seed: int) -> None:
    """Allocate a sharded module and initialise its parameters, independent of the number of ranks."""
    module.to_empty(device=device)
    for name, parameter in module.named_parameters():
        initial = lora.initial if lora.is_low_rank(name) else module.initial
        fill(parameter, initial(name, parameter.shape, seed))


@torch.no_grad()
def fill(parameter: Tensor, full: Tensor) -> None:
    """Copy an unsharded tensor, present on every rank, into a sharded parameter."""
    full = full.to(parameter.device)
    parameter.copy_(distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None))


@torch.no_grad()
def load_sharded(module: nn.Module, blocks: Iterable[nn.Module], read: TensorReader, *, mesh: DeviceMesh) -> None:
    """Shard a frozen module on the meta device over the mesh; each rank reads only the rows of its own shard."""
    shard_frozen(module, blocks, mesh)
    module.to_empty(device=mesh.device_type)
    for name, parameter in module.named_parameters():
        shape, start = compute_local_shape_and_global_offset(parameter.shape, mesh, parameter.placements)
        if shape[0]:
            parameter.to_local().copy_(read(name, slice(start[0], start[0] + shape[0])))


def shard_frozen(module: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Shard a frozen module over the mesh, block by block, on its current device."""
    for unit in (*blocks, module):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)


def build_model_and_ema(
    module: nn.Module, mesh: DeviceMesh, precision: Precision, seed: int, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """Build the live and the EMA denoiser from a module on the meta device: same sharding, same initial values.

    `options` are passed to `shard_model_and_averages`.
    """
    net, (average,) = build_model_and_averages(module, mesh, precision, seed, 1, **options)
    return net, average


def build_model_and_averages(
    module: nn.Module, mesh: DeviceMesh, precision: Precision, seed: int, count: int, **options: Any
) -> tuple[nn.Module, list[nn.Module]]:
    """As `build_model_and_ema`, with `count` averages of the weights."""
    net, averages = shard_model_and_averages(module, mesh, precision, count, **options)
    device = torch.device(mesh.device_type)
    materialise(net, device, seed)

    for average in averages:
        allocate_average(average, net)
        copy_weights(average, net)
    return net, averages


def allocate_average(average: nn.Module, net: nn.Module) -> None:
    """Allocate an average of a sharded denoiser. Frozen parameters, which stay equal, share the memory of the denoiser,
    unless FSDP pads them because their rows do not divide evenly.
    """
    shared = {
        id(own): parameter.detach()
        for own, parameter in zip(average.parameters(), net.parameters(), strict=True)
        if not parameter.requires_grad
    }
    device = next(net.parameters()).device

    def allocate(tensor: Tensor) -> Tensor:
        return shared[id(tensor)] if id(tensor) in shared else torch.empty_like(tensor, device=device)

    average._apply(allocate)


@torch.no_grad()
def copy_weights(target: nn.Module, source: nn.Module) -> None:
    """Copy the parameters of a denoiser into another of the same sharding."""
    for there, here in zip(target.parameters(), source.parameters(), strict=True):
        local(there).copy_(local(here))


def shard_model_and_ema(
    module: nn.Module, mesh: DeviceMesh, precision: Precision, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """Shard the live and the EMA denoiser on the meta device; `options` as of `shard_model_and_averages`."""
    net, (ema,) = shard_model_and_averages(module, mesh, precision, 1, **options)
    return net, ema


def shard_model_and_averages(
    module: nn.Module,
    mesh: DeviceMesh,
    precision: Precision,
    count: int,
    *,
    activation_checkpointing: ActivationCheckpointing = False,
    compile: bool = False,
    gathering: GatherConfig = GatherConfig(),
) -> tuple[nn.Module, list[nn.Module]]:
    """Shard the live denoiser and `count` averages of it on the meta device, without allocating memory."""
    net, averages = module, [copy.deepcopy(module).requires_grad_(False) for _ in range(count)]
    how = {"precision": precision, "compile": compile}
    shard(net, mesh, **how, activation_checkpointing=activation_checkpointing, gathering=gathering)
    # Unsharded EMA parameters would be stale after the next EMA update.
    for average in averages:
        shard(average, mesh, **how, gathering=replace(gathering, reshard_after_forward=True))
    return net, averages


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor; an ordinary tensor is returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def unsharded(tensor: Tensor) -> Tensor:
    """The complete tensor of a shard; call it on every rank. An ordinary tensor is returned unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained_pairs(average: nn.Module, net: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """This rank's shards of the parameters that are trained: of an average of the weights, and of the denoiser."""
    pairs = zip(average.parameters(), net.parameters(), strict=True)
    return [(local(ours), local(theirs)) for ours, theirs in pairs if theirs.requires_grad]


def grad_norm(module: nn.Module) -> Tensor:
    """Global norm of the gradients over all ranks, a scalar on the device."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients).full_tensor()


def clip_gradients(module: nn.Module, norm: Tensor, max_norm: float) -> None:
    """Scale gradients of norm `norm` (see `grad_norm`) to a norm of at most `max_norm`."""
    nn.utils.clip_grads_with_norm_(module.parameters(), max_norm, norm)


def compare_replicas(module: nn.Module, world: World, shard_size: int | None, when: str) -> None:
    """Check that the shards of all replicas are bitwise equal, by comparing checksums.

    Raises:
        UserError: a shard differs between two replicas.
    """
    sums = [local(p.detach()).view(torch.int32).sum(dtype=torch.int64) for p in module.parameters()]
    everyone = collectives.gather_on_all(torch.stack(sums).tolist(), world)
    for rank, mine in enumerate(everyone):
        if mine != everyone[rank % (shard_size or world.size)]:
            raise UserError(
                f"{when}: the weights of process {rank} differ from those of its replica, process "
                f"{rank % shard_size}; faulty device or interconnect: resume from a checkpoint on other hardware"
            )
