"""Picture files as the world has them: decoded to RGB, cut to a shape, as tensors.

Upright as their EXIF data say; the first frame of an animation; transparency on white; 16-bit grey scaled to 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from selfe.types import BadSample

Image.init()
# no format that runs a program (EPS) or that is not for pictures
FORMATS = {"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP"}
FORMATS = sorted(FORMATS & set(Image.OPEN))  # AVIF is an option of Pillow
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, replaced by `max_pixels`
MAX_PIXELS = 178_956_970  # 512 MB as RGB
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange height and width


def read(file: Path | BinaryIO, name: str, max_pixels: int = MAX_PIXELS, enough: int | None = None) -> Image.Image:
    """A whole picture as RGB.

    Args:
        name: how an error calls it.
        max_pixels: larger pictures are refused before they are decoded.
        enough: a JPEG may be decoded at 1/2, 1/4 or 1/8, its shorter side still at least so many pixels.

    Raises:
        BadSample: kind `missing`, `too large`, `truncated` or `undecodable`.
    """
    with naming(name), whole(file) as image:
        limit(image, name, max_pixels)
        if enough and image.format == "JPEG":
            shrink = max(min(image.size) // enough, 1)
            image.draft(None, (image.width // shrink, image.height // shrink))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)


def size(file: Path | BinaryIO, name: str, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of the upright picture, from the header alone.

    Raises:
        BadSample: as `read`.
    """
    with naming(name), Image.open(regular(file), formats=FORMATS) as image:
        limit(image, name, max_pixels)
        # Pillow would decode a whole PNG to look for EXIF data behind the pixels
        sideways = "exif" in image.info and image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
        return (image.width, image.height) if sideways else (image.height, image.width)


def fit(image: Image.Image, shape: tuple[int, int]) -> Tensor:
    """(3, height, width) uint8: scaled so that it just covers the shape, then cut at the centre."""
    image = ImageOps.fit(image, shape[::-1], method=Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def whole(file: Path | BinaryIO) -> Image.Image:
    """An opened picture. Of a PNG the checksums are compared first: its decoder makes grey of what does not unpack."""
    image = Image.open(regular(file), formats=FORMATS)
    if image.format != "PNG":
        return image
    image.verify()  # ends this object, and closes a file of its own
    if not isinstance(file, Path):
        file.seek(0)
    return Image.open(file, formats=FORMATS)


def regular(file: Path | BinaryIO) -> Path | BinaryIO:
    """Opening a pipe would wait for ever."""
    if isinstance(file, Path) and not file.is_file():
        raise FileNotFoundError
    return file


def limit(image: Image.Image, name: str, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise BadSample(
            "too large",
            f"{name}: {image.width} x {image.height} pixels are more than {max_pixels}; shrink the image, remove it, "
            "or raise data.params.max_pixels",
        )


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Whatever a picture file does to its decoder becomes a `BadSample`."""
    try:
        yield
    except BadSample:
        raise
    except FileNotFoundError as error:
        raise BadSample("missing", f"{name}: no such image; mend the line or data.params.base_dir") from error
    except Exception as error:  # decoders of damaged files raise anything from KeyError to MemoryError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"not one of {', '.join(FORMATS)}"
        kind = "truncated" if "truncated" in reason.lower() else "undecodable"
        message = f"{name}: cannot be decoded ({reason}); replace the image or remove the line"
        raise BadSample(kind, message) from error


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I"):  # 16 bits, which `convert` would clip
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("32-bit floating point pixels have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
