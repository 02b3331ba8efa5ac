"""A text encoder that remembers the captions it has encoded, so that repeated captions are encoded once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from selfe.errors import UserError
from selfe.protocols import ShardLoader, TextEncoder
from selfe.types import TextCond, check_range, packed


class RememberedText:
    """Keeps the embeddings of recently used captions in CPU memory; the null prompt is never evicted.

    For sampling, and for training on so few captions that all embeddings fit into memory.
    """

    def __init__(self, encoder: TextEncoder, max_tokens: int = 65536):
        """
        Args:
            encoder: the text encoder whose embeddings are kept.
            max_tokens: tokens that are kept; 65536 tokens of T5-XXL take 1 GiB.
        """
        check_range("max_tokens", max_tokens, 1, 10**9)
        self.encoder, self.max_tokens = encoder, max_tokens
        self.text_dim, self.pooled_dim = encoder.text_dim, encoder.pooled_dim
        self.codes: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()  # caption -> (n, text_dim), (pooled_dim,)
        self.num_tokens = 0

    def output_settings(self) -> dict[str, Any]:
        return self.encoder.output_settings()

    def load(self, device: torch.device, shard: ShardLoader | None = None) -> None:
        """Raises UserError for a sharded encoder: ranks remember different captions, so their calls would differ."""
        if shard is not None:
            raise UserError("trainer.shard_text_encoder: cannot be used with RememberedText; set it to false")
        self.encoder.load(device)
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
        """Evict least recently used captions, except `needed`, until at most `max_tokens` tokens are kept."""
        for caption in list(self.codes):
            if self.num_tokens <= self.max_tokens:
                break
            if caption not in needed:
                self.num_tokens -= len(self.codes.pop(caption)[0])
