"""Where the tokens of a packed batch lie: [all text | all image] for weights, [text_i | image_i] for attention.

The stream lies so that each modality's weights see one contiguous slice; attention alone needs sample by sample, and
reaches it through index maps made once per call (`Layout`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from selfe.attention import Sequences
from selfe.device import to_device
from selfe.types import Packed


@dataclass(frozen=True)
class Layout:
    """How one call's stream [all text | all image] maps to samples and to attention's order. Made once per call."""

    num_text: int
    text: Runs  # a run for each sample
    image: Runs
    stream: Runs  # 2 B runs: the samples' text, then their images
    order: Tensor  # (T,) stream positions in attention's order: [text | image] sample by sample, the shortest first
    inverse: Tensor  # (T,) the way back
    sequences: Sequences  # one for each sample, text and image together, in attention's order
    rotation: Tensor  # (T, 1, head_dim / 2, 2) cosines and sines, in attention's order

    @classmethod
    def of(cls, image: Packed, text: Packed, axes: tuple[int, ...], theta: float) -> Layout:
        device, num_text = image.tokens.device, text.tokens.shape[0]
        total = [i + n for i, n in zip(image.lens, text.lens, strict=True)]
        samples = sorted(range(len(total)), key=total.__getitem__)
        place = torch.empty(len(total), dtype=torch.int64)
        place[samples] = torch.arange(len(total))
        place = to_device(place, device)
        # stable: text stays before image within a sample
        order = torch.argsort(torch.cat([place[text.owner], place[image.owner]]), stable=True)
        working = torch.promote_types(image.tokens.dtype, torch.float32)
        still = torch.tensor([1.0, 0.0], dtype=working).expand(max(text.lens), 1, sum(axes) // 2, 2)  # text: angle 0
        rotation = [
            part
            for i in samples
            for part in (still[: text.lens[i]], grid_rotation(image.grids[i], axes, theta, working))
        ]
        return cls(
            num_text=num_text,
            text=Runs.of(text.owner, text.lens),
            image=Runs.of(image.owner, image.lens),
            stream=Runs.of(torch.cat([text.owner, image.owner + len(text)]), [*text.lens, *image.lens]),
            order=order,
            inverse=torch.argsort(order),
            sequences=Sequences.of([total[i] for i in samples], device),
            rotation=to_device(torch.cat(rotation), device),
        )

    def sort(self, x: Tensor) -> Tensor:
        """The rows of x, from the stream's order to attention's."""
        return Reorder.apply(x, self.order, self.inverse)

    def unsort(self, x: Tensor) -> Tensor:
        """And back."""
        return Reorder.apply(x, self.inverse, self.order)


@lru_cache(maxsize=256)
def grid_rotation(grid: tuple[int, int], axes: tuple[int, ...], theta: float, dtype: torch.dtype) -> Tensor:
    """RoPE of a picture's patches at (frame 0, row, column): (rows * columns, 1, head_dim / 2, 2) cosines and sines."""
    rows, columns = grid
    position = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double()  # (n, 2)
    position = torch.cat([torch.zeros(rows * columns, 1, dtype=torch.float64), position], dim=1)
    parts = [
        position[:, [i]] * theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim) for i, dim in enumerate(axes)
    ]
    angles = torch.cat(parts, dim=1)[:, None]
    return torch.stack([angles.cos(), angles.sin()], dim=-1).to(dtype)


@dataclass(frozen=True)
class Runs:
    """Tokens that lie run by run, each run sharing the numbers of one row."""

    owner: Tensor  # (n,) the row of a token, ascending
    starts: Tensor  # (rows,) where each run begins

    @classmethod
    def of(cls, owner: Tensor, lens: Sequence[int]) -> Runs:
        return cls(owner, to_device(torch.tensor([0, *accumulate(lens)][:-1]), owner.device))

    def spread(self, values: Tensor) -> Tensor:
        """values (rows, width) -> (n, width), every token getting its row."""
        return Spread.apply(values, self.owner, self.starts)

    def addcmul(self, base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
        """base + x * spread(factor), with base and x (n, width) and factor (rows, width)."""
        return Addcmul.apply(base, x, factor, self.owner, self.starts)


def sum_runs(values: Tensor, starts: Tensor) -> Tensor:
    """(n, width) -> (rows, width), the sum of every run, added up in no less than float32.

    A bag of embeddings is just that, and on a CPU far faster than `segment_reduce`.
    """
    working, every = torch.promote_types(values.dtype, torch.float32), torch.arange(len(values), device=values.device)
    return F.embedding_bag(every, values.to(working), starts, mode="sum").to(values.dtype)


# Neither function has a separate setup_context: torch would look up its signature at every call, slower than the work.


class Spread(torch.autograd.Function):
    """The rows `owner` of values, with a backward that sums run by run.

    Indexing's own backward adds with atomics, in an order that varies from run to run and so does the last bit.
    """

    @staticmethod
    def forward(ctx, values: Tensor, owner: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(starts)
        return values.index_select(0, owner)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return sum_runs(grad, *ctx.saved_tensors), None, None


class Addcmul(torch.autograd.Function):
    """base + x * factor[owner], keeping the rows of factor for the backward and not one for every token."""

    @staticmethod
    def forward(ctx, base: Tensor, x: Tensor, factor: Tensor, owner: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(x, factor, owner, starts)
        return torch.addcmul(base, x, factor.index_select(0, owner))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, factor, owner, starts = ctx.saved_tensors
        return grad, grad * factor.index_select(0, owner), sum_runs(grad * x, starts), None, None


class Reorder(torch.autograd.Function):
    """The rows of x in a new order, whose backward is the inverse permutation rather than a sum over indices."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None
