"""A text encoder: each byte of a caption is a fixed random vector. No weights, no files."""

from collections.abc import Sequence
from typing import Any

import torch

from selfe.protocols import ShardLoader
from selfe.rng import philox
from selfe.types import TextCond, check_range, packed


class Characters:
    def __init__(self, dim: int = 64, max_bytes: int = 64):
        """
        Args:
            dim: width of the tokens and of the pooled vector.
            max_bytes: captions are truncated to this many bytes.
        """
        check_range("dim", dim, 1, 4096)
        check_range("max_bytes", max_bytes, 1, 4096)
        self.text_dim = self.pooled_dim = dim
        self.max_bytes = max_bytes

    def output_settings(self) -> dict[str, Any]:
        return {"dim": self.text_dim, "max_bytes": self.max_bytes}

    def load(self, device: torch.device, shard: ShardLoader | None = None) -> None:
        letters = philox("letters").standard_normal((257, self.text_dim), dtype="float32")
        places = philox("places").standard_normal((self.max_bytes, self.text_dim), dtype="float32")
        self.letters, self.places = (torch.from_numpy(table).to(device) for table in (letters, places))

    def __call__(self, captions: Sequence[str]) -> TextCond:
        """Captions -> text (T, dim) and pooled (B, dim). The null prompt "" is the single byte number 256."""
        codes = [list(caption.encode())[: self.max_bytes] or [256] for caption in captions]
        texts = [self.letters[code] + self.places[: len(code)] for code in codes]
        pooled = torch.stack([text.mean(dim=0) for text in texts])
        return TextCond(packed(torch.cat(texts), [(1, len(code)) for code in codes]), pooled)
