"""Tensors to pictures that people look at, and picture files that say how they were drawn."""

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
PARTIAL = ".partial"  # what a file is called until it is whole
IMAGE_DESCRIPTION, SOFTWARE, EXIF, USER_COMMENT = 0x010E, 0x0131, 0x8769, 0x9286
ANY_ENCODING = b"\0" * 8  # the comment's first 8 bytes name its encoding; this leaves it open, and it is UTF-8
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


def save_sheet(sheet: Image.Image, folder: Path, done: int) -> Path:
    """Write a sheet of a run after `done` steps as `step_N.png`; its path."""
    path = folder / f"step_{done:08d}.png"
    path.parent.mkdir(exist_ok=True)
    sheet.save(path)
    return path


def save(image: Image.Image, path: Path, kind: Format, record: dict) -> None:
    """Write a picture aside and rename it; `record`, with at least a prompt, goes into the file's own metadata.

    PNG holds it as text chunks `prompt` and `selfe` (JSON), JPEG and WebP as EXIF ImageDescription and UserComment.
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
    """A file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + PARTIAL)
    aside.write_bytes(data)
    aside.replace(path)


def read_record(path: Path) -> dict | None:
    """How a picture was drawn, from its own file; None if the file does not say."""
    try:
        with Image.open(path) as image:
            comment = image.getexif().get_ifd(EXIF).get(USER_COMMENT, b"")
            text = image.info.get("selfe") or comment.removeprefix(ANY_ENCODING).decode()
        return json.loads(text)
    except (OSError, ValueError, AttributeError, SyntaxError):
        return None


def save_npz(paths: Sequence[Path], output: Path) -> None:
    """Pictures of one size as FID evaluators take them: `arr_0`, uint8 (N, H, W, 3). Holds one picture at a time."""
    with Image.open(paths[0]) as first:
        shape = (len(paths), first.height, first.width, 3)
    aside = output.with_name(output.name + PARTIAL)
    with (
        zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive,
        archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member,
    ):
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(member, header)
        for path in paths:
            with Image.open(path) as image:
                member.write(np.asarray(image.convert("RGB")).tobytes())
    aside.replace(output)


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
