"""Tensors to pictures that people look at."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor


def to_image(picture: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> RGB image."""
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def grid(rows: Sequence[Sequence[Image.Image]], gap: int = 2) -> Image.Image:
    """Rows of pictures on one white sheet; cells are as large as the largest picture."""
    width = max(image.width for row in rows for image in row) + gap
    height = max(image.height for row in rows for image in row) + gap
    sheet = Image.new("RGB", (width * max(map(len, rows)) - gap, height * len(rows) - gap), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * width, y * height))
    return sheet
