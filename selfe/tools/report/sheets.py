"""Sample grids of a run for the page: where each image is in a sheet, and sheets as data URLs."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from selfe.errors import UserError
from selfe.io import image_encode
from selfe.training.visuals import SampleGridConfig

FOLDERS = {"ema": "samples", "live": "samples_live"}  # weights -> folder of their sheets
GAP = 2  # pixels between the images of a sheet
LOSSLESS = 64  # images of up to this side are embedded without loss
LARGEST = 256  # larger images are reduced to this side in a page


class Layout:
    """Rows (prompts) and columns (numbers of steps) of the sheets of a run, from its recorded config."""

    def __init__(self, settings: dict):
        samples = settings.get("trainer", {}).get("samples") or {}
        self.prompts = [str(prompt) for prompt in samples.get("prompts") or SampleGridConfig.prompts]
        self.num_steps = list(samples.get("num_steps") or SampleGridConfig.num_steps)
        self.height, self.width = samples.get("size") or SampleGridConfig.size

    def fits(self, sheet: Image.Image) -> bool:
        """Whether a sheet has the size that follows from the config."""
        return sheet.size == self.sheet_size(self.width, self.height)

    def sheet_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of a sheet of images of this size."""
        columns, rows = len(self.num_steps), len(self.prompts)
        return columns * (width + GAP) - GAP, rows * (height + GAP) - GAP

    def shown_size(self) -> tuple[int, int]:
        """Width and height of an image in the page."""
        scale = min(1.0, LARGEST / max(self.width, self.height))
        return max(1, round(self.width * scale)), max(1, round(self.height * scale))

    def images(self, sheet: Image.Image) -> list[list[Image.Image]]:
        """The images of a sheet, by row and column."""
        return [
            [sheet.crop((x, y, x + self.width, y + self.height)) for x in range(0, sheet.width, self.width + GAP)]
            for y in range(0, sheet.height, self.height + GAP)
        ]


def paths(run: Path, weights: str) -> dict[int, Path]:
    """The sheets of a run by number of training steps, in order."""
    return {int(path.stem[5:]): path for path in sorted((run / FOLDERS[weights]).glob("step_*.png"))}


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of the indices below `count`, evenly spaced, with the first and the last."""
    if count <= most:
        return list(range(count))
    if most == 1:
        return [count - 1]
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def read(path: Path) -> Image.Image:
    """A sheet without its labels. Raises UserError if the file is not a complete image."""
    try:
        with Image.open(path) as sheet:
            if "selfe" not in sheet.info:
                return sheet.convert("RGB")
            return image_encode.grid(image_encode.sheet_images(sheet), GAP)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: not a complete image ({error}); remove the file") from error


def embed(path: Path, layout: Layout) -> dict:
    """A sheet as a data URL in `source`; in `size`, width and height of each of its images, None if they are unknown.

    Small images keep their pixels. Larger ones are reduced to `LARGEST` and compressed with loss.
    """
    sheet = read(path)
    if not layout.fits(sheet):
        return {"source": data_url(sheet, lossless=max(sheet.size) <= 4 * LARGEST), "size": None}

    size = layout.shown_size()
    if size != (layout.width, layout.height):
        rows = layout.images(sheet)
        sheet = image_encode.grid(
            [[image.resize(size, Image.Resampling.LANCZOS) for image in row] for row in rows], GAP
        )
    return {"source": data_url(sheet, lossless=max(size) <= LOSSLESS), "size": size}


def data_url(image: Image.Image, lossless: bool) -> str:
    """An image as PNG, or with loss as WebP if that is possible: its sides are limited to 16383 pixels."""
    buffer = io.BytesIO()
    if lossless or max(image.size) > 16383:
        kind = "png"
        image.save(buffer, "PNG", optimize=True)
    else:
        kind = "webp"
        image.save(buffer, "WEBP", quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
