"""Decode image files to RGB, resize and crop them to a shape, convert them to tensors.

EXIF rotation is applied, animations yield their first frame, transparency is blended onto white, and 16-bit greyscale
is scaled to 8 bits.
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
# only raster image formats; excludes EPS, which runs an interpreter
FORMATS = {"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP"}
FORMATS = sorted(FORMATS & set(Image.OPEN))  # AVIF support is optional in Pillow
Image.MAX_IMAGE_PIXELS = None  # replaced by `max_pixels`
MAX_PIXELS = 178_956_970  # 512 MB as RGB
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width


def read(file: Path | BinaryIO, name: str, max_pixels: int = MAX_PIXELS, enough: int | None = None) -> Image.Image:
    """Decode an image to RGB.

    Args:
        name: of the image, in error messages.
        max_pixels: larger images are rejected before decoding.
        enough: allows decoding a JPEG at 1/2, 1/4 or 1/8 scale while its shorter side keeps at least this many pixels.

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
    """(height, width) in pixels after EXIF rotation, read from the header.

    Raises:
        BadSample: as `read`.
    """
    with naming(name), Image.open(regular(file), formats=FORMATS) as image:
        limit(image, name, max_pixels)
        # check image.info first: getexif() would decode a complete PNG to look for EXIF data behind the pixels
        sideways = "exif" in image.info and image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
        return (image.width, image.height) if sideways else (image.height, image.width)


def fit(image: Image.Image, shape: tuple[int, int]) -> Tensor:
    """Resize to cover `shape` (height, width) and center-crop -> (3, height, width) uint8."""
    image = ImageOps.fit(image, shape[::-1], method=Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def whole(file: Path | BinaryIO) -> Image.Image:
    """Open an image. Verifies PNG checksums first, because the decoder silently fills corrupt data with grey."""
    image = Image.open(regular(file), formats=FORMATS)
    if image.format != "PNG":
        return image
    image.verify()  # invalidates this object and closes a file that it opened
    if not isinstance(file, Path):
        file.seek(0)
    return Image.open(file, formats=FORMATS)


def regular(file: Path | BinaryIO) -> Path | BinaryIO:
    """Reject paths that are not regular files; opening a pipe would block forever."""
    if isinstance(file, Path) and not file.is_file():
        raise FileNotFoundError
    return file


def limit(image: Image.Image, name: str, max_pixels: int) -> None:
    """Raise `BadSample`, kind `too large`, above `max_pixels`."""
    if image.width * image.height > max_pixels:
        raise BadSample(
            "too large",
            f"{name}: {image.width} x {image.height} pixels are more than {max_pixels}; shrink the image, remove it, "
            "or raise data.params.max_pixels",
        )


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Turn any exception of a decoder into a `BadSample` with the name of the image."""
    try:
        yield
    except BadSample:
        raise
    except FileNotFoundError as error:
        raise BadSample("missing", f"{name}: no such image; correct the line or data.params.base_dir") from error
    except Exception as error:  # decoders of damaged files raise anything from KeyError to MemoryError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"not one of {', '.join(FORMATS)}"
        kind = "truncated" if "truncated" in reason.lower() else "undecodable"
        message = f"{name}: cannot be decoded ({reason}); replace the image or remove the line"
        raise BadSample(kind, message) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB, with transparency on white."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I"):  # 16 bits, which `convert` would clip instead of scaling
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("32-bit floating point pixels have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
