"""Random numbers keyed by what they are used for, independent of rank, batch and device.

Each sample has a key: (seed, step, position) in training, (seed, prompt, sample number) in generation. Numbers come
from a counter-based generator keyed by (sample key, name of the draw), so resuming needs no generator state, and any
split of the work over processes draws the same numbers.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor

from selfe.device import to_device
from selfe.types import Packed


def philox(*key: Hashable) -> np.random.Generator:
    """A new generator for this key; equal keys give equal streams on every machine."""
    return np.random.Generator(np.random.Philox(Digest(hashlib.blake2b(repr(key).encode(), digest_size=16).digest())))


class Digest(ISeedSequence):
    """16 bytes used as the Philox key directly. Passed as `key=`, numpy would first gather entropy and discard it."""

    def __init__(self, digest: bytes):
        self.digest = digest

    def generate_state(self, n_words: int, dtype: type = np.uint32) -> np.ndarray:
        return np.frombuffer(self.digest, "<u8", n_words).astype(dtype)


@dataclass(frozen=True)
class SampleRNG:
    """Random numbers of B samples, by key."""

    keys: tuple[tuple[Hashable, ...], ...]

    @classmethod
    def of_step(cls, seed: int, step: int, positions: Sequence[int]) -> SampleRNG:
        """For training samples at these positions of a step's global batch."""
        return cls(tuple((seed, step, position) for position in positions))

    @classmethod
    def of_images(cls, images: Sequence[tuple[int, str, int]]) -> SampleRNG:
        """For generated images, each (seed, prompt, sample number)."""
        return cls(tuple(images))

    def select(self, rows: Sequence[int]) -> SampleRNG:
        """The random numbers of these samples."""
        return SampleRNG(tuple(self.keys[r] for r in rows))

    def uniforms(self, name: str) -> list[float]:
        """A number in [0, 1) for each sample, on the host."""
        return [philox(*key, name).random() for key in self.keys]

    def uniform(self, name: str, like: Tensor) -> Tensor:
        """(B,) in [0, 1), on the device and in the dtype of `like`."""
        return self.one_each(like, self.uniforms(name))

    def normal(self, name: str, like: Tensor) -> Tensor:
        """(B,) standard normal, on the device and in the dtype of `like`."""
        return self.one_each(like, [philox(*key, name).standard_normal() for key in self.keys])

    def one_each(self, like: Tensor, numbers: list[float]) -> Tensor:
        """(B,) on the device and in the dtype of `like`."""
        return to_device(torch.tensor(numbers, dtype=torch.float64).to(like.dtype), like.device)

    def normal_like(self, name: str, x: Packed) -> Tensor:
        """(T, d) standard normal, drawn per sample so that its noise does not depend on the rest of the batch.

        Samples are drawn by several threads at once: NumPy releases Python's lock while it fills an array.
        """
        if x.tokens.is_meta:
            return torch.empty_like(x.tokens)
        dtype = torch.float64 if x.tokens.dtype == torch.float64 else torch.float32
        noise = torch.empty(x.tokens.shape, dtype=dtype)

        def fill(sample: tuple[tuple[Hashable, ...], Tensor]) -> None:
            key, rows = sample
            philox(*key, name).standard_normal(out=rows.numpy(), dtype=rows.numpy().dtype)

        list(threads().map(fill, zip(self.keys, noise.split(x.lens), strict=True)))
        return to_device(noise.to(x.tokens.dtype), x.tokens.device)


@cache
def threads() -> ThreadPoolExecutor:
    """As many threads as torch may use in this process."""
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="noise")


os.register_at_fork(after_in_child=threads.cache_clear)  # a forked process has none of its parent's threads
