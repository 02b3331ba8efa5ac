"""Token order of a packed batch: [all text | all image] for weights, [text_i | image_i] per sample for attention.

Stream order gives each modality's layers one contiguous slice. Only attention needs tokens grouped by sample; the
permutations between the two orders are computed once per forward pass (`PackedLayout`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from selfe.backbones.attention import Sequences
from selfe.device import to_device
from selfe.types import Packed


@dataclass(frozen=True)
class PackedLayout:
    """Index maps between stream order [all text | all image], samples and attention order, for one forward pass."""

    num_text: int
    text: Segments  # one segment per sample
    image: Segments
    stream: Segments  # 2 B segments: text of all samples, then images of all samples
    order: (
        Tensor  # (T,) stream index of each token in attention order: [text | image] per sample, shortest sample first
    )
    inverse: Tensor  # (T,) the inverse permutation
    sequences: Sequences  # one per sample, text and image together, in attention order
    rotation: Tensor  # RoPE (T, 1, head_dim / 2, 2): cosines and sines, in attention order

    @classmethod
    def of(cls, image: Packed, text: Packed, axes: tuple[int, ...], theta: float) -> PackedLayout:
        """Layout of image and text tokens, with RoPE for `axes` (dimensions for frame, row, column)."""
        # Attention order: sort samples by length, so that sequences of equal length are adjacent.
        device, num_text = image.tokens.device, text.tokens.shape[0]
        total = [i + n for i, n in zip(image.lens, text.lens, strict=True)]
        samples = sorted(range(len(total)), key=total.__getitem__)
        place = torch.empty(len(total), dtype=torch.int64)
        place[samples] = torch.arange(len(total))
        place = to_device(place, device)
        # The sort is stable: text stays before image within a sample.
        order = torch.argsort(torch.cat([place[text.owner], place[image.owner]]), stable=True)

        # RoPE angles: 0 for text tokens, patch positions for image tokens.
        working = torch.promote_types(image.tokens.dtype, torch.float32)
        still = torch.tensor([1.0, 0.0], dtype=working).expand(max(text.lens), 1, sum(axes) // 2, 2)
        rotation = [
            part
            for i in samples
            for part in (still[: text.lens[i]], grid_rotation(image.grids[i], axes, theta, working))
        ]

        return cls(
            num_text=num_text,
            text=Segments.of(text.owner, text.lens),
            image=Segments.of(image.owner, image.lens),
            stream=Segments.of(torch.cat([text.owner, image.owner + len(text)]), [*text.lens, *image.lens]),
            order=order,
            inverse=torch.argsort(order),
            sequences=Sequences.of([total[i] for i in samples], device),
            rotation=to_device(torch.cat(rotation), device),
        )

    def sort(self, x: Tensor) -> Tensor:
        """Permute the rows of x from stream order to attention order."""
        return Reorder.apply(x, self.order, self.inverse)

    def unsort(self, x: Tensor) -> Tensor:
        """Permute the rows of x from attention order to stream order."""
        return Reorder.apply(x, self.inverse, self.order)


@lru_cache(maxsize=256)
def grid_rotation(grid: tuple[int, int], axes: tuple[int, ...], theta: float, dtype: torch.dtype) -> Tensor:
    """RoPE cosines and sines of an image's patches, (rows * columns, 1, head_dim / 2, 2).

    Patch positions are (frame 0, row, column); angles are computed in float64, as in FLUX.
    """
    rows, columns = grid
    position = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double()  # (n, 2)
    position = torch.cat([torch.zeros(rows * columns, 1, dtype=torch.float64), position], dim=1)

    parts = [
        position[:, [i]] * theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim) for i, dim in enumerate(axes)
    ]
    angles = torch.cat(parts, dim=1)[:, None]
    return torch.stack([angles.cos(), angles.sin()], dim=-1).to(dtype)


@dataclass(frozen=True)
class Segments:
    """Tokens in contiguous segments, where each segment shares one row of per-sample values."""

    owner: Tensor  # (n,) row index of each token, ascending
    starts: Tensor  # (rows,) first token of each segment

    @classmethod
    def of(cls, owner: Tensor, lens: Sequence[int]) -> Segments:
        return cls(owner, to_device(torch.tensor([0, *accumulate(lens)][:-1]), owner.device))

    def broadcast(self, values: Tensor) -> Tensor:
        """values (rows, width) -> (n, width), each row repeated for the tokens of its segment."""
        return Broadcast.apply(values, self.owner, self.starts)

    def addcmul(self, base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
        """base + x * broadcast(factor), with base and x (n, width) and factor (rows, width)."""
        return Addcmul.apply(base, x, factor, self.owner, self.starts)


def sum_runs(values: Tensor, starts: Tensor) -> Tensor:
    """Sum over each segment, (n, width) -> (rows, width), accumulated in at least float32.

    Uses `embedding_bag`, which is much faster than `segment_reduce` on CPU.
    """
    working, every = torch.promote_types(values.dtype, torch.float32), torch.arange(len(values), device=values.device)
    return F.embedding_bag(every, values.to(working), starts, mode="sum").to(values.dtype)


# These functions have no separate setup_context: torch inspects its signature at every call, which costs more than the
# operation itself.


class Broadcast(torch.autograd.Function):
    """values[owner], with a backward that sums over segments.

    The backward of indexing uses atomic adds, whose order, and therefore rounding, is not deterministic.
    """

    @staticmethod
    def forward(ctx, values: Tensor, owner: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(starts)
        return values.index_select(0, owner)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return sum_runs(grad, *ctx.saved_tensors), None, None


class Addcmul(torch.autograd.Function):
    """base + x * factor[owner]. Saves factor per row for the backward, not expanded to every token."""

    @staticmethod
    def forward(ctx, base: Tensor, x: Tensor, factor: Tensor, owner: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(x, factor, owner, starts)
        return torch.addcmul(base, x, factor.index_select(0, owner))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, factor, owner, starts = ctx.saved_tensors
        return grad, grad * factor.index_select(0, owner), sum_runs(grad * x, starts), None, None


class Reorder(torch.autograd.Function):
    """Permute the rows of x. The backward is a gather with the inverse permutation instead of a scatter-add."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None
