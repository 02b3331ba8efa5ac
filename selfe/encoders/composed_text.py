"""Two text encoders as one: the tokens of the first, the pooled vector of the second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from selfe.protocols import ShardLoader, TextEncoder
from selfe.types import TextCond


class ComposedText:
    """Text tokens from one encoder and the pooled vector from another, such as Qwen3 and CLIP."""

    def __init__(self, tokens: TextEncoder, pooled: TextEncoder | None = None):
        """
        Args:
            tokens: the encoder of the text tokens.
            pooled: the encoder of the pooled vector; by default that of the tokens.
        """
        self.tokens, self.pooled = tokens, pooled or tokens
        self.text_dim, self.pooled_dim = self.tokens.text_dim, self.pooled.pooled_dim

    @property
    def encoders(self) -> dict[str, TextEncoder]:
        """The distinct encoders, by their keys."""
        return {"tokens": self.tokens} if self.pooled is self.tokens else {"tokens": self.tokens, "pooled": self.pooled}

    def output_settings(self) -> dict[str, Any]:
        return {
            name: {
                "module": f"{type(encoder).__module__}.{type(encoder).__qualname__}",
                "params": encoder.output_settings(),
            }
            for name, encoder in self.encoders.items()
        }

    def load(self, device: torch.device, shard: ShardLoader | None = None) -> None:
        self.device = device
        for encoder in self.encoders.values():
            encoder.load(device, shard)

    def __call__(self, captions: Sequence[str]) -> TextCond:
        """Captions -> text (T, text_dim) and pooled (B, pooled_dim), float32."""
        cond = self.tokens(captions)
        if self.pooled is self.tokens:
            return cond
        return TextCond(cond.text, self.pooled(captions).pooled)
