"""A dataset of precomputed latents: order and shapes of its source dataset, latents from a cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from selfe.data.dataset import BucketedDataset, SampleSpec
from selfe.io import feature_cache
from selfe.types import Batch, Split


class CachedData:
    """Samples as planned by `source`, whose image files are not opened. Use with the autoencoder `CachedLatents`."""

    def __init__(self, cache_dir: str, source: BucketedDataset):
        folder = Path(cache_dir)
        feature_cache.check(folder, source.facts())
        self.source, self.latents = source, feature_cache.Store(folder / "latents")
        self.has_val, self.multiple = source.has_val, source.multiple

    def resolution(self, step: int) -> tuple[int, ...]:
        """Pixel budgets of the training images at a step."""
        return self.source.resolution(step)

    def costs(self, seed: int, step: int, samples: range, split: Split) -> tuple[int, ...]:
        return self.source.costs(seed, step, samples, split)

    def batch(self, seed: int, step: int, samples: range, positions: Sequence[int], split: Split) -> Batch:
        """The batch of the source, with latents (rows, columns, values per token), bf16, in place of images."""
        return self.source.load(seed, step, samples, positions, split, self.read)

    def read(self, split: Split, row: SampleSpec, flipped: bool) -> Tensor:
        key = feature_cache.latent_key(split, row.source, row.index, row.shape, flipped)
        name = f"{self.source.sources[split][row.source].name(row.index)} at {row.shape[0]} x {row.shape[1]}"
        return self.latents.read(key, name)
