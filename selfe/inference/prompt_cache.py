"""A text encoder with an LRU cache, so that repeated captions are encoded once. For sampling."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from selfe.protocols import ShardLoader, TextEncoder
from selfe.types import TextCond, packed


class PromptCache:
    """Wraps a text encoder. Caches recently used captions in CPU memory; the null prompt is never evicted."""

    def __init__(self, encoder: TextEncoder, max_tokens: int = 65536):
        """
        Args:
            max_tokens: size of the cache; 65536 tokens of T5-XXL take 1 GiB.
        """
        self.encoder, self.max_tokens = encoder, max_tokens
        self.text_dim, self.pooled_dim = encoder.text_dim, encoder.pooled_dim
        self.codes: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()  # caption -> (n, text_dim), (pooled_dim,)
        self.num_tokens = 0

    def load(self, device: torch.device, shard: ShardLoader | None = None) -> None:
        self.encoder.load(device, shard)
        self.device = device

    def __call__(self, captions: Sequence[str]) -> TextCond:
        """Captions -> text (T, text_dim) and pooled (B, pooled_dim)."""
        if new := [caption for caption in dict.fromkeys(captions) if caption not in self.codes]:
            cond = self.encoder(new)
            for caption, text, pooled in zip(new, cond.text.split(), cond.pooled, strict=True):
                self.codes[caption] = text.cpu(), pooled.cpu()
                self.num_tokens += len(text)

        for caption in captions:
            self.codes.move_to_end(caption)

        texts, pooled = zip(*(self.codes[caption] for caption in captions), strict=True)
        self.forget(set(captions) | {""})
        text = packed(torch.cat(texts).to(self.device), [(1, len(t)) for t in texts])
        return TextCond(text, torch.stack(pooled).to(self.device))

    def forget(self, needed: set[str]) -> None:
        """Evict least recently used captions, except `needed`, until the cache holds at most `max_tokens`."""
        for caption in list(self.codes):
            if self.num_tokens <= self.max_tokens:
                break
            if caption not in needed:
                self.num_tokens -= len(self.codes.pop(caption)[0])
