"""Encode tensors as images, write image files with their sampling settings as metadata, and plot heat maps."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, PngImagePlugin
from torch import Tensor

Format = Literal["png", "jpeg", "webp"]
SUFFIXES: dict[Format, str] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
OPTIONS: dict[Format, dict] = {
    "png": {},
    "jpeg": {"quality": 95, "subsampling": 0},
    "webp": {"quality": 95, "method": 4},
}
PARTIAL = ".partial"  # suffix of a file that is not complete yet
IMAGE_DESCRIPTION, SOFTWARE, EXIF, USER_COMMENT = 0x010E, 0x0131, 0x8769, 0x9286
ANY_ENCODING = b"\0" * 8  # EXIF character code of UserComment: undefined; the text is UTF-8
# colour map from dark (small) to bright (large), monotonic in luminance
COLOURS = torch.tensor(
    [[20, 12, 70], [60, 75, 140], [40, 140, 140], [110, 200, 95], [250, 230, 60]], dtype=torch.float64
)


def to_image(values: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> RGB image."""
    pixels = ((values.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def grid(rows: Sequence[Sequence[Image.Image]], gap: int = 2) -> Image.Image:
    """Arrange rows of images on white, `gap` pixels apart; every cell has the size of the largest image."""
    width = max(image.width for row in rows for image in row) + gap
    height = max(image.height for row in rows for image in row) + gap

    sheet = Image.new("RGB", (width * max(map(len, rows)) - gap, height * len(rows) - gap), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * width, y * height))

    return sheet


def save_sheet(sheet: Image.Image, folder: Path, done: int) -> Path:
    """Save an image grid as `step_N.png` after `done` training steps; returns the path."""
    path = folder / f"step_{done:08d}.png"
    path.parent.mkdir(exist_ok=True)
    sheet.save(path)
    return path


def save(image: Image.Image, path: Path, kind: Format, record: dict) -> None:
    """Write an image atomically, with `record` (which needs at least a prompt) as metadata.

    Stored as text chunks `prompt` and `selfe` (JSON) in PNG, as EXIF ImageDescription and UserComment in JPEG and WebP.
    """
    text = json.dumps(record, ensure_ascii=False)
    if kind == "png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt("prompt", record["prompt"])
        chunks.add_itxt("selfe", text)
        metadata = {"pnginfo": chunks}
    else:
        exif = Image.Exif()
        exif[IMAGE_DESCRIPTION], exif[SOFTWARE] = record["prompt"].encode(), "Self-E"
        exif.get_ifd(EXIF)[USER_COMMENT] = ANY_ENCODING + text.encode()
        metadata = {"exif": exif}

    buffer = io.BytesIO()
    image.save(buffer, kind, **OPTIONS[kind], **metadata)
    write(path, buffer.getvalue())


def write(path: Path, data: bytes) -> None:
    """Write a file atomically: under a temporary name, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    partial.write_bytes(data)
    partial.replace(path)


def read_record(path: Path) -> dict | None:
    """The sampling settings stored in an image file; None if there are none."""
    try:
        with Image.open(path) as image:
            comment = image.getexif().get_ifd(EXIF).get(USER_COMMENT, b"")
            text = image.info.get("selfe") or comment.removeprefix(ANY_ENCODING).decode()
        return json.loads(text)
    except (OSError, ValueError, AttributeError, SyntaxError):
        return None


def save_npz(paths: Sequence[Path], output: Path) -> None:
    """Write images of one size as npz for FID evaluators: `arr_0`, uint8 (N, H, W, 3). Streams image by image."""
    with Image.open(paths[0]) as first:
        shape = (len(paths), first.height, first.width, 3)

    # an npz file is a zip archive of npy files
    partial = output.with_name(output.name + PARTIAL)
    with (
        zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive,
        archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member,
    ):
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(member, header)

        for path in paths:
            with Image.open(path) as image:
                member.write(np.asarray(image.convert("RGB")).tobytes())

    partial.replace(output)


def heat(table: Tensor, size: int = 160) -> Image.Image:
    """Heat map of a table (rows, columns), first row at the bottom, scaled from minimum to maximum; NaN is white."""
    known = table[~table.isnan()]
    low, high = (known.min(), known.max()) if len(known) else (0.0, 1.0)

    # interpolate linearly in the colour map
    place = (table - low) / max(float(high - low), 1e-30) * (len(COLOURS) - 1)
    place = place.nan_to_num(0).clamp(0, len(COLOURS) - 1)
    below = place.floor().long().clamp_max(len(COLOURS) - 2)
    colours = torch.lerp(COLOURS[below], COLOURS[below + 1], (place - below)[..., None])

    colours[table.isnan()] = 255
    return Image.fromarray(colours.flip(0).byte().numpy()).resize((size, size), Image.Resampling.NEAREST)


def heat_maps(tables: dict[str, Tensor], columns: int = 4) -> Image.Image:
    """A grid of heat maps of tables [t, s], each with its name and value range; t increases to the right, s upwards."""
    panels = []
    for name, table in tables.items():
        known = table[~table.isnan()]
        extent = f"{known.min():.3g} .. {known.max():.3g}" if len(known) else "no samples"

        panel = Image.new("RGB", (176, 204), "white")
        panel.paste(heat(table.T), (8, 36))
        ImageDraw.Draw(panel).multiline_text((8, 4), f"{name}\n{extent}", fill="black")
        panels.append(panel)

    return grid([panels[i : i + columns] for i in range(0, len(panels), columns)])
