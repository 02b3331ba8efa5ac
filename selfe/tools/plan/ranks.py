"""Memory and communication of a rank, for any world size: FSDP2's own sharding under torch's fake process group."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from selfe.distributed import fsdp
from selfe.distributed.collectives import World
from selfe.errors import UserError
from selfe.optimizers.groups import trained
from selfe.protocols import TensorReader
from selfe.system import System
from selfe.tools.plan.step import Call, Living, Watchdog
from selfe.training.settings import TrainerConfig
from selfe.types import DTYPES

Backward = Literal["never", "once", "each"]  # in no backward pass, once for all passes of a micro-batch, or in each
GRADIENT_BYTES = 4  # per value: gradients are reduced in fp32


@dataclass(frozen=True)
class Unit:
    """An FSDP parameter group: a block, or all parameters outside of blocks (the root)."""

    held: int  # values in the shard of a rank, padded to the same size on all ranks
    learned: int  # those of them that have a gradient
    backward: Backward  # gathered in backward passes
    ranks: int  # ranks in a shard group
    replicas: int
    holders: int  # ranks of the group with a shard that is not empty
    value_bytes: int  # bytes per gathered value
    kept: float  # fraction kept gathered after forward: 0, 1 (unsharded), or 1/k (sharded over k ranks)
    is_root: bool

    @property
    def gathered(self) -> int:
        """Bytes of the unsharded parameters in compute precision."""
        return self.held * self.ranks * self.value_bytes

    @property
    def summed(self) -> int:
        """Bytes of the unsharded gradient in reduction precision."""
        return self.learned * self.ranks * GRADIENT_BYTES

    @property
    def gradient(self) -> int:
        """Bytes of the unsharded gradient in compute precision."""
        return self.learned * self.ranks * self.value_bytes


@dataclass(frozen=True)
class UpdateCost:
    """A step of the optimizer on one rank."""

    state: int  # bytes kept from step to step
    transient: int  # peak bytes during the step, beside weights, gradients and state
    flops: int
    sent: int  # bytes to other ranks


@dataclass(frozen=True)
class Share:
    """Bytes on rank 0, which has the largest shard, between steps; and the units that are communicated."""

    size: int
    parameters: int
    gradients: int
    optimizer: int
    ema: int
    encoders: int
    update: UpdateCost  # of the optimizer
    live_units: tuple[Unit, ...]
    ema_units: tuple[Unit, ...]
    text_units: tuple[Unit, ...]  # of a sharded text encoder

    @property
    def states(self) -> int:
        """Bytes held from step to step."""
        return self.parameters + self.gradients + self.optimizer + self.ema + self.encoders

    @property
    def unsharded(self) -> int:
        """Peak bytes of unsharded tensors: the root and what is kept after forward; of the largest block the parameters
        twice (current and prefetched), a gradient in compute precision and two in reduction precision (in flight)."""
        stay = sum(unit.gathered * (1 if unit.is_root else unit.kept) for unit in self.live_units)
        blocks = [unit for unit in self.live_units if not unit.is_root]
        largest = max(blocks, key=lambda unit: unit.held, default=None)
        return round(stay) + (2 * largest.gathered + largest.gradient + 2 * largest.summed if largest else 0)

    @property
    def empty_ranks(self) -> int:
        """Ranks without any parameter, because no tensor has as many rows as the shard group has ranks."""
        holders = max(unit.holders for unit in self.live_units)
        return (self.live_units[0].ranks - holders) * self.live_units[0].replicas


@contextmanager
def pretended(size: int) -> Iterator[World]:
    """Rank 0 of a fake process group of `size` ranks; collectives return immediately and move no data."""
    if size < 1:
        raise UserError(f"--gpus: {size} is too small; must be at least 1")
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield World(0, size, torch.device("cpu"))
    finally:
        distributed.destroy_process_group()


class Later:
    """Replaces `ShardLoader`: records how networks are sharded, and leaves them unsharded on the meta device."""

    def __init__(self):
        self.networks: list[tuple[nn.Module, tuple[nn.Module, ...]]] = []  # each with its blocks

    def __call__(self, module: nn.Module, blocks: Iterable[nn.Module], read: TensorReader) -> None:
        self.networks.append((module, tuple(blocks)))


def share(
    system: System, trainer: TrainerConfig, size: int, encoders: Sequence[nn.Module] = (), later: Later | None = None
) -> Share:
    """Shards of a system on one of `size` ranks. The system is on the meta device; only copies of it are sharded.

    Args:
        encoders: encoder networks that training loads.
        later: the recorded sharding of the text encoder, if it is sharded.
    """
    with pretended(size) as world:
        mesh, net = fsdp.make_mesh(world, trainer.shard_size), copy.deepcopy(system.backbone)
        net, ema = fsdp.shard_model_and_ema(net, mesh, trainer.precision, gathering=trainer.gathering)
        updates = optimizer_cost(net, trainer)

        # encoders are replicated, except for those of a sharded text encoder
        held_networks, text_units = [], ()
        sharded = {id(module): (module, blocks) for module, blocks in (later.networks if later else ())}
        for network in encoders:
            if id(network) in sharded:
                network, blocks = copy.deepcopy(sharded[id(network)])
                fsdp.shard_frozen(network, blocks, mesh)
                text_units += units(network, next(network.parameters()).element_size(), kept=0.0)
            held_networks.append(network)

        value_bytes = DTYPES[trainer.precision].itemsize
        learned = sum(ours.nbytes for ours, _ in fsdp.trained_pairs(net, net))
        return Share(
            size=size,
            parameters=held(net),
            gradients=learned,  # fp32, like the parameters
            optimizer=updates.state,
            ema=learned * len(trainer.ema_tracks),  # frozen parameters are shared
            encoders=sum(map(held, held_networks)),
            update=updates,
            live_units=units(net, value_bytes, kept_after_forward(trainer.gathering.reshard_after_forward)),
            ema_units=units(ema, value_bytes, kept=0.0),
            text_units=text_units,
        )


def held(module: nn.Module) -> int:
    """Bytes of this rank's shard of a module."""
    return sum(fsdp.local(tensor.detach()).nbytes for tensor in (*module.parameters(), *module.buffers()))


def optimizer_cost(net: nn.Module, trainer: TrainerConfig) -> UpdateCost:
    """Run the first step of the optimizer on the meta device, with the parameters of `net`, sharded or not."""
    numbers = {"lr": trainer.lr, "betas": trainer.betas, "weight_decay": trainer.weight_decay}
    optimizer = trainer.optimizer.build(net, **numbers, precision=trainer.precision)
    for _, parameter in trained(net):
        parameter.grad = torch.empty_like(parameter)
    held = [p.detach() for p in net.parameters()] + [p.grad for _, p in trained(net)]

    living = Living({fsdp.local(tensor).untyped_storage()._cdata for tensor in held})

    def made(operation: Any, tensor: Tensor) -> None:
        living.add(fsdp.local(tensor))

    with FlopCounterMode(display=False) as counter, SentBytes() as exchanged, Watchdog(made):
        optimizer.step()
    optimizer.zero_grad()

    tensors = [fsdp.local(value) for state in optimizer.state.values() for value in state.values()]
    on_device = sum(tensor.nbytes for tensor in tensors if tensor.is_meta)
    return UpdateCost(
        state=sum(tensor.nbytes for tensor in tensors),
        transient=living.peak - on_device,
        flops=counter.get_total_flops(),
        sent=exchanged.bytes,
    )


class SentBytes(TorchDispatchMode):
    """Bytes that rank 0 sends to other ranks by all-to-all, the collective of optimizers that work on matrices."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function is torch.ops.c10d.alltoall_base_.default:
            _, given, _, _, sizes = arguments[:5]
            self.bytes += given.nbytes - sizes[0] * given.element_size()
        return function(*arguments, **(keywords or {}))


def units(module: nn.Module, value_bytes: int, kept: float) -> tuple[Unit, ...]:
    """The parameter groups of a sharded module, the root first: what each FSDP module shards itself.

    Args:
        value_bytes: bytes per gathered value.
        kept: fraction of a block that a rank keeps after forward: 0, 1, or 1/k if it stays sharded over k ranks.
    """
    sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]
    groups = []
    for part in sharded:
        inner = {
            id(p) for other in part.modules() if other in sharded and other is not part for p in other.parameters()
        }
        parameters = [p for p in part.parameters() if id(p) not in inner]
        if not parameters:
            continue

        # the mesh is (shard,) or (replicate, shard); FSDP cuts the first dimension of each parameter
        mesh = parameters[0].device_mesh
        ranks = mesh.size(mesh.ndim - 1)
        rows = [-(-p.shape[0] // ranks) for p in parameters]  # of the largest shard, to which all are padded
        values = [n * p.shape[1:].numel() for n, p in zip(rows, parameters, strict=True)]
        learned = sum(n for n, p in zip(values, parameters, strict=True) if p.requires_grad)
        groups.append(
            Unit(
                held=sum(values),
                learned=learned,
                backward="each",
                ranks=ranks,
                replicas=mesh.size() // ranks,
                holders=max(-(-p.shape[0] // n) for n, p in zip(rows, parameters, strict=True)),
                value_bytes=value_bytes,
                kept=0.0 if kept == (1 if part is module else 1 / ranks) else kept,  # FSDP always reshards the root
                is_root=part is module,
            )
        )
    return gathered_backward(groups)


def gathered_backward(groups: Sequence[Unit]) -> tuple[Unit, ...]:
    """The parameter groups, the root and then blocks in order, with `backward` set."""
    # the root stays unsharded from one backward pass to the next
    root, *blocks = groups
    kinds: dict[int, Backward] = dict.fromkeys(range(len(blocks)), "each")

    # without a trained parameter outside of blocks, gradients end at the first block with one
    if not root.learned:
        end = next((number for number, block in enumerate(blocks) if block.learned), len(blocks))
        kinds |= dict.fromkeys(range(end), "never")

        # FSDP keeps that block unsharded, because no gradient of its inputs marks the end of its backward pass; and it
        # prefetches the block before it, in vain
        kinds |= dict.fromkeys(range(max(end - 1, 0), min(end + 1, len(blocks))), "once")

    blocks = [replace(block, backward=kinds[number]) for number, block in enumerate(blocks)]
    return replace(root, backward="once"), *blocks


def kept_after_forward(after: bool | int) -> float:
    """`Unit.kept` for a value of `GatherConfig.reshard_after_forward`."""
    if isinstance(after, bool):
        return 0.0 if after else 1.0
    return 1 / after


def traffic(share: Share, calls: Sequence[Call], num_micro: int = 1) -> dict[str, int]:
    """Bytes per step by kind of collective: received by a rank, and equally sent, with ring algorithms.

    An upper bound if blocks stay sharded over k ranks: all but the first all-gather of a block then move (k - 1) / k
    of it.

    Args:
        calls: denoiser calls of a micro-batch. FSDP reduces each gradient once per micro-batch: autograd accumulates
            over the passes of a weight first.
        num_micro: micro-batches per step.
    """
    payload = payloads(share, calls)
    sent = {"all_to_all": share.update.sent} if share.update.sent else {}
    shards, replicas = share.live_units[0].ranks, share.live_units[0].replicas
    parts = {"all_gather": (shards - 1) / shards, "reduce_scatter": (shards - 1) / shards}
    parts["all_reduce"] = 2 * (replicas - 1) / replicas
    return {kind: round(num_micro * parts[kind] * size) for kind, size in payload.items()} | sent


def payloads(share: Share, calls: Sequence[Call]) -> dict[str, int]:
    """Payload bytes of a micro-batch by kind of collective: tensors gathered, scattered, and reduced in place."""
    payload = {"all_gather": 0, "reduce_scatter": 0, "all_reduce": 0}
    for weights, its_units in {"live": share.live_units, "ema": share.ema_units}.items():
        passes = [call.learns for call in calls if call.weights == weights]
        for unit in its_units:
            back = {"never": 0, "once": min(sum(passes), 1), "each": sum(passes)}[unit.backward]
            if unit.ranks > 1:
                payload["all_gather"] += unit.gathered * (len(passes) + back if unit.kept < 1 else max(back, 1))
                payload["reduce_scatter"] += unit.summed * any(passes)
            if unit.replicas > 1:
                payload["all_reduce"] += unit.summed // unit.ranks * any(passes)
    payload["all_gather"] += sum(unit.gathered for unit in share.text_units if unit.ranks > 1)
    return payload
