"""The judge of the emoji study as an extractor of `selfe evaluate`.

PYTHONPATH=scripts/studies .venv/bin/selfe evaluate JOB --settings scripts/studies/emoji/evaluate.yaml
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from emoji import judge
from emoji.judge import SIDE, STYLES
from torch import Tensor
from torch.nn import functional as F

from selfe.encoders.hf_folder import sha256
from selfe.errors import UserError

COPY = 0.15  # largest root mean square difference between an image and what counts as its copy, in [-1, 1]


class EmojiJudge:
    """Features (B, 160); the scores concept@1, concept@5, style, both and copies; embeddings of images and of emoji."""

    has_texts = True

    def __init__(self, data: Path | None = None):
        """
        Args:
            data: folder of the unpacked shards, for copies of training images; without it, they are not counted.
        """
        self.data = data

    def record(self) -> dict[str, Any]:
        """See `selfe.protocols.Extractor`."""
        record = {"model": "emoji judge", "weights": sha256(judge.WEIGHTS)}
        record |= {"resize": f"none, images are {SIDE} x {SIDE}"}
        if self.data is not None:
            record |= {"copies": COPY, "training images": [sha256(file) for file in judge.shards(self.data, "train")]}
        return record

    def load(self, device: torch.device) -> None:
        """See `selfe.protocols.Extractor`."""
        self.judge, self.device = judge.load().to(device), device
        self.concepts = {label: place for place, label in enumerate(judge.labels())}
        if self.data is not None:
            self.trained = judge.real_images(self.data, "train").pixels.to(device)

    def __call__(self, images: Sequence[Tensor], captions: Sequence[str]) -> dict[str, Tensor]:
        """Images (3, 32, 32) with captions "LABEL, STYLE". Raises UserError for other captions."""
        pixels = torch.stack(list(images)).to(self.device)
        concepts, styles = (values.to(self.device) for values in self.classes(captions))
        scores = judge.score(self.judge, pixels, concepts, styles)
        if self.data is not None:
            scores |= {"copies": judge.nearest(pixels, self.trained) < COPY}
        _, embeddings = self.judge.concept(pixels.clamp(-1, 1))
        return scores | {"aligned": embeddings}

    def texts(self, captions: Sequence[str]) -> Tensor:
        """The embeddings of the emoji that captions name; the style does not matter."""
        concepts, _ = self.classes(captions)
        return F.normalize(self.judge.concept.concepts, dim=1)[concepts.to(self.device)]

    def classes(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The emoji and the style (B,) that each caption names."""
        parsed = [judge.parse(caption) for caption in captions]
        for caption, (label, style) in zip(captions, parsed, strict=True):
            if label not in self.concepts or style not in STYLES:
                raise UserError(f"caption {caption!r}: the judge needs an emoji and a style, such as 'fox, twemoji'")
        return (
            torch.tensor([self.concepts[label] for label, _ in parsed]),
            torch.tensor([STYLES.index(style) for _, style in parsed]),
        )
