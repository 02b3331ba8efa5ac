"""Pictures that were encoded before: latents from what a cache holds, in place of an autoencoder that is not loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from selfe import cache
from selfe.draws import Draws
from selfe.types import Autoencoder, Packed, UserError, packed


class CachedLatents:
    """What `autoencoder` would give, its moments rounded to bf16. Goes with `CachedData`."""

    def __init__(self, cache_dir: str, autoencoder: Autoencoder, decode: bool = False):
        """
        Args:
            decode: load the autoencoder all the same, to draw pictures during training.
        """
        cache.check(Path(cache_dir), cache.describe("autoencoder", autoencoder))
        self.autoencoder, self.draws_pictures = autoencoder, decode
        self.token_dim, self.multiple = autoencoder.token_dim, autoencoder.multiple

    def load(self, device: torch.device) -> None:
        self.device = device
        if self.draws_pictures:
            self.autoencoder.load(device)

    def encode(self, images: Sequence[Tensor], draws: Draws) -> Packed:
        """B x (rows, columns, token_dim or twice that: latents, or means and standard deviations) -> float32 tokens."""
        entries = torch.cat([image.flatten(0, 1) for image in images]).to(self.device).float()
        mean = packed(entries[:, : self.token_dim], [tuple(image.shape[:2]) for image in images])
        if entries.shape[1] == self.token_dim:
            return mean
        return mean.with_tokens(mean.tokens + entries[:, self.token_dim :] * draws.normal_like("latent", mean))

    def decode(self, latents: Packed) -> list[Tensor]:
        return self.autoencoder.decode(latents)

    def noise(self, sizes: Sequence[tuple[int, int]], draws: Draws) -> Packed:
        if not self.draws_pictures:
            raise UserError(
                "training from a cache does not load the autoencoder: set system.autoencoder.params.decode=1 to draw "
                "pictures, or trainer.samples.prompts=[]"
            )
        return self.autoencoder.noise(sizes, draws)
