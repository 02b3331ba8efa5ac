"""Projection heads that are trained with the backbone (`Backbone.add_head`) and left out of sampling and export."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from selfe.protocols import Backbone
from selfe.types import Packed


def layer_width(backbone: Backbone, layer: str) -> int:
    """The width of a block's output. Raises ValueError if the backbone has no such block."""
    widths = backbone.feature_widths
    if layer not in widths:
        raise ValueError(f"objective: the backbone has no block {layer}; its blocks are {', '.join(widths)}")
    return widths[layer]


class MlpHead(nn.Module):
    """Three linear layers with SiLU, applied to each token, as in REPA (arXiv 2410.06940)."""

    def __init__(self, width: int, hidden: int, out: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out)
        )

    def forward(self, features: Tensor, like: Packed) -> Tensor:
        """(T, width) -> (T, out)."""
        return self.layers(features)

    def flops(self, num_tokens: int) -> int:
        return 2 * num_tokens * sum(layer.weight.numel() for layer in self.layers[::2])


class ConvHead(nn.Module):
    """A convolution of 3 x 3 tokens, zero-padded at the border of an image, as in iREPA (arXiv 2512.10794)."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.conv = nn.Conv2d(width, out, kernel_size=3, padding=1)

    def forward(self, features: Tensor, like: Packed) -> Tensor:
        """(T, width), on the grids of `like` -> (T, out)."""
        images = features.split(like.lens)
        by_grid = defaultdict(list)
        for index, grid in enumerate(like.grids):
            by_grid[grid].append(index)

        results: dict[int, Tensor] = {}
        for grid, indices in by_grid.items():
            stacked = torch.stack([images[index] for index in indices]).unflatten(1, grid)  # (B, rows, columns, width)
            projected = self.conv(stacked.movedim(-1, 1)).flatten(2).transpose(1, 2)
            results |= zip(indices, projected, strict=True)
        return torch.cat([results[index] for index in range(len(images))])

    def flops(self, num_tokens: int) -> int:
        return 2 * num_tokens * self.conv.weight.numel()
