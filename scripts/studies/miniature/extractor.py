"""The classifier of the miniature as an extractor of `selfe evaluate`.

PYTHONPATH=scripts/studies .venv/bin/selfe evaluate JOB --settings scripts/studies/miniature/evaluate.yaml
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from miniature.score import COMBINATIONS, load_scorer, score
from torch import Tensor

from selfe.encoders.hf_folder import sha256
from selfe.errors import UserError


class ShapeJudge:
    """Features (B, 64), and the scores of `miniature.score`."""

    has_texts = False

    def __init__(self, weights: Path, side: int = 8):
        """
        Args:
            weights: file of the classifier, which scripts/studies/run.py miniature trains.
            side: height and width of the images, pixels.
        """
        self.weights, self.side = weights, side

    def record(self) -> dict[str, Any]:
        """See `selfe.protocols.Extractor`."""
        resize = f"none, images are {self.side} x {self.side}"
        return {"model": "classifier of shapes", "weights": sha256(self.weights), "resize": resize}

    def load(self, device: torch.device) -> None:
        """See `selfe.protocols.Extractor`."""
        self.scorer = load_scorer(self.weights, self.side)
        self.places = {combination.prompt: place for place, combination in enumerate(COMBINATIONS)}

    def __call__(self, images: Sequence[Tensor], captions: Sequence[str]) -> dict[str, Tensor]:
        """Images (3, side, side) with captions such as "red cross on blue". Raises UserError for other captions."""
        for caption in captions:
            if caption not in self.places:
                raise UserError(f"caption {caption!r}: the classifier needs a caption such as 'red cross on blue'")
        return score(self.scorer, torch.stack(list(images)).cpu(), [self.places[caption] for caption in captions])
