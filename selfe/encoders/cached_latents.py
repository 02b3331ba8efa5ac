"""Precomputed latents: reads encoded images from a cache instead of running the autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfe.encoders.latent_preview import LatentPreview, grids_of
from selfe.io import feature_cache
from selfe.protocols import Autoencoder
from selfe.rng import SampleRNG
from selfe.types import Packed, packed


class CachedLatents:
    """Latents of `autoencoder` from cached moments in bf16. For use with `CachedData`."""

    def __init__(self, cache_dir: Path, autoencoder: Autoencoder, decode: bool = False):
        """
        Args:
            cache_dir: feature cache, written with the settings of `autoencoder`.
            autoencoder: the autoencoder whose latents are cached; not loaded unless `decode` is set.
            decode: load the autoencoder anyway, to decode sample images during training. Otherwise they are shown by a
                linear preview, which `selfe precompute` fits.
        """
        feature_cache.check(Path(cache_dir), feature_cache.describe("autoencoder", autoencoder))
        self.cache_dir = Path(cache_dir)
        self.autoencoder, self.decodes = autoencoder, decode
        self.token_dim, self.multiple = autoencoder.token_dim, autoencoder.multiple

    def output_settings(self) -> dict[str, Any]:
        return self.autoencoder.output_settings()

    def load(self, device: torch.device) -> None:
        self.device = device
        if self.decodes:
            self.autoencoder.load(device)

    @property
    def is_preview(self) -> bool:
        """Whether decoded images are only a linear preview."""
        return not self.decodes

    @cached_property
    def preview(self) -> LatentPreview:
        return LatentPreview.load(self.cache_dir, self.token_dim)

    def encode(self, images: Sequence[Tensor], rng: SampleRNG) -> Packed:
        """Cache entries -> tokens (T, token_dim), float32; latents are sampled if deviations are cached."""
        mean, deviation = self.moments(images)
        if deviation is None:
            return mean
        return mean.with_tokens(mean.tokens + deviation * rng.normal_like("latent", mean))

    def moments(self, images: Sequence[Tensor]) -> tuple[Packed, Tensor | None]:
        """Cache entries -> means, standard deviations, (T, token_dim) each, float32.

        An entry is (rows, columns, token_dim) for latents, whose deviations are None, or (rows, columns, 2 token_dim)
        for means and standard deviations.
        """
        entries = torch.cat([image.flatten(0, 1) for image in images]).to(self.device).float()
        mean = packed(entries[:, : self.token_dim], [tuple(image.shape[:2]) for image in images])
        deviation = entries[:, self.token_dim :] if entries.shape[1] > self.token_dim else None
        return mean, deviation

    def decode(self, latents: Packed) -> list[Tensor]:
        """Tokens (T, token_dim) -> B x (3, H, W), float32; by the linear preview, unless the autoencoder is loaded."""
        return self.autoencoder.decode(latents) if self.decodes else self.preview.decode(latents)

    def noise(self, sizes: Sequence[tuple[int, int]], rng: SampleRNG) -> Packed:
        """Standard normal tokens (T, token_dim) for images of B x (height, width) pixels.

        Raises:
            UserError: a size is not a multiple of `multiple`, or the cache has no preview to decode samples with.
        """
        if self.decodes:
            return self.autoencoder.noise(sizes, rng)

        # the same numbers, without the autoencoder's weights; a missing preview is reported before the first step
        grids = grids_of(sizes, self.preview.side)
        tokens = torch.empty(sum(rows * columns for rows, columns in grids), self.token_dim, device=self.device)
        like = packed(tokens, grids)
        return like.with_tokens(rng.normal_like("noise", like))
