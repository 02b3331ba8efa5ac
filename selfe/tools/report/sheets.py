"""Sample sheets of a run for the page: where each image is in a sheet, and sheets as data URLs."""

from __future__ import annotations

import base64
import io
import json
from functools import lru_cache
from pathlib import Path

from PIL import Image

from selfe.errors import UserError
from selfe.io import image_encode

FOLDERS = {"ema": "samples", "live": "samples_live"}  # weights -> folder of their sheets
GAP = 2  # pixels between the images of an embedded sheet
LOSSLESS = 64  # images of up to this side are embedded without loss
LARGEST = 256  # larger images are reduced to this side in a page
WEBP_SIDE = 16383  # the format allows no larger one


def files(run: Path, weights: str) -> dict[int, tuple[Path, int]]:
    """The sheets of a run by number of training steps, in order: path and time of modification in nanoseconds."""
    paths = sorted((run / FOLDERS[weights]).glob("step_*.png"))
    return {int(path.stem[5:]): (path, path.stat().st_mtime_ns) for path in paths}


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of the indices below `count`, evenly spaced, with the first and the last."""
    if count <= most:
        return list(range(count))
    if most == 1:
        return [count - 1]
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def layout(sheet: Image.Image) -> dict:
    """`prompts` (rows), `num_steps` (columns) and `cell` of a sheet, as `image_encode.sample_sheet` records them.

    Without a record, no prompts and no cell. Raises ValueError for an invalid record.
    """
    if "selfe" not in sheet.info:
        return {"prompts": [], "num_steps": [], "cell": None}
    record, names = json.loads(sheet.info["selfe"]), ("prompts", "num_steps", "cell")
    if not isinstance(record, dict) or any(name not in record for name in names) or len(record["cell"]) != 6:
        raise ValueError("its record of prompts and positions is not valid")
    return {name: record[name] for name in names}


@lru_cache(maxsize=4096)
def layout_of_file(path: Path, modified: int) -> dict | None:
    """`layout` of a file, None while it is being written. `modified` is its time of modification."""
    try:
        with Image.open(path) as sheet:
            return layout(sheet)
    except (OSError, SyntaxError, ValueError):
        return None


def embed(path: Path) -> dict:
    """A sheet as a data URL in `source`, without labels and margins; the other keys are those of `layout`.

    Small images keep their pixels. Larger ones are reduced to `LARGEST` and compressed with loss.

    Raises:
        UserError: the file is not a complete sheet.
    """
    try:
        with Image.open(path) as file:
            sheet = file.convert("RGB")
        described = layout(sheet)
        rows = image_encode.sheet_images(sheet) if described["cell"] else []
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: not a complete image ({error}); remove the file") from error
    if not rows:
        return described | {"source": data_url(sheet, lossless=max(sheet.size) <= 4 * LARGEST)}

    width, height = rows[0][0].size
    scale = min(1.0, LARGEST / max(width, height))
    if scale < 1:
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
        rows = [[image.resize((width, height), Image.Resampling.LANCZOS) for image in row] for row in rows]

    source = data_url(image_encode.grid(rows, GAP), lossless=max(width, height) <= LOSSLESS)
    return described | {"source": source, "cell": [0, 0, width, height, width + GAP, height + GAP]}


def data_url(image: Image.Image, lossless: bool) -> str:
    """An image as PNG, or with loss as WebP."""
    buffer = io.BytesIO()
    if lossless or max(image.size) > WEBP_SIDE:
        kind = "png"
        image.save(buffer, "PNG", optimize=True)
    else:
        kind = "webp"
        image.save(buffer, "WEBP", quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
