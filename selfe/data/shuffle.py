"""Stateless shuffling and interleaving: the sample at any place of a run, computed without storing a permutation."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from selfe.rng import philox

ROUNDS = 8


def permute(places: np.ndarray, length: int, *key: Hashable) -> np.ndarray:
    """Map places (n,) in range(length) through the pseudo-random permutation of range(length) that `key` selects.

    A Feistel network on the next even number of bits with cycle walking: values outside the range are permuted again.
    Memory does not depend on `length`. (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002.)
    """
    half = np.uint64(max(1, -(-(length - 1).bit_length() // 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = philox(*key).integers(2**64, size=ROUNDS, dtype=np.uint64)

    # permute again until all values are within range(length)
    values = places.astype(np.uint64)
    outside = np.arange(len(places))
    while len(outside):
        left, right = values[outside] >> half, values[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (scrambled(right + round_key) & mask)
        values[outside] = left << half | right
        outside = outside[values[outside] >= length]

    return values.astype(np.int64)


def scrambled(x: np.ndarray) -> np.ndarray:
    """Mix 64-bit integers (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def interleave(numbers: np.ndarray, weights: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Sample numbers (n,) of a run -> source (n,) and place in its stream (n,); `weight` samples of each per round."""
    pattern = np.repeat(np.arange(len(weights)), weights)
    rank = np.concatenate([np.arange(weight) for weight in weights])

    rounds, place = np.divmod(numbers, len(pattern))
    source = pattern[place]
    return source, rounds * np.asarray(weights)[source] + rank[place]
