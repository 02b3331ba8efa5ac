"""An autoencoder that does nothing: pictures cut to patches of pixels. For small pictures, without a VAE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from selfe.draws import Draws
from selfe.types import Packed, UserError, packed


class Identity:
    """A token is (channel, row, column) of a square patch."""

    def __init__(self, patch: int = 2):
        if patch < 1:
            raise ValueError(f"patch is a number of pixels, at least 1, got {patch}")
        self.patch = self.multiple = patch
        self.token_dim = 3 * patch**2

    def load(self, device: torch.device) -> None:
        self.device = device

    def encode(self, images: Sequence[Tensor], draws: Draws) -> Packed:
        """B x (3, H, W) in [-1, 1] -> tokens (T, 3 patch^2), float32."""
        return self.moments(images)[0]

    def moments(self, images: Sequence[Tensor]) -> tuple[Packed, None]:
        """The tokens, which have no spread."""
        p = self.patch
        tokens = [rearrange(x, "c (h p) (w q) -> (h w) (c p q)", p=p, q=p) for x in images]
        return packed(torch.cat(tokens).to(self.device), [(x.shape[1] // p, x.shape[2] // p) for x in images]), None

    def decode(self, latents: Packed) -> list[Tensor]:
        """Tokens (T, 3 patch^2) -> B x (3, H, W), float32, as far outside of [-1, 1] as the denoiser left them."""
        return [
            rearrange(tokens, "(h w) (c p q) -> c (h p) (w q)", h=grid[0], p=self.patch, q=self.patch)
            for tokens, grid in zip(latents.split(), latents.grids, strict=True)
        ]

    def noise(self, sizes: Sequence[tuple[int, int]], draws: Draws) -> Packed:
        """Standard normal tokens (T, 3 patch^2) for pictures of B x (height, width) pixels."""
        for height, width in sizes:
            if height % self.patch or width % self.patch or min(height, width) < self.patch:
                raise UserError(f"size {height} x {width}: height and width must be multiples of {self.patch}")
        grids = [(height // self.patch, width // self.patch) for height, width in sizes]
        like = packed(torch.empty(sum(h * w for h, w in grids), self.token_dim, device=self.device), grids)
        return like.with_tokens(draws.normal_like("noise", like))
