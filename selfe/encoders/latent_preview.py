"""Linear preview of latents: the pixels of a token as an affine function of its values, fitted by least squares.

It takes the place of a decoder where images only have to be recognised, as in sample grids of a run that trains from a
cache and loads no autoencoder.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from selfe.errors import UserError
from selfe.io.feature_cache import AGAIN
from selfe.types import Packed

FILE = "preview.safetensors"  # in a feature cache
RIDGE = 1e-4  # relative to the mean square of the latents; keeps values that never vary from having a weight


class LatentPreview:
    """token (d,) -> the square of pixels that it covers, from a fit to images and their latents."""

    def __init__(self, weight: Tensor, bias: Tensor, psnr: float):
        """
        Args:
            weight: (3 side^2, d), rows ordered as (colour, row, column) of a square of side^2 pixels.
            bias: (3 side^2,).
            psnr: dB, of the images of the fit.
        """
        self.weight, self.bias, self.psnr = weight, bias, psnr
        self.side = math.isqrt(len(bias) // 3)

    @classmethod
    def fit(cls, samples: Iterable[tuple[Tensor, Tensor]]) -> LatentPreview:
        """The best affine function for pairs of latents (rows, columns, d) and images (3, H, W) in [-1, 1]."""
        products, targets, energy, num_tokens = 0.0, 0.0, 0.0, 0
        for latents, image in samples:
            rows, columns, _ = latents.shape
            inputs = latents.flatten(0, 1).double()
            inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1)
            pixels = rearrange(image.double(), "c (h a) (w b) -> (h w) (c a b)", h=rows, w=columns)

            # sums of the normal equations
            products = products + inputs.T @ inputs
            targets = targets + inputs.T @ pixels
            energy += pixels.square().sum().item()
            num_tokens += len(inputs)

        if not num_tokens:
            raise UserError(f"{FILE}: none of the images to fit it to could be read; repair them and {AGAIN}")
        ridge = RIDGE * products.diagonal()[:-1].mean() * torch.ones(len(products), dtype=torch.float64)
        ridge[-1] = 0  # of the bias
        solution = torch.linalg.solve(products + ridge.diag(), targets)

        # squared error of the fit, from the same sums
        error = energy - 2 * (solution * targets).sum() + (solution * (products @ solution)).sum()
        mean_error = max(error.item() / (num_tokens * targets.shape[1]), 1e-12)
        return cls(solution[:-1].T.float(), solution[-1].float(), 10 * math.log10(4 / mean_error))

    def decode(self, latents: Packed) -> list[Tensor]:
        """Tokens (T, d) -> B x (3, H, W), float32."""
        weight, bias = (tensor.to(latents.tokens.device) for tensor in (self.weight, self.bias))
        pixels = torch.addmm(bias, latents.tokens.float(), weight.T)
        return [
            rearrange(of_image, "(h w) (c a b) -> c (h a) (w b)", h=rows, w=columns, a=self.side, b=self.side)
            for of_image, (rows, columns) in zip(latents.with_tokens(pixels).split(), latents.grids, strict=True)
        ]

    def save(self, folder: Path) -> None:
        """Write the fit beside a feature cache."""
        partial = folder / f"{FILE}.partial"
        tensors = {"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}
        save_file(tensors, partial, {"psnr": f"{self.psnr:.3f}"})
        partial.replace(folder / FILE)

    @classmethod
    def load(cls, folder: Path, token_dim: int) -> LatentPreview:
        """Read the fit of a feature cache.

        Raises:
            UserError: it is missing, or of other latents.
        """
        path = folder / FILE
        if not path.is_file():
            raise UserError(f"{path}: no such file; {AGAIN}, which adds it without encoding images again")
        with safe_open(path, "pt") as file:
            weight, bias, psnr = file.get_tensor("weight"), file.get_tensor("bias"), float(file.metadata()["psnr"])
        if weight.shape[1] != token_dim:
            raise UserError(
                f"{path}: is for tokens of {weight.shape[1]} values, not {token_dim}; remove it and {AGAIN}"
            )
        return cls(weight, bias, psnr)


def grids_of(sizes: Sequence[tuple[int, int]], multiple: int) -> list[tuple[int, int]]:
    """Grids of tokens of images of B x (height, width) pixels.

    Raises:
        UserError: a height or width is not a multiple of `multiple`.
    """
    for height, width in sizes:
        if height % multiple or width % multiple or min(height, width) < multiple:
            raise UserError(f"size {height} x {width}: height and width must be multiples of {multiple}")
    return [(height // multiple, width // multiple) for height, width in sizes]
