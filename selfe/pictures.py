"""Tensors to pictures that people look at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

# anchors of a scale that is dark for small and bright for large, and read the same in grey
COLOURS = torch.tensor(
    [[20, 12, 70], [60, 75, 140], [40, 140, 140], [110, 200, 95], [250, 230, 60]], dtype=torch.float64
)


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


def heat(table: Tensor, size: int = 160) -> Image.Image:
    """(rows, columns), its first row at the bottom, as colours from its smallest to its largest value; NaN is white."""
    known = table[~table.isnan()]
    low, high = (known.min(), known.max()) if len(known) else (0.0, 1.0)
    place = (table - low) / max(float(high - low), 1e-30) * (len(COLOURS) - 1)
    place = place.nan_to_num(0).clamp(0, len(COLOURS) - 1)
    below = place.floor().long().clamp_max(len(COLOURS) - 2)
    colours = torch.lerp(COLOURS[below], COLOURS[below + 1], (place - below)[..., None])
    colours[table.isnan()] = 255
    return Image.fromarray(colours.flip(0).byte().numpy()).resize((size, size), Image.Resampling.NEAREST)


def heat_maps(tables: dict[str, Tensor], columns: int = 4) -> Image.Image:
    """A sheet of (t, s) tables [t, s], each under its name with its range; t grows to the right, s upwards."""
    panels = []
    for name, table in tables.items():
        known = table[~table.isnan()]
        extent = f"{known.min():.3g} .. {known.max():.3g}" if len(known) else "no samples"
        panel = Image.new("RGB", (176, 204), "white")
        panel.paste(heat(table.T), (8, 36))
        ImageDraw.Draw(panel).multiline_text((8, 4), f"{name}\n{extent}", fill="black")
        panels.append(panel)
    return grid([panels[i : i + columns] for i in range(0, len(panels), columns)])
