"""Work on complete matrices whose rows are sharded: each matrix is gathered on one rank, which returns the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

Work = Callable[[int, Tensor], Tensor]  # (number of the parameter, complete matrix) -> a matrix of the same shape


def apply_to_matrices(
    parameters: Sequence[Tensor], dtype: torch.dtype, shard_of: Callable[[int], Tensor], work: Work
) -> Iterator[tuple[int, Tensor]]:
    """`work` on the complete matrix of each parameter, on one rank only: (number, this rank's rows of the result).

    Matrices are dealt out largest first, one to each rank per round, so that all ranks work on matrices of about the
    same size, and memory is bounded by a few matrices. With HSDP, the replicas share the matrices as well, and exchange
    the results, so that replicas stay bitwise equal. Every rank must take all that is yielded.

    Args:
        parameters: matrices, all sharded by rows over the same mesh (FSDP: 1-D, HSDP: replicate x shard), or all plain.
        dtype: of the matrices that are sent.
        shard_of: this rank's rows of the matrix of a parameter, in this dtype; called at most once for each.
    """
    order = sorted(range(len(parameters)), key=lambda i: -math.prod(parameters[i].shape))
    if not parameters or not isinstance(parameters[0], DTensor):
        for number in order:
            yield number, work(number, shard_of(number))
        return

    exchange = Exchange(parameters[0].device_mesh, parameters[0].to_local().new_empty(0, dtype=dtype))
    for first in range(0, len(order), exchange.size):
        chunk = order[first : first + exchange.size]
        yield from exchange.run_round(chunk, [parameters[i].shape for i in chunk], shard_of, work)


class Exchange:
    """The ranks of a mesh (shard,) or (replicate, shard), seen from one of them."""

    def __init__(self, mesh: DeviceMesh, nothing: Tensor):
        self.nothing = nothing  # what is sent where a rank has nothing to send
        self.size, self.num_shards = mesh.size(), mesh.size(mesh.ndim - 1)
        self.num_replicas = self.size // self.num_shards
        self.shard, self.shards = mesh.get_local_rank(mesh.ndim - 1), mesh.get_group(mesh.ndim - 1)
        self.replica = mesh.get_local_rank(0) if mesh.ndim > 1 else 0
        self.replicas = mesh.get_group(0) if mesh.ndim > 1 else None

    def rows(self, shape: Sequence[int], shard: int) -> int:
        """Rows of a matrix that a shard holds: FSDP cuts it as `torch.chunk` does."""
        each = -(-shape[0] // self.num_shards)
        return min(max(shape[0] - shard * each, 0), each)

    def values(self, shape: Sequence[int], shard: int) -> int:
        return self.rows(shape, shard) * shape[1]

    def run_round(
        self, numbers: Sequence[int], shapes: Sequence[Sequence[int]], shard_of: Callable[[int], Tensor], work: Work
    ) -> Iterator[tuple[int, Tensor]]:
        """At most one matrix per rank; rank r of the mesh works on the r-th."""
        place = {number: shape for number, shape in zip(numbers, shapes, strict=True)}
        by_replica = [numbers[r * self.num_shards : (r + 1) * self.num_shards] for r in range(self.num_replicas)]
        ours = by_replica[self.replica]  # the j-th is for the j-th rank of this shard group
        rows = [shard_of(number) for number in ours]

        # gather a matrix on each rank, and return the rows of the result
        if self.num_shards > 1 and rows:
            rows = self.through_owners(ours, [place[number] for number in ours], rows, work)
        else:
            rows = [work(number, matrix) for number, matrix in zip(ours, rows, strict=True)]

        # every replica gets the results of the others
        if self.num_replicas > 1:
            sizes = [[self.values(place[number], self.shard) for number in theirs] for theirs in by_replica]
            mine = torch.cat([self.nothing, *(part.flatten() for part in rows)])
            results = send([mine] * self.num_replicas, list(map(sum, sizes)), self.replicas)
            for theirs, parts, flat in zip(by_replica, sizes, results, strict=True):
                for number, part in zip(theirs, flat.split(parts), strict=True):
                    yield number, part.view(-1, place[number][1])
        else:
            yield from zip(ours, rows, strict=True)

    def through_owners(
        self, numbers: Sequence[int], shapes: Sequence[Sequence[int]], rows: Sequence[Tensor], work: Work
    ) -> list[Tensor]:
        """Rows of matrices -> the same rows of the results. Fewer matrices than ranks: the last ranks have none."""
        owns = self.shard < len(numbers)
        shape = shapes[self.shard] if owns else (0, 0)
        here = [self.values(shape, shard) for shard in range(self.num_shards)]  # of this rank's matrix, by shard
        empty = [self.nothing] * (self.num_shards - len(numbers))
        there = [self.values(shape, self.shard) for shape in shapes] + [0] * len(empty)

        gathered = send([*(part.flatten() for part in rows), *empty], here, self.shards)
        matrix = torch.cat(gathered).view(*shape)
        result = work(numbers[self.shard], matrix) if owns else matrix
        returned = send(list(result.flatten().split(here)), there, self.shards)
        return [part.view(-1, shape[1]) for part, shape in zip(returned, shapes, strict=False)]


def send(parts: Sequence[Tensor], sizes: Sequence[int], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """Send the i-th of the 1-D `parts` to the i-th rank; returns what the ranks have sent, of these sizes."""
    received = parts[0].new_empty(sum(sizes))
    dist.all_to_all_single(received, torch.cat(list(parts)), list(sizes), [len(part) for part in parts], group=group)
    return received.split(list(sizes))
