"""Identity autoencoder: images as patches of raw pixels. For training on small images without a VAE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from selfe.errors import UserError
from selfe.rng import SampleRNG
from selfe.types import Packed, check_range, packed


class Identity:
    """A token is a square patch of pixels, flattened in the order (channel, row, column)."""

    def __init__(self, patch: int = 2):
        """
        Args:
            patch: height and width of a patch, pixels.
        """
        check_range("patch", patch, 1, 1024)
        self.patch = self.multiple = patch
        self.token_dim = 3 * patch**2

    def output_settings(self) -> dict[str, Any]:
        return {"patch": self.patch}

    def load(self, device: torch.device) -> None:
        self.device = device

    def encode(self, images: Sequence[Tensor], rng: SampleRNG) -> Packed:
        """B x (3, H, W) in [-1, 1] -> tokens (T, 3 patch^2), float32."""
        return self.moments(images)[0]

    def moments(self, images: Sequence[Tensor]) -> tuple[Packed, None]:
        """Tokens (T, 3 patch^2), float32, and None: the encoding is deterministic."""
        p = self.patch
        tokens = [rearrange(x, "c (h p) (w q) -> (h w) (c p q)", p=p, q=p) for x in images]
        return packed(torch.cat(tokens).to(self.device), [(x.shape[1] // p, x.shape[2] // p) for x in images]), None

    def decode(self, latents: Packed) -> list[Tensor]:
        """Tokens (T, 3 patch^2) -> B x (3, H, W), float32; values are not clamped to [-1, 1]."""
        return [
            rearrange(tokens, "(h w) (c p q) -> c (h p) (w q)", h=grid[0], p=self.patch, q=self.patch)
            for tokens, grid in zip(latents.split(), latents.grids, strict=True)
        ]

    def noise(self, sizes: Sequence[tuple[int, int]], rng: SampleRNG) -> Packed:
        """Standard normal tokens (T, 3 patch^2) for images of B x (height, width) pixels."""
        for height, width in sizes:
            if height % self.patch or width % self.patch or min(height, width) < self.patch:
                raise UserError(f"size {height} x {width}: height and width must be multiples of {self.patch}")
        grids = [(height // self.patch, width // self.patch) for height, width in sizes]
        like = packed(torch.empty(sum(h * w for h, w in grids), self.token_dim, device=self.device), grids)
        return like.with_tokens(rng.normal_like("noise", like))
