"""A text encoder without training or files: each word is a fixed random vector, the same on every machine.

For captions with a small, unambiguous vocabulary. A token is the sum of a word vector and a position vector; the pooled
vector is the normalised sum of their products, so that "red cross on blue" and "blue cross on red" differ in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from selfe.protocols import ShardLoader
from selfe.rng import philox
from selfe.types import MOST_WIDTH, TextCond, check_range, packed


class Words:
    """Splits captions at whitespace; the empty caption is a single token, the word ''."""

    def __init__(self, dim: int = 64, max_words: int = 16):
        """
        Args:
            dim: width of the tokens and of the pooled vector.
            max_words: maximum number of tokens; longer captions are truncated.
        """
        check_range("dim", dim, 1, MOST_WIDTH)
        check_range("max_words", max_words, 1, 10**6)
        self.text_dim = self.pooled_dim = dim
        self.max_words = max_words

    def output_settings(self) -> dict[str, Any]:
        return {"dim": self.text_dim, "max_words": self.max_words}

    def load(self, device: torch.device, shard: ShardLoader | None = None) -> None:
        self.device = device  # no parameters to shard

    def __call__(self, captions: Sequence[str]) -> TextCond:
        """Captions -> text (T, dim) and pooled (B, dim), float32."""
        texts, pooled = zip(*(described(caption, self.text_dim, self.max_words) for caption in captions), strict=True)
        grids = [(1, len(text)) for text in texts]
        return TextCond(packed(torch.cat(texts).to(self.device), grids), torch.stack(pooled).to(self.device))


@lru_cache(maxsize=4096)
def described(caption: str, dim: int, max_words: int) -> tuple[Tensor, Tensor]:
    """Tokens (n, dim) and pooled vector (dim,) of a caption."""
    words = caption.split()[:max_words] or [""]
    word = torch.stack([vector("word", w, dim) for w in words])
    place = torch.stack([vector("place", i, dim) for i in range(len(words))])
    return word + place, (word * place).sum(dim=0) / len(words) ** 0.5


@lru_cache(maxsize=4096)
def vector(kind: str, name: str | int, dim: int) -> Tensor:
    """Standard normal vector (dim,), a function of the arguments only."""
    return torch.from_numpy(philox(kind, name).standard_normal(dim, dtype="float32"))
