"""Shared types: packed tokens, text conditioning, batches, losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from selfe.device import to_device
from selfe.errors import UserError

Precision = Literal["bf16", "fp32"]
PrecisionOrAuto = Literal["auto", "bf16", "fp32"]  # auto: `device.choose_precision`
Split = Literal["train", "val"]
DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


# largest values that are not typing errors; they also keep arithmetic on steps and sizes within 64 bits
MOST_STEPS = 10**9
MOST_SAMPLES = 10**7  # per batch
MOST_WIDTH = 2**20  # channels, heads, layers


def check_range(name: str, value: Any, low: float, high: float) -> None:
    """Raise ValueError unless a number, or every number of a sequence, is in [low, high]. None is not checked."""
    for number in value if isinstance(value, (tuple, list)) else (value,):
        if number is not None and not low <= number <= high:  # also refuses NaN
            raise ValueError(f"{name} must be between {low:g} and {high:g}, got {number}")


def check_period(name: str, value: int | None, off: str = "null") -> None:
    """Raise ValueError unless a number of steps between two events is positive; `off` names what switches them off."""
    if value is not None and not 1 <= value <= MOST_STEPS:
        raise ValueError(f"{name} must be between 1 and {MOST_STEPS:g}, got {value}; {off} switches this off")


def is_due(done: int, every: int | None) -> bool:
    """Whether an event that comes every `every` steps comes after `done` steps; never, if it is None."""
    return every is not None and done % every == 0


@dataclass(frozen=True)
class Packed:
    """B sequences of any lengths, concatenated without padding.

    An image is a grid of patches in row-major order; a caption of n tokens is a 1 x n grid; a point is a 1 x 1 grid.
    """

    tokens: Tensor  # (T, d) with T = sum(lens)
    owner: Tensor  # (T,) int64, the sample index of each token
    counts: Tensor  # (B,) int64, the tokens of each sequence; on the device, as `lens` is on the host
    grids: tuple[tuple[int, int], ...]  # B x (rows, columns)

    @property
    def lens(self) -> tuple[int, ...]:
        """Tokens of each sequence, B numbers."""
        return tuple(rows * columns for rows, columns in self.grids)

    def __len__(self) -> int:
        return len(self.grids)

    def split(self) -> tuple[Tensor, ...]:
        """Views of the B sequences, each (len, d)."""
        return self.tokens.split(self.lens)

    def with_tokens(self, tokens: Tensor) -> Packed:
        """The same layout with other tokens (T, d)."""
        return replace(self, tokens=tokens)

    def select(self, rows: Sequence[int]) -> Packed:
        """The sequences of these samples, in this order; rows may repeat."""
        parts = self.split()
        return packed(torch.cat([parts[r] for r in rows]), [self.grids[r] for r in rows])


def packed(tokens: Tensor, grids: Sequence[tuple[int, int]]) -> Packed:
    """`Packed` from tokens (T, d) that are already concatenated."""
    lens = [rows * columns for rows, columns in grids]
    assert sum(lens) == tokens.shape[0], f"grids hold {sum(lens)} tokens, got {tokens.shape[0]}"
    counts = torch.tensor(lens)
    owner = torch.repeat_interleave(counts, output_size=sum(lens))
    owner, counts = to_device(torch.cat([owner, counts]), tokens.device).split([sum(lens), len(lens)])  # one copy
    return Packed(tokens, owner, counts, tuple(grids))


@dataclass(frozen=True)
class TextCond:
    """Text conditioning of B samples."""

    text: Packed  # (T_text, d_text)
    pooled: Tensor  # (B, d_pooled)

    def select(self, rows: Sequence[int]) -> TextCond:
        """The conditioning of these samples, in this order; rows may repeat."""
        index = to_device(torch.tensor(rows), self.pooled.device)
        return TextCond(self.text.select(rows), self.pooled.index_select(0, index))


@dataclass(frozen=True)
class Route:
    """A range of blocks that only some image tokens pass; the others skip it (TREAD, arXiv 2501.04765)."""

    first: str  # first block of the range, as `features` name blocks
    last: str  # last block of the range
    kept: tuple[Tensor, ...]  # B x (n,) ascending indices of the tokens of each image that pass the range; on the host

    @property
    def lens(self) -> tuple[int, ...]:
        """Image tokens of each sample that pass the range."""
        return tuple(len(indices) for indices in self.kept)


@dataclass(frozen=True)
class StoredCaptions:
    """Stored encodings of distinct captions, on the host in their stored dtype."""

    captions: tuple[str, ...]
    tokens: Tensor  # (T, d_text), of all captions
    lens: tuple[int, ...]  # tokens of each caption
    pooled: Tensor  # (n, d_pooled)

    def share_memory_(self) -> None:
        self.tokens.share_memory_(), self.pooled.share_memory_()

    def pin_memory(self) -> StoredCaptions:
        return replace(self, tokens=self.tokens.pin_memory(), pooled=self.pooled.pin_memory())

    def to(self, device: torch.device) -> TextCond:
        """The conditioning of the captions on `device`, float32."""
        tokens, pooled = (to_device(values, device).float() for values in (self.tokens, self.pooled))
        return TextCond(packed(tokens, [(1, length) for length in self.lens]), pooled)


@dataclass(frozen=True)
class Batch:
    """B images of any shapes with captions, and their positions in the step's global batch.

    Loader workers pass all images as views of one tensor (`flat`): each tensor that is sent costs a file descriptor,
    and each copy to a device a call.
    """

    images: tuple[Tensor, ...]  # B x (3, H, W), uint8 or float32 in [-1, 1]; or cached latents
    prompts: tuple[str, ...]
    positions: tuple[int, ...]  # index in the global batch, part of the key of a sample's random numbers
    names: tuple[str, ...]  # file of each sample, for error messages
    replaced: tuple[str, ...] = ()  # problems of bad samples that were replaced by others
    text: StoredCaptions | None = None  # of the captions of this batch, if the text encoder reads a cache
    features: tuple[Tensor, ...] = ()  # B x (rows, columns, width), cached image features, in the dtype of the images
    flat: Tensor | None = None  # (n,), of which images and features are views

    def flattened(self) -> Batch:
        """The batch with `flat`."""
        if self.flat is not None or not self.images:
            return self
        return self.with_flat(torch.cat([tensor.flatten() for tensor in (*self.images, *self.features)]))

    def with_flat(self, flat: Tensor) -> Batch:
        """The same layout with other values (n,)."""
        views = split_views(flat, [tensor.shape for tensor in (*self.images, *self.features)])
        num_images = len(self.images)
        return replace(self, images=views[:num_images], features=views[num_images:], flat=flat)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [*self.images, *self.features, *((self.text.tokens, self.text.pooled) if self.text else ())]
        return sum(tensor.nbytes for tensor in tensors)

    def share_memory_(self) -> None:
        """Move the tensors to memory that other processes can map. Raises RuntimeError if there is not enough."""
        if self.flat is not None:
            self.flat.share_memory_()
        if self.text is not None:
            self.text.share_memory_()

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which copies to an accelerator do not block."""
        batch = self.flattened()
        if batch.flat is not None:
            batch = batch.with_flat(batch.flat.pin_memory())
        return replace(batch, text=batch.text and batch.text.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """The batch on `device` by one copy, uint8 images converted to float32 in [-1, 1]; `text` stays on the host."""
        batch = self.flattened()
        return batch if batch.flat is None else batch.with_flat(signed(to_device(batch.flat, device)))

    def __reduce__(self) -> tuple:
        """Pickle all images and features as one tensor."""
        batch = self.flattened()
        shapes = [[tensor.shape for tensor in tensors] for tensors in (self.images, self.features)]
        fields = (self.prompts, self.positions, self.names, self.replaced, self.text)
        return Batch.restored, (batch.flat, *shapes, *fields)

    @classmethod
    def restored(
        cls, flat: Tensor | None, shapes: Sequence[torch.Size], feature_shapes: Sequence[torch.Size], *fields: tuple
    ) -> Batch:
        """The inverse of `__reduce__`."""
        if flat is None:
            return cls((), *fields)
        views = split_views(flat, [*shapes, *feature_shapes])
        return cls(views[: len(shapes)], *fields, views[len(shapes) :], flat)


def split_views(flat: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
    """Views of consecutive parts of a tensor (n,), of these shapes."""
    parts = flat.split([shape.numel() for shape in shapes])
    return tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))


def signed(image: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]; other dtypes unchanged."""
    return image.float() / 127.5 - 1 if image.dtype == torch.uint8 else image


@dataclass(frozen=True)
class FiniteCheck:
    """The output of a part, summed per sample and still on the device: are all values finite?"""

    sums: Tensor  # (B,)
    names: tuple[str, ...]  # of the samples
    part: str
    remedy: str


def raise_if_not_finite(checks: Sequence[FiniteCheck]) -> None:
    """Raise UserError naming the first sample with infinite or NaN values. Waits for the device."""
    for check in checks:
        if check.sums.is_meta or check.sums.isfinite().all():
            continue
        name = check.names[check.sums.isfinite().tolist().index(False)]
        raise UserError(f"{name}: {check.part} returns infinite or NaN values; {check.remedy}")


@dataclass(frozen=True)
class Loss:
    """One loss per sample, and metrics to log: each has a value per sample, or per row of `eval_rows`."""

    per_sample: Tensor  # (B,)
    metrics: dict[str, Tensor]  # name -> (B,) or (J,), detached
    t: Tensor  # (B,), times drawn for this loss
    s: Tensor  # (B,), secondary times
    eval_rows: tuple[int, ...] = ()  # J rows that were self-evaluated
    num_tokens: int = 0  # image tokens of the samples
    checks: tuple[FiniteCheck, ...] = ()  # of the encoders; not read yet, because reading waits for the device
