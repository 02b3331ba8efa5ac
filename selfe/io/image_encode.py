"""Encode tensors as images, write image files with their sampling settings as metadata, and plot heat maps."""

from __future__ import annotations

import io
import json
import math
import unicodedata
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
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
VISIBLE = 64  # pixels; smaller images of a sheet are enlarged
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


def sample_sheet(
    rows: Sequence[Sequence[Image.Image]], prompts: Sequence[str], num_steps: Sequence[int], title: str
) -> Image.Image:
    """Images on white: a row per prompt, a column per number of steps, both labelled.

    A pixel of an image is a square of `zoom` x `zoom` pixels of the sheet; `zoom` is 1 for images of 64 pixels or more.
    The positions of the images are in `info["selfe"]`, which `save_sheet` stores in the file: `prompts`, `num_steps`,
    `title`, `zoom`, and `cell`: left and top of the first image, width and height of an image, and the horizontal and
    vertical distance from one image to the next, in pixels of the sheet.
    """
    width = max(image.width for row in rows for image in row)
    height = max(image.height for row in rows for image in row)
    zoom = math.ceil(VISIBLE / max(width, height))
    width, height = zoom * width, zoom * height

    # the font grows with the images; columns and rows are at least as large as their labels
    font = ImageFont.load_default(size=min(max(height / 14, 11), 28))
    line = math.ceil(font.size * 1.3)
    heads = ["1 step" if count == 1 else f"{count} steps" for count in num_steps]
    across = max(width, *(math.ceil(font.getlength(head)) for head in heads)) + line // 3
    down = max(height, line) + line // 3
    margin = math.ceil(max(font.size * 12, min(width, font.size * 18)))  # width of the prompts
    left, top = margin + line, 2 * line + line // 2

    size = max(left + across * len(heads), math.ceil(font.getlength(title)) + line), top + down * len(rows) + line // 3
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((line // 2, line // 3), title, fill="black", font=font)
    for x, head in enumerate(heads):
        draw.text((left + x * across, line + line // 3), head, fill="dimgray", font=font)

    for y, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        label = wrap(prompt, font, margin, max_lines=max(height // line, 1))
        draw.multiline_text((line // 2, top + y * down), label, fill="black", font=font, spacing=line * 0.15)
        for x, image in enumerate(row):
            sheet.paste(ImageOps.scale(image, zoom, Image.Resampling.NEAREST), (left + x * across, top + y * down))

    cell = [left, top, width, height, across, down]
    layout = {"title": title, "prompts": list(prompts), "num_steps": list(num_steps), "zoom": zoom, "cell": cell}
    sheet.info["selfe"] = json.dumps(layout, ensure_ascii=False)
    return sheet


def sheet_images(sheet: Image.Image) -> list[list[Image.Image]]:
    """The images of a sheet of `sample_sheet`, by row and column.

    Raises:
        ValueError: the sheet has no valid layout in its metadata.
    """
    try:
        layout = json.loads(sheet.info["selfe"])
        zoom, (left, top, width, height, across, down) = layout["zoom"], layout["cell"]
        rows, columns = len(layout["prompts"]), len(layout["num_steps"])
    except (KeyError, TypeError) as error:
        raise ValueError("not a sheet of samples: no layout in its metadata") from error

    def cell(y: int, x: int) -> Image.Image:
        corner = left + x * across, top + y * down
        image = sheet.crop((*corner, corner[0] + width, corner[1] + height))
        return image.resize((width // zoom, height // zoom), Image.Resampling.NEAREST)

    return [[cell(y, x) for x in range(columns)] for y in range(rows)]


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float, max_lines: int) -> str:
    """Text in at most `max_lines` lines of `width` pixels; what does not fit is replaced by an ellipsis.

    Accents are left out: Pillow's font has the characters of ASCII only.
    """
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)

    if len(lines) > max_lines:
        lines[max_lines - 1] += "..."
    for i, line in enumerate(lines[:max_lines]):
        while font.getlength(lines[i]) > width and len(line) > 1:
            line = line.removesuffix("...")[:-1]
            lines[i] = line + "..."
    return "\n".join(lines[:max_lines])


def save_sheet(sheet: Image.Image, folder: Path, done: int) -> Path:
    """Save a sheet as `step_N.png` after `done` training steps; returns the path."""
    path = folder / f"step_{done:08d}.png"
    path.parent.mkdir(exist_ok=True)
    chunks = PngImagePlugin.PngInfo()
    if layout := sheet.info.get("selfe"):
        chunks.add_itxt("selfe", layout)
    sheet.save(path, pnginfo=chunks)
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
    """Labelled heat maps of tables [t, s], `columns` to a row; t increases to the right, s upwards."""
    width, height = 284, 226  # of a panel
    rows = math.ceil(len(tables) / columns)
    sheet = Image.new("RGB", (width * min(columns, len(tables)), height * rows), "white")
    for i, (name, table) in enumerate(tables.items()):
        sheet.paste(heat_map(name, table, (width, height)), (i % columns * width, i // columns * height))
    return sheet


def heat_map(name: str, table: Tensor, size: tuple[int, int]) -> Image.Image:
    """A heat map with its name, the axes t and s from 0 to 1, and a colour bar from minimum to maximum."""
    font = ImageFont.load_default(size=12)
    panel = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(panel)
    left, top, side = 32, 26, 160
    bottom = top + side
    draw.text((left, 6), wrap(name, font, size[0] - left - 4, max_lines=1), fill="black", font=font)

    panel.paste(heat(table.T, side), (left, top))
    draw.rectangle((left - 1, top - 1, left + side, bottom), outline="gray")
    for tick in (0, 0.5, 1):
        x, y = left + tick * side, bottom - tick * side
        draw.line((x, bottom, x, bottom + 4), fill="gray")
        draw.line((left - 5, y, left - 1, y), fill="gray")
        draw.text((x, bottom + 5), f"{tick:g}", fill="black", font=font, anchor="ma")
        draw.text((left - 7, y), f"{tick:g}", fill="black", font=font, anchor="rm")
    draw.text((left + side / 4, bottom + 5), "t", fill="black", font=font, anchor="ma")
    draw.text((left - 7, top + side * 3 / 4), "s", fill="black", font=font, anchor="rm")

    # colour bar
    known = table[~table.isnan()]
    bar = left + side + 12
    if not len(known):
        draw.text((bar, top), "no\nsamples", fill="black", font=font)
        return panel
    panel.paste(heat(torch.linspace(0, 1, side, dtype=torch.float64)[:, None], side).resize((10, side)), (bar, top))
    draw.rectangle((bar - 1, top - 1, bar + 10, bottom), outline="gray")
    draw.text((bar + 15, top), f"{known.max():.3g}", fill="black", font=font, anchor="lm")
    draw.text((bar + 15, bottom), f"{known.min():.3g}", fill="black", font=font, anchor="lm")
    return panel
