"""Greedy load balancing."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from math import inf


def pack_greedy(costs: Sequence[float], bins: int, room: float = inf) -> list[list[int]]:
    """Assign items to bins: most expensive first, each to the bin with the lowest load that has room.

    Args:
        costs: cost of each item.
        bins: number of bins.
        room: items that a bin holds at most; bins x room must be at least the number of items.

    Returns:
        The indices of the items of each bin, in the order of assignment.
    """
    contents: list[list[int]] = [[] for _ in range(bins)]
    loads = [(0, number) for number in range(bins)]  # a heap; of equal loads the first bin counts

    for item in sorted(range(len(costs)), key=costs.__getitem__, reverse=True):
        load, number = heapq.heappop(loads)
        contents[number].append(item)
        if len(contents[number]) < room:
            heapq.heappush(loads, (load + costs[item], number))
    return contents
