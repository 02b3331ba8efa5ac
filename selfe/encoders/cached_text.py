"""Precomputed text embeddings: reads encoded captions from a cache instead of running the text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from selfe.io import feature_cache
from selfe.protocols import ShardLoader, TextEncoder
from selfe.types import StoredCaptions, TextCond


class CachedText:
    """Embeddings of `encoder` from a cache in bf16. The encoder itself is never loaded."""

    def __init__(self, cache_dir: Path, encoder: TextEncoder):
        """
        Args:
            cache_dir: feature cache, written with the settings of `encoder`.
            encoder: the text encoder whose embeddings are cached; never loaded.
        """
        self.folder = Path(cache_dir)
        feature_cache.check(self.folder, feature_cache.describe("text_encoder", encoder))
        self.encoder = encoder
        self.text_dim, self.pooled_dim = encoder.text_dim, encoder.pooled_dim
        self.text, self.pooled = feature_cache.Store(self.folder / "text"), feature_cache.Store(self.folder / "pooled")

    def output_settings(self) -> dict[str, Any]:
        return self.encoder.output_settings()

    def load(self, device: torch.device, shard: ShardLoader | None = None) -> None:
        self.device = device

    def read(self, captions: Sequence[str]) -> StoredCaptions:
        """The entries of distinct captions, on the host. Needs no `load`, so that loader workers can call it.

        Raises:
            UserError: a caption is not in the cache.
        """
        keys = [(feature_cache.digest(caption), f"the caption {caption[:60]!r}") for caption in captions]
        texts = [self.text.read(key, name)[0] for key, name in keys]
        pooled = [self.pooled.read(key, name)[0, 0] for key, name in keys]
        return StoredCaptions(tuple(captions), torch.cat(texts), tuple(map(len, texts)), torch.stack(pooled))

    def __call__(self, captions: Sequence[str]) -> TextCond:
        """Captions -> text (T, text_dim) and pooled (B, pooled_dim), float32. Raises UserError as `read`."""
        return self.read(captions).to(self.device)
