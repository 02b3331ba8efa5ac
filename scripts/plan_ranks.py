"""What a rank holds and sends, on any number of ranks: FSDP2's own cutting, under torch's fake process group."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from plan_step import Call
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.testing._internal.distributed.fake_pg import FakeStore

from selfe import dist
from selfe.dist import World
from selfe.system import System
from selfe.train import Trainer
from selfe.types import Read, UserError

GRADIENT_BYTES = 4  # of a number while gradients are summed over ranks


@dataclass(frozen=True)
class Unit:
    """What FSDP gathers and frees together: a block, or all that is in none."""

    held: int  # numbers that a rank keeps of it, with the padding that makes all ranks alike
    ranks: int  # that share one copy
    replicas: int
    holders: int  # of those ranks, how many have a row of it
    number_bytes: int  # of a number when gathered
    kept: float  # share that stays between passes beside what is held: 0, 1 (whole), or 1/k (cut over k ranks)
    is_root: bool

    @property
    def gathered(self) -> int:
        """Bytes of the whole unit as it computes."""
        return self.held * self.ranks * self.number_bytes

    @property
    def summed(self) -> int:
        """Bytes of its whole gradient as it is summed."""
        return self.held * self.ranks * GRADIENT_BYTES


@dataclass(frozen=True)
class Share:
    """Bytes on the rank that has the most, between steps, and the units that travel."""

    size: int
    parameters: int
    gradients: int
    optimizer: int
    ema: int
    encoders: int
    live_units: tuple[Unit, ...]
    ema_units: tuple[Unit, ...]
    text_units: tuple[Unit, ...]  # of a text encoder that is cut too

    @property
    def states(self) -> int:
        """All that stays from step to step."""
        return self.parameters + self.gradients + self.optimizer + self.ema + self.encoders

    @property
    def whole(self) -> int:
        """The most that is whole at once: the root and what is kept, a block, the one that is fetched ahead, and of
        gradients one that is done, one that is sent and one that was sent before."""
        stay = sum(unit.gathered * (1 if unit.is_root else unit.kept) for unit in self.live_units)
        blocks = [unit for unit in self.live_units if not unit.is_root]
        largest = max(blocks, key=lambda unit: unit.held, default=None)
        return round(stay) + (3 * largest.gathered + 2 * largest.summed if largest else 0)

    @property
    def empty_ranks(self) -> int:
        """Ranks that hold no parameter at all, because no tensor has so many rows."""
        holders = max(unit.holders for unit in self.live_units)
        return (self.live_units[0].ranks - holders) * self.live_units[0].replicas


@contextmanager
def pretended(size: int) -> Iterator[World]:
    """Rank 0 of `size` processes that do not exist; collective calls return at once and move nothing."""
    if size < 1:
        raise UserError(f"--gpus: {size} is not a number of at least 1")
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield World(0, size, torch.device("cpu"))
    finally:
        distributed.destroy_process_group()


class Later:
    """In place of `dist.place_sharded`: leaves a network whole on the meta device, and remembers how it is cut."""

    def __init__(self):
        self.module, self.blocks = None, ()

    def __call__(self, module: nn.Module, blocks: Iterable[nn.Module], read: Read) -> None:
        self.module, self.blocks = module, tuple(blocks)


def share(
    system: System, trainer: Trainer, size: int, encoders: Sequence[nn.Module] = (), later: Later | None = None
) -> Share:
    """What a rank of `size` gets of a system on the meta device, of which only copies are cut.

    Args:
        encoders: the networks of the encoders that training loads.
        later: the one of them that is cut over the ranks too, if any.
    """
    with pretended(size) as world:
        how = {"shard_size": trainer.shard_size, "gathering": trainer.gathering}
        net, ema = dist.cut_twins(copy.deepcopy(system.backbone), world, trainer.precision, **how)
        whole, text_units = [network for network in encoders if not later or network is not later.module], ()
        if len(whole) < len(encoders):
            module, blocks = copy.deepcopy((later.module, later.blocks))
            dist.cut(module, blocks, dist.make_mesh(world, trainer.shard_size))
            whole, text_units = [*whole, module], units(module)
        parameters = held(net)
        return Share(
            size=size,
            parameters=parameters,
            gradients=parameters,  # in full precision as well
            optimizer=optimizer_bytes(net),
            ema=held(ema),
            encoders=sum(map(held, whole)),
            live_units=units(net),
            ema_units=units(ema),
            text_units=text_units,
        )


def held(module: nn.Module) -> int:
    """Bytes of this rank's part of a module."""
    return sum(dist.local(tensor.detach()).nbytes for tensor in (*module.parameters(), *module.buffers()))


def optimizer_bytes(net: nn.Module) -> int:
    """Of AdamW's state after a step, by taking one."""
    parameters = [nn.Parameter(dist.local(p.detach())) for p in net.parameters()]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values())


def units(module: nn.Module) -> tuple[Unit, ...]:
    """What FSDP has made of a module, the root first."""
    found = []
    for part in module.modules():
        for group in part._get_fsdp_state()._fsdp_param_groups if isinstance(part, FSDPModule) else ():
            parameters, mesh = group.fsdp_params, group.mesh_info
            found.append(
                Unit(
                    held=sum(p.padded_sharded_param_size.numel() for p in parameters),
                    ranks=mesh.shard_mesh_size,
                    replicas=mesh.mesh.size() // mesh.shard_mesh_size,
                    holders=max(-(-p._orig_size[0] // p.padded_sharded_param_size[0]) for p in parameters),
                    number_bytes=(group.mp_policy.param_dtype or parameters[0].sharded_param.dtype).itemsize,
                    kept=share_kept(group),
                    is_root=part is module,
                )
            )
    return tuple(found)


def share_kept(group: FSDPParamGroup) -> float:
    """See `Unit.kept`."""
    if (after := group.post_forward_mesh_info) is None:
        return 1.0
    return 0.0 if after == group.mesh_info else 1 / after.shard_mesh_size


def traffic(share: Share, calls: Sequence[Call], num_micro: int = 1) -> dict[str, int]:
    """Bytes of a step by kind: what a rank receives, which is also what it sends, when every link is used once.

    Less if blocks stay cut over k ranks: all but the first gathering of a block are then of (k - 1) / k of it.

    `calls` are those of a micro-batch. FSDP sums gradients over ranks in every micro-batch, once: autograd adds up the
    passes of a weight before it hands its gradient over.
    """
    payload = payloads(share, calls)
    shards, replicas = share.live_units[0].ranks, share.live_units[0].replicas
    parts = {"all_gather": (shards - 1) / shards, "reduce_scatter": (shards - 1) / shards}
    parts["all_reduce"] = 2 * (replicas - 1) / replicas
    return {kind: round(num_micro * parts[kind] * size) for kind, size in payload.items()}


def payloads(share: Share, calls: Sequence[Call]) -> dict[str, int]:
    """Bytes of a micro-batch's collective calls by kind: tensors that are gathered, scattered, and reduced in place."""
    found = {"all_gather": 0, "reduce_scatter": 0, "all_reduce": 0}
    for weights, its_units in {"live": share.live_units, "ema": share.ema_units}.items():
        passes = [call.learns for call in calls if call.weights == weights]
        for unit in its_units:
            back = min(sum(passes), 1) if unit.is_root else sum(passes)  # the root stays whole from one to the next
            if unit.ranks > 1:
                found["all_gather"] += unit.gathered * (len(passes) + back if unit.kept < 1 else max(back, 1))
                found["reduce_scatter"] += unit.summed * any(passes)
            if unit.replicas > 1:
                found["all_reduce"] += unit.summed // unit.ranks * any(passes)
    found["all_gather"] += sum(unit.gathered for unit in share.text_units if unit.ranks > 1)
    return found
