"""Token order of a packed batch: [all text | all image] for weights, [text_i | image_i] per sample for attention.

Stream order gives each modality's layers one contiguous slice; attention needs tokens grouped by sample. The maps
between the two orders are computed once for the calls of a sampling run (`PackedLayout`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from selfe.backbones.attention import Sequences
from selfe.device import to_device

Grids = tuple[tuple[int, int], ...]  # (rows, columns) of each sample, as in `Packed`


@dataclass(frozen=True)
class PackedLayout:
    """Index maps between stream order [all text | all image], samples and attention order.

    Conditioning and modulation have a row per sample. With `per_token` times, they have a row per sample for its text,
    followed by a row per image token.
    """

    num_text: int
    text: Segments  # one segment per sample
    image: Segments | EachToken
    joint: Segments | EachToken  # text and image of a sample together, in attention order
    samples: Tensor  # (B,) samples in attention order: shortest first
    order: Tensor  # (T,) stream index of each token in attention order: [text | image] per sample
    inverse: Tensor  # (T,) the inverse permutation
    sequences: Sequences  # one per sample, text and image together, in attention order
    rotation: Tensor  # RoPE (2, T, 1, head_dim), see `grid_rotation`, in attention order
    per_token: bool = False

    @classmethod
    @lru_cache(maxsize=1)  # consecutive calls of a sampling run have the same layout
    def of(
        cls, image: Grids, text: Grids, axes: tuple[int, ...], theta: float, dtype: torch.dtype, device: torch.device
    ) -> PackedLayout:
        """Layout of image and text tokens, computed on the host and copied to the device at once.

        Args:
            image: grids of the images.
            text: grids of the captions, 1 x length.
            axes: dimensions of RoPE for frame, row, column.
            theta: base of the RoPE frequencies.
            dtype: compute precision of the network; RoPE is computed in at least float32.
        """
        working = torch.promote_types(dtype, torch.float32)
        rotations = [grid_rotation(grid, axes, theta, working) for grid in image]
        return cls.build([columns for _, columns in text], rotations, dtype, device)

    @classmethod
    def of_route(
        cls,
        image: Grids,
        text: Grids,
        axes: tuple[int, ...],
        theta: float,
        dtype: torch.dtype,
        device: torch.device,
        kept: Sequence[Tensor],
    ) -> PackedLayout:
        """`of`, for the image tokens `kept` alone: B x (n,) ascending indices of tokens of each image, on the host."""
        working = torch.promote_types(dtype, torch.float32)
        rotations = [grid_rotation(grid, axes, theta, working) for grid in image]
        rotations = [rotation[:, indices] for rotation, indices in zip(rotations, kept, strict=True)]
        return cls.build([columns for _, columns in text], rotations, dtype, device)

    @classmethod
    def build(
        cls, text_lens: Sequence[int], rotations: Sequence[Tensor], dtype: torch.dtype, device: torch.device
    ) -> PackedLayout:
        """Layout of captions of these lengths and images whose tokens have these RoPE `rotations`, on the host."""
        image_lens = [rotation.shape[1] for rotation in rotations]
        num_text, lens = sum(text_lens), [t + i for t, i in zip(text_lens, image_lens, strict=True)]

        # Attention order: sort samples by length, so that sequences of equal length are adjacent.
        samples = sorted(range(len(lens)), key=lens.__getitem__)
        tokens = torch.arange(sum(lens))
        texts, images = tokens[:num_text].split(list(text_lens)), tokens[num_text:].split(image_lens)
        order = torch.cat([part for i in samples for part in (texts[i], images[i])])
        order, inverse, samples_index = to_device_at_once([order, torch.argsort(order), torch.tensor(samples)], device)

        # RoPE angles: 0 for text tokens, patch positions for image tokens.
        _, _, _, head_dim = rotations[0].shape
        still = torch.tensor([1.0, 0.0], dtype=rotations[0].dtype).view(2, 1, 1, 1)
        still = still.expand(2, max(text_lens), 1, head_dim)
        rotation = []
        for i in samples:
            rotation += [still[:, : text_lens[i]], rotations[i]]

        return cls(
            num_text=num_text,
            text=Segments.of(text_lens, dtype, device),
            image=Segments.of(image_lens, dtype, device),
            joint=Segments.of([lens[i] for i in samples], dtype, device),
            samples=samples_index,
            order=order,
            inverse=inverse,
            sequences=Sequences.of([lens[i] for i in samples], device),
            rotation=to_device(torch.cat(rotation, dim=1), device),
        )

    def with_token_times(self) -> PackedLayout:
        """The same tokens, where every image token has times of its own."""
        return replace(self, image=EachToken(), joint=EachToken(), per_token=True)

    def rows_by_modality(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of conditioning (rows, width) for text and for image tokens: the same ones unless `per_token`."""
        if not self.per_token:
            return values, values
        num_samples = len(self.samples)
        return values[:num_samples], values[num_samples:]

    def joint_rows(self, values: Tensor) -> Tensor:
        """Rows of modulation as `joint` takes them: unchanged, or one per token in attention order if `per_token`."""
        if not self.per_token:
            return values
        text, image = self.rows_by_modality(values)
        return self.sort(torch.cat([self.text.broadcast(text), image]))

    def sort(self, x: Tensor) -> Tensor:
        """Permute the rows of x from stream order to attention order."""
        return Reorder.apply(x, self.order, self.inverse)

    def unsort(self, x: Tensor) -> Tensor:
        """Permute the rows of x from attention order to stream order."""
        return Reorder.apply(x, self.inverse, self.order)


def to_device_at_once(parts: Sequence[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """Copy 1-D host tensors of the same dtype to the device in one transfer."""
    return to_device(torch.cat(parts), device).split([len(part) for part in parts])


@lru_cache(maxsize=256)
def grid_rotation(grid: tuple[int, int], axes: tuple[int, ...], theta: float, dtype: torch.dtype) -> Tensor:
    """RoPE of an image's patches, (2, rows * columns, 1, head_dim): cosines, and sines with the sign of a rotation.

    A pair (a, b) of features becomes (a cos - b sin, b cos + a sin). Patch positions are (frame 0, row, column); angles
    are computed in float64, as in FLUX.
    """
    rows, columns = grid
    position = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double()  # (n, 2)
    position = torch.cat([torch.zeros(rows * columns, 1, dtype=torch.float64), position], dim=1)

    # one angle per pair of features, (n, 1, head_dim / 2)
    angles = torch.cat(
        [
            position[:, [i]] * theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            for i, dim in enumerate(axes)
        ],
        dim=1,
    )[:, None]

    cos, sin = angles.cos(), angles.sin()
    pairs = [torch.stack([cos, cos], dim=-1), torch.stack([-sin, sin], dim=-1)]
    return torch.stack([pair.flatten(-2) for pair in pairs]).to(dtype)


@dataclass(frozen=True)
class Segments:
    """Tokens in contiguous segments, where each segment shares one row of per-sample values."""

    owner: Tensor  # (n,) row index of each token, ascending
    reducer: Tensor  # sums over segments, see `sum_segments`

    @classmethod
    def of(cls, lens: Sequence[int], dtype: torch.dtype, device: torch.device) -> Segments:
        """Segments of these lengths; `dtype` is that of the values."""
        starts = torch.tensor([0, *accumulate(lens)][:-1])
        owner = torch.repeat_interleave(torch.tensor(lens), output_size=sum(lens))
        owner, starts = to_device_at_once([owner, starts], device)
        if device.type in ("cpu", "meta"):
            return cls(owner, starts)
        return cls(owner, one_hot(owner, len(lens), dtype))

    def broadcast(self, values: Tensor) -> Tensor:
        """values (rows, width) -> (n, width), each row repeated for the tokens of its segment."""
        return Broadcast.apply(values, self.owner, self.reducer)

    def addcmul(self, base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
        """base + x * broadcast(factor), with base and x (n, width) and factor (rows, width)."""
        return Addcmul.apply(base, x, factor, self.owner, self.reducer)


class EachToken:
    """`Segments` of a single token each: every token has its own row of values."""

    def broadcast(self, values: Tensor) -> Tensor:
        return values

    def addcmul(self, base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
        return torch.addcmul(base, x, factor)


def one_hot(owner: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """(rows, n) matrix that is 1 where a token belongs to a row."""
    return (torch.arange(rows, device=owner.device)[:, None] == owner).to(dtype)


def sum_segments(values: Tensor, reducer: Tensor) -> Tensor:
    """Sum over each segment, (n, width) -> (rows, width), accumulated in at least float32.

    `reducer` is either the one-hot matrix (rows, n) of the segments (accelerators: a matrix product, because segment
    kernels walk a segment serially), or the first token (rows,) of each segment (CPU: `embedding_bag`, much faster than
    `segment_reduce`).
    """
    if reducer.ndim == 2:
        return reducer.to(values.dtype) @ values

    working = torch.promote_types(values.dtype, torch.float32)
    every = torch.arange(len(values), device=values.device)
    return F.embedding_bag(every, values.to(working), reducer, mode="sum").to(values.dtype)


# These functions have no separate setup_context: torch inspects its signature at every call, which costs more than the
# operation itself.


class Broadcast(torch.autograd.Function):
    """values[owner], with a backward that sums over segments.

    The backward of indexing uses atomic adds, whose order, and therefore rounding, is not deterministic.
    """

    @staticmethod
    def forward(ctx, values: Tensor, owner: Tensor, reducer: Tensor) -> Tensor:
        ctx.save_for_backward(reducer)
        return values.index_select(0, owner)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return sum_segments(grad, *ctx.saved_tensors), None, None


class Addcmul(torch.autograd.Function):
    """base + x * factor[owner]. Saves factor per row for the backward, not expanded to every token."""

    @staticmethod
    def forward(ctx, base: Tensor, x: Tensor, factor: Tensor, owner: Tensor, reducer: Tensor) -> Tensor:
        ctx.save_for_backward(x, factor, owner, reducer)
        return torch.addcmul(base, x, factor.index_select(0, owner))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, factor, owner, reducer = ctx.saved_tensors
        return grad, grad * factor.index_select(0, owner), sum_segments(grad * x, reducer), None, None


class Reorder(torch.autograd.Function):
    """Permute the rows of x. The backward is a gather with the inverse permutation instead of a scatter-add."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None
