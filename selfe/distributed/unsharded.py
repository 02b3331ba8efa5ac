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
        shape_of = dict(zip(numbers, shapes, strict=True))
        by_replica = [numbers[r * self.num_shards : (r + 1) * self.num_shards] for r in range(self.num_replicas)]
        ours = by_replica[self.replica]  # the j-th is for the j-th rank of this shard group
        rows = [shard_of(number) for number in ours]

        # gather a matrix on each rank, and return the rows of the result
        if self.num_shards > 1 and rows:
            rows = self.through_owners(ours, [shape_of[number] for number in ours], rows, work)
        else:
            rows = [work(number, matrix) for number, matrix in zip(ours, rows, strict=True)]

        # every replica gets the results of the others
        if self.num_replicas > 1:
            own_results = torch.cat([self.nothing, *(result.flatten() for result in rows)])
            sizes = [[self.values(shape_of[number], self.shard) for number in of_replica] for of_replica in by_replica]
            received = send([own_results] * self.num_replicas, list(map(sum, sizes)), self.replicas)

            for of_replica, of_matrices, flat in zip(by_replica, sizes, received, strict=True):
                for number, result in zip(of_replica, flat.split(of_matrices), strict=True):
                    yield number, result.view(-1, shape_of[number][1])
        else:
            yield from zip(ours, rows, strict=True)

    def through_owners(
        self, numbers: Sequence[int], shapes: Sequence[Sequence[int]], rows: Sequence[Tensor], work: Work
    ) -> list[Tensor]:
        """Rows of matrices -> the same rows of the results. Fewer matrices than ranks: the last ranks have none."""
        has_matrix = self.shard < len(numbers)
        own_shape = shapes[self.shard] if has_matrix else (0, 0)
        empty = [self.nothing] * (self.num_shards - len(numbers))

        # numbers of values: of each shard of this rank's matrix, and of this rank's shard of each matrix
        of_own_matrix = [self.values(own_shape, shard) for shard in range(self.num_shards)]
        of_own_rows = [self.values(shape, self.shard) for shape in shapes] + [0] * len(empty)

        gathered = send([*(own.flatten() for own in rows), *empty], of_own_matrix, self.shards)
        matrix = torch.cat(gathered).view(*own_shape)
        result = work(numbers[self.shard], matrix) if has_matrix else matrix
        returned = send(list(result.flatten().split(of_own_matrix)), of_own_rows, self.shards)
        return [flat.view(-1, shape[1]) for flat, shape in zip(returned, shapes, strict=False)]


def send(messages: Sequence[Tensor], sizes: Sequence[int], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """Send the i-th of the 1-D `messages` to the i-th rank; returns what the ranks have sent, of these sizes."""
    received, lengths = messages[0].new_empty(sum(sizes)), [len(message) for message in messages]
    dist.all_to_all_single(received, torch.cat(list(messages)), list(sizes), lengths, group=group)
    return received.split(list(sizes))
