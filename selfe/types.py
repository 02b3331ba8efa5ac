"""The nouns every room shares: packed tokens, conditions, batches, losses, and what a swappable part must offer.

Sizes (`grids`, `lens`) are Python integers on the host: the data loader knows them, and the device never has to tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor, nn

from selfe.device import to_device

if TYPE_CHECKING:
    from selfe.draws import Draws


Precision = Literal["bf16", "fp32"]
Split = Literal["train", "val"]
DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


class UserError(ValueError):
    """A mistake the user can mend: one line that says what, where and how. Ends the program with exit code 2."""


class BadSample(UserError):
    """A picture or a line of a data set that cannot be used; `kind` is one of few words, to count by."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple:
        return BadSample, (self.kind, str(self))


def at_least(least: float, part: object, *names: str) -> None:
    """Raise ValueError if one of these numbers of a part is smaller."""
    for name in names:
        if getattr(part, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(part, name)}")


@dataclass(frozen=True)
class Packed:
    """B sequences of any lengths laid end to end, without padding.

    A picture is a grid of patches, row by row; a caption of n tokens is a 1 x n grid; a point is a 1 x 1 grid.
    """

    tokens: Tensor  # (T, d) with T = sum(lens)
    owner: Tensor  # (T,) int64, the sample a token belongs to
    grids: tuple[tuple[int, int], ...]  # B x (rows, columns)

    @property
    def lens(self) -> tuple[int, ...]:
        return tuple(rows * columns for rows, columns in self.grids)

    def __len__(self) -> int:
        return len(self.grids)

    def split(self) -> tuple[Tensor, ...]:
        """Views of the B sequences, each (len, d)."""
        return self.tokens.split(self.lens)

    def with_tokens(self, tokens: Tensor) -> Packed:
        """The same layout around other tokens (T, d)."""
        return replace(self, tokens=tokens)

    def select(self, rows: Sequence[int]) -> Packed:
        """The sequences of these samples, in this order; a row may be named more than once."""
        parts = self.split()
        return packed(torch.cat([parts[r] for r in rows]), [self.grids[r] for r in rows])


def packed(tokens: Tensor, grids: Sequence[tuple[int, int]]) -> Packed:
    """Tokens (T, d) that already lie end to end, as `Packed`."""
    lens = torch.tensor([rows * columns for rows, columns in grids])
    owner = to_device(torch.repeat_interleave(lens), tokens.device)
    assert owner.shape[0] == tokens.shape[0], f"grids hold {owner.shape[0]} tokens, got {tokens.shape[0]}"
    return Packed(tokens, owner, tuple(grids))


@dataclass(frozen=True)
class TextCond:
    """What the denoiser knows of B captions."""

    text: Packed  # (T_text, d_text)
    pooled: Tensor  # (B, d_pooled)

    def select(self, rows: Sequence[int]) -> TextCond:
        index = to_device(torch.tensor(rows), self.pooled.device)
        return TextCond(self.text.select(rows), self.pooled.index_select(0, index))


@dataclass(frozen=True)
class Batch:
    """B captioned pictures of any shapes, and where they stand in the step's global batch."""

    images: tuple[Tensor, ...]  # B x (3, H, W), uint8 or float32 in [-1, 1]; or what a cache holds for its autoencoder
    prompts: tuple[str, ...]
    positions: tuple[int, ...]  # place in the global batch, the key of all randomness of a sample
    names: tuple[str, ...]  # how an error message calls a sample: its file
    replaced: tuple[str, ...] = ()  # what was wrong with pictures that others stand in for

    def to(self, device: torch.device) -> Batch:
        """The same on the device, pictures in [-1, 1]."""
        return replace(self, images=tuple(signed(image.to(device, non_blocking=True)) for image in self.images))

    def __reduce__(self) -> tuple:
        """From a loader's worker, all pictures travel as one tensor, because each tensor costs a file descriptor."""
        flat = torch.cat([image.flatten() for image in self.images])
        rest = self.prompts, self.positions, self.names, self.replaced
        return Batch.arrived, (flat, [image.shape for image in self.images], *rest)

    @classmethod
    def arrived(cls, flat: Tensor, shapes: Sequence[torch.Size], *rest: tuple) -> Batch:
        parts = flat.split([shape.numel() for shape in shapes])
        return cls(tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True)), *rest)


def signed(image: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]; anything else as it is."""
    return image.float() / 127.5 - 1 if image.dtype == torch.uint8 else image


@dataclass(frozen=True)
class Loss:
    """One loss per sample, and numbers to log: each metric is a vector over all rows, or over the judged ones."""

    per_sample: Tensor  # (B,)
    metrics: dict[str, Tensor]  # name -> (B,) or (J,), detached
    t: Tensor  # (B,), the times that were drawn
    s: Tensor  # (B,)
    judged: tuple[int, ...] = ()  # J rows that have more metrics than the others


class Denoiser(Protocol):
    """V(x_t, t, s, c) of Eq. 6: a velocity `noise - x0` for every token."""

    def __call__(self, x_t: Packed, t: Tensor, s: Tensor, cond: TextCond) -> Tensor:
        """x_t (T, d), t and s (B,) -> v (T, d)."""
        ...


class Backbone(Denoiser, Protocol):
    """The trained `nn.Module`. Its `nn.ModuleList`s hold the blocks that are sharded and checkpointed one by one."""

    patch_dim: int
    text_dim: int
    pooled_dim: int

    def initial(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """The starting value of a parameter, float32 on the host: a function of (seed, name) alone."""
        ...


Read = Callable[[str, slice], Tensor]  # (name, rows) -> these rows of a stored tensor, on the host


class Place(Protocol):
    """Gives a module on the meta device its memory and the values that `read` finds under its parameters' names."""

    def __call__(self, module: nn.Module, blocks: Iterable[nn.Module], read: Read) -> None: ...


class TextEncoder(Protocol):
    """Frozen; every caption at its true length. Built without weights; `load` brings them to the device.

    On the meta device there are none: it then says what the encoder would cost, and reads no file.
    """

    text_dim: int
    pooled_dim: int

    def load(self, device: torch.device, shard: Place | None = None) -> None:
        """With `shard`, large parts are cut over ranks; every rank must then make the same calls."""
        ...

    def __call__(self, captions: Sequence[str]) -> TextCond: ...


class Autoencoder(Protocol):
    """Frozen; pictures to packed latent patches and back. Built without weights; `load` brings them to the device."""

    token_dim: int
    multiple: int  # height and width of a picture must be multiples of this many pixels

    def load(self, device: torch.device) -> None: ...

    def encode(self, images: Sequence[Tensor], draws: Draws) -> Packed:
        """B x (3, H, W) in [-1, 1] -> float32 tokens."""
        ...

    def moments(self, images: Sequence[Tensor]) -> tuple[Packed, Tensor | None]:
        """What `encode` draws from: mean tokens and standard deviations (T, d), None if it gives the means."""
        ...

    def decode(self, latents: Packed) -> list[Tensor]:
        """Tokens -> B x (3, H, W) in [-1, 1], float32."""
        ...

    def noise(self, sizes: Sequence[tuple[int, int]], draws: Draws) -> Packed:
        """Standard normal latents for pictures of B x (height, width) pixels: where sampling starts."""
        ...


class Data(Protocol):
    """Captioned pictures whose order is a pure function of the seed.

    `samples` are the numbers of a step's global batch, counted over the whole run: where the batch size changes, the
    order goes on where it was.
    """

    has_val: bool
    multiple: int  # height and width of every picture are multiples of this many pixels

    def costs(self, seed: int, step: int, samples: range, split: Split) -> tuple[int, ...]:
        """The work of each position of the step's global batch, in tokens, known before anything is decoded."""
        ...

    def batch(self, seed: int, step: int, samples: range, positions: Sequence[int], split: Split) -> Batch:
        """These positions of the step's global batch; the same samples for any split over ranks."""
        ...


class Objective(Protocol):
    """A training loss. Says which captions it needs, then judges the denoiser on clean latents."""

    batch_multiple: int  # micro-batches must be multiples of this, so that every rank makes the same calls

    def captions(self, prompts: Sequence[str], draws: Draws, step: int) -> dict[str, list[str]]: ...

    def __call__(
        self, net: Denoiser, ema: Denoiser, x0: Packed, conds: dict[str, TextCond], draws: Draws, step: int
    ) -> Loss: ...


Denoise = Callable[[Packed, Tensor, Tensor], Tensor]  # (x_t, t (B,), s (B,)) -> v (T, d), condition and guidance inside


class Sampler(Protocol):
    """Walks from noise to data."""

    def __call__(self, denoise: Denoise, noise: Packed, t: Tensor, s: Tensor, draws: Draws) -> Tensor:
        """noise (T, d), times t (N + 1, B) from 1 to 0, secondary times s (N, B) -> x0 (T, d) after N calls."""
        ...
