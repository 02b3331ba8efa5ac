"""An autoencoder: the Haar transform of blocks of 2 x 2 pixels, which loses nothing. A token is a block."""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from selfe.rng import SampleRNG
from selfe.types import Packed, packed

HAAR = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2.0  # orthonormal, symmetric


class Haar:
    multiple = 2  # pixels
    token_dim = 12  # 3 colours x 4 coefficients

    def output_settings(self) -> dict[str, Any]:
        return {}

    def load(self, device: torch.device) -> None:
        self.device, self.haar = device, HAAR.to(device)

    def moments(self, images: Sequence[Tensor]) -> tuple[Packed, None]:
        """B x (3, H, W) in [-1, 1] -> tokens (T, 12); None: there is nothing to sample."""
        blocks = [rearrange(image, "c (h p) (w q) -> (h w) c (p q)", p=2, q=2) for image in images]
        tokens = (torch.cat(blocks).to(self.device) @ self.haar).flatten(1)
        return packed(tokens, [(image.shape[1] // 2, image.shape[2] // 2) for image in images]), None

    def encode(self, images: Sequence[Tensor], rng: SampleRNG) -> Packed:
        return self.moments(images)[0]

    def decode(self, latents: Packed) -> list[Tensor]:
        """Tokens (T, 12) -> B x (3, H, W)."""
        blocks = [tokens.unflatten(1, (3, 4)) @ self.haar for tokens in latents.split()]
        shape = "(h w) c (p q) -> c (h p) (w q)"
        return [rearrange(x, shape, h=h, p=2, q=2) for x, (h, _) in zip(blocks, latents.grids, strict=True)]

    def noise(self, sizes: Sequence[tuple[int, int]], rng: SampleRNG) -> Packed:
        """Standard normal tokens (T, 12) for images of B x (height, width) pixels."""
        grids = [(height // 2, width // 2) for height, width in sizes]
        empty = packed(torch.empty(sum(h * w for h, w in grids), self.token_dim, device=self.device), grids)
        return empty.with_tokens(rng.normal_like("noise", empty))
