"""Inception features, for FID and KID that are comparable with published ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfe.device import to_device
from selfe.encoders.hf_folder import sha256
from selfe.errors import UserError
from selfe.evaluation.hf_extractor import resized

SIDE = 299  # pixels
DOWNLOAD = "nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"


class Inception:
    """Inception-v3 of 2015 as the TorchScript file `inception-2015-12-05.pt` of StyleGAN2-ADA, with 2048 features.

    Images are resized to 299 x 299 as in clean-fid, whose default (mode "clean") this is.
    """

    has_texts = False

    def __init__(self, path: Path):
        """
        Args:
            path: the file `inception-2015-12-05.pt`.
        """
        if not path.is_file():
            raise UserError(f"{path}: no such file; download it from https://{DOWNLOAD}")
        self.path = path

    def record(self) -> dict[str, Any]:
        """See `Extractor`."""
        return {
            "model": "inception-2015-12-05",
            "weights": sha256(self.path),
            "resize": f"{SIDE} x {SIDE}, antialiased bicubic, no crop",
        }

    def load(self, device: torch.device) -> None:
        """Raises UserError if the file is not that of the network."""
        try:
            self.layers = torch.jit.load(self.path, map_location=device).eval().layers
        except (RuntimeError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{self.path}: not the TorchScript file of Inception ({reason}); see {DOWNLOAD}") from error
        self.device = device

    def __call__(self, images: Sequence[Tensor], captions: Sequence[str]) -> dict[str, Tensor]:
        """See `Extractor`; captions do not matter."""
        pixels = torch.cat([resized(to_device(image, self.device)[None], SIDE) for image in images])
        values = (pixels + 1) * 127.5
        return {"features": self.layers((values - 128) / 128).flatten(1)}
