"""Token ids of captions as few padded batches on the device: shared by the text encoders.

Captions of one padded length share a call of the network, and all ids go to the device in one copy. The padded length
depends on the caption alone, so that its embedding does not depend on the rest of the batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from selfe.device import to_device
from selfe.types import TextCond, packed

Code = tuple[Tensor, Tensor]  # of a caption: tokens (n, text_dim), pooled (pooled_dim,)

PAD_MULTIPLE = 32  # padded lengths are multiples of this many tokens


def group_by_length(lengths: Sequence[int], limit: int | None = None, same: bool = False) -> dict[int, list[int]]:
    """The indices of captions of these numbers of tokens, by padded length.

    Args:
        limit: largest padded length, None for no limit.
        same: pad all captions to the longest. For a sharded network: every rank must make the same number of calls.
    """
    padded_lengths = [-(-length // PAD_MULTIPLE) * PAD_MULTIPLE for length in lengths]
    if limit is not None:
        padded_lengths = [min(length, limit) for length in padded_lengths]
    if same:
        padded_lengths = [max(padded_lengths)] * len(padded_lengths)

    groups = defaultdict(list)
    for index, length in enumerate(padded_lengths):
        groups[length].append(index)
    return dict(groups)


def padded(rows: Sequence[list[int]], length: int, fill: int = 0) -> Tensor:
    """(B, 1 + length): the number of token ids of each row, the ids, and `fill`."""
    return torch.tensor([[len(row), *row, *[fill] * (length - len(row))] for row in rows])


def copy_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Integer tensors of the host on the device, by one copy."""
    flat = to_device(torch.cat([tensor.flatten() for tensor in tensors]), device)
    pieces = flat.split([tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]


def encode(
    captions: Sequence[str], encode_each: Callable[[Sequence[str]], list[Code]], empty: Code, sharded: bool
) -> TextCond:
    """Encode captions with a network, except for the empty ones, whose code is `empty`."""
    others = [caption for caption in captions if caption]
    if sharded and not others:
        others = [""]  # every rank must take part in the collectives
    encoded = iter(encode_each(others) if others else ())
    codes = [next(encoded) if caption else empty for caption in captions]

    texts, pooled = zip(*codes, strict=True)
    return TextCond(packed(torch.cat(texts), [(1, len(text)) for text in texts]), torch.stack(pooled))
