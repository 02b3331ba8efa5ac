"""A dataset of precomputed latents: order and shapes of its source dataset, latents from a cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from selfe.data.dataset import BucketedDataset, SampleSpec
from selfe.io import feature_cache
from selfe.io.feature_cache import FileStamp
from selfe.protocols import ImageEncoder
from selfe.types import Batch, Split

SAMPLED, STAMPS = 1024, "images.json"


class CachedData:
    """Samples as planned by `source`, whose image files are not opened. Use with the autoencoder `CachedLatents`."""

    def __init__(self, cache_dir: Path, source: BucketedDataset, features: ImageEncoder | None = None):
        """
        Args:
            cache_dir: feature cache, written from the images of `source`.
            source: the data set whose latents are cached.
            features: the vision encoder whose features are cached too, for objectives that want them; never loaded.
        """
        folder = Path(cache_dir)
        facts = source.facts()
        if features is not None:
            facts |= feature_cache.describe("features", features)
        feature_cache.check(folder, facts)
        self.features = features
        self.stored_features = None if features is None else feature_cache.Store(folder / "features")
        self.folder, self.source, self.latents = folder, source, feature_cache.Store(folder / "latents")
        self.has_val, self.multiple, self.num_images = source.has_val, source.multiple, source.num_images

    def resolution(self, step: int) -> tuple[int, ...]:
        """Pixel budgets of the training images at a step."""
        return self.source.resolution(step)

    def costs(self, seed: int, step: int, samples: range, split: Split) -> tuple[int, ...]:
        return self.source.costs(seed, step, samples, split)

    def batch(self, seed: int, step: int, samples: range, positions: Sequence[int], split: Split) -> Batch:
        """The batch of the source, with latents (rows, columns, values per token), bf16, in place of images."""
        if self.stored_features is None:
            return self.source.load(seed, step, samples, positions, split, self.read)

        # latents and features of an image are loaded together, because a replacement has its own
        batch = self.source.load(seed, step, samples, positions, split, self.read_both)
        latents, features = zip(*batch.images, strict=True)
        return replace(batch, images=latents, features=features)

    def read_both(self, split: Split, row: SampleSpec, flipped: bool) -> tuple[Tensor, Tensor]:
        """Latents and features of an image."""
        return self.read(split, row, flipped), self.read(split, row, flipped, self.stored_features)

    def read(self, split: Split, row: SampleSpec, flipped: bool, store: feature_cache.Store | None = None) -> Tensor:
        """The entry of an image in a store, by default its latents."""
        key = feature_cache.latent_key(split, row.source, row.index, row.shape, flipped)
        name = f"{self.source.sources[split][row.source].name(row.index)} at {row.shape[0]} x {row.shape[1]}"
        return (store or self.latents).read(key, name)

    def changed_images(self) -> str:
        """A warning if some of the images differ from those that were encoded, else an empty text.

        Compares the files of up to `SAMPLED` images of each manifest.
        """
        stamps = json.loads((self.folder / STAMPS).read_text())
        changed, num_compared = [], 0
        for split, sources in self.source.sources.items():
            for number, source in enumerate(sources):
                for index, stamp in stamps[f"{split} {number}"]:
                    num_compared += 1
                    if feature_cache.has_changed(FileStamp(*stamp), source.location(index)):
                        changed.append(source.name(index))
        if not changed:
            return ""
        return (
            f"warning: {self.folder}: {len(changed)} of {num_compared} images that were compared have changed since "
            f"they were encoded, the first is {changed[0]}; {feature_cache.AGAIN}"
        )


def write_stamps(folder: Path, source: BucketedDataset) -> None:
    """Record the files of up to `SAMPLED` images of each manifest, for `CachedData.changed_images`."""
    stamps = {}
    for split, sources in source.sources.items():
        for number, images in enumerate(sources):
            some = np.unique(np.linspace(0, len(images) - 1, SAMPLED).astype(int)).tolist()
            stamps[f"{split} {number}"] = [(i, feature_cache.file_stamp(images.location(i))) for i in some]
    partial = folder / f"{STAMPS}.partial"
    partial.write_text(json.dumps(stamps) + "\n")
    partial.rename(folder / STAMPS)
