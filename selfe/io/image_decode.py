"""Decode image files to RGB, resize and crop them to a shape, convert them to tensors.

Images are rotated as EXIF data (or, in AVIF files, the container) state, converted to sRGB from their ICC profile and
from 16 bits to 8; animations yield their first frame, TIFF files their largest page; transparency is blended onto
white. Files whose right pixels are not known are refused.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from selfe.errors import BadSample
from selfe.io import color_profiles, image_damage, image_headers
from selfe.io.image_headers import Header

Image.init()
# only raster image formats; excludes EPS, which runs an interpreter
RASTER = {"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP"}
FORMATS = sorted(RASTER & set(Image.OPEN))  # AVIF support is optional in Pillow
SUFFIXES = {suffix[1:] for suffix, kind in Image.registered_extensions().items() if kind in FORMATS} | {"avif"}
JPEGS = ("JPEG", "MPO")  # MPO: several JPEG images in one file, of which Pillow decodes the first
NO_SIGNATURE = "TGA"  # the format that is tried when no other accepts the first bytes of a file
Image.MAX_IMAGE_PIXELS = None  # replaced by `max_pixels`
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # Pillow logs some errors, without a name, before it raises them
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MB instead of 1 MB, also for ICC profiles
MAX_PIXELS = 178_956_970  # 512 MB as RGB
MAX_PAGES = 1000  # of a TIFF file; later ones are not looked at
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # from an image with this EXIF orientation to the upright image


class Decoded(NamedTuple):
    """An RGB image and the name of its ICC profile; see `color_profiles.to_srgb`."""

    image: Image.Image
    profile: str


def read(
    file: Path | BinaryIO,
    name: str,
    max_pixels: int = MAX_PIXELS,
    enough: int | None = None,
    convert_icc: bool = True,
) -> Image.Image:
    """Decode an image to RGB.

    Args:
        name: of the image, in error messages.
        max_pixels: larger images are rejected before decoding.
        enough: allows decoding a JPEG at 1/2, 1/4 or 1/8 scale while its shorter side keeps at least this many pixels.
        convert_icc: convert from the embedded ICC profile to sRGB; otherwise every image counts as sRGB.

    Raises:
        BadSample: kind `missing`, `too large`, `truncated` or `undecodable`.
    """
    return decode(file, name, max_pixels, enough, convert_icc).image


def decode(
    file: Path | BinaryIO,
    name: str,
    max_pixels: int = MAX_PIXELS,
    enough: int | None = None,
    convert_icc: bool = True,
) -> Decoded:
    """As `read`, with the name of the profile."""
    with naming(name), opened(file) as stream:
        image, header = open_image(stream)
        limit(image, name, max_pixels)

        # the decoder fills corrupt data with grey, so checksums are verified first, which uses up the object
        if image.format == "PNG":
            image.verify()
            image, _ = open_image(stream)
        if enough and image.format in JPEGS:
            shrink = max(min(image.size) // enough, 1)
            image.draft(None, (image.width // shrink, image.height // shrink))

        image.load()
        refuse_incomplete(image, stream)
        image, profile = to_rgb(image, header, stream, convert_icc)
        return Decoded(image.transpose(TURNS[header.orientation]) if header.orientation in TURNS else image, profile)


def size(file: Path | BinaryIO, name: str, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) in pixels of the image that `read` returns, from the header.

    Raises:
        BadSample: as `read`.
    """
    with naming(name), opened(file) as stream:
        image, header = open_image(stream)
        limit(image, name, max_pixels)
        return header.size(image)


def fit(image: Image.Image, shape: tuple[int, int]) -> Tensor:
    """Resize to cover `shape` (height, width) and center-crop -> (3, height, width) uint8."""
    image = ImageOps.fit(image, shape[::-1], method=Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# ---- opening ----


@contextmanager
def opened(file: Path | BinaryIO) -> Iterator[BinaryIO]:
    """A file object at its start. Pillow is never given a path: it reads some files differently when it has one.

    Paths that are not regular files are rejected, because opening a pipe would block forever.
    """
    if isinstance(file, Path):
        if not file.is_file():
            raise FileNotFoundError
        with file.open("rb") as stream:
            yield stream
    else:
        file.seek(0)
        yield file


def open_image(stream: BinaryIO) -> tuple[Image.Image, Header]:
    """Read the header of an image file.

    Raises:
        UnidentifiedImageError: no decoder accepts the file.
        Unsupported: the file would not be decoded to the right pixels.
    """
    stream.seek(0)
    start = stream.read(64)
    if not start:
        raise ValueError("the file is empty")

    kind = format_of(start)
    stream.seek(0)
    try:
        factory, _ = Image.OPEN[kind]  # unlike Image.open, it raises an error that names what is wrong
        image = factory(stream, "")
    except Exception as error:
        raise UnidentifiedImageError(cause(error, kind, start)) from error

    if image.format == "TIFF":
        select_largest_page(image)
        image.info.pop("xmp", None)  # Pillow turns TIFF files by EXIF, and without it by XMP, which does not count
    return image, image_headers.examine(image, stream)


def format_of(start: bytes) -> str:
    """The format whose decoder accepts the first bytes of a file."""
    for kind in FORMATS:
        _, accept = Image.OPEN[kind]
        answer = accept(start[:16]) if accept else False
        if isinstance(answer, str):  # the format is known, and this installation of Pillow cannot decode it
            raise UnidentifiedImageError(answer)
        if answer:
            return kind
    return NO_SIGNATURE


def cause(error: Exception, kind: str, start: bytes) -> str:
    """Why a file that starts with these bytes could not be opened."""
    if other := image_headers.not_an_image(start):
        return other
    if kind == NO_SIGNATURE:
        return f"not one of {', '.join(FORMATS)}"
    return f"{kind}: no tag {error}" if isinstance(error, KeyError) else f"{kind}: {error}"


def select_largest_page(image: Image.Image) -> None:
    """Move to the page of a TIFF file with the most pixels, the first of equals: others may be thumbnails."""
    areas, problems = [image_headers.tiff_area(image)], {}
    for page in range(1, MAX_PAGES):
        try:
            image.seek(page)
        except EOFError:
            break
        except (SyntaxError, ValueError, TypeError, KeyError, OSError) as error:  # a page that cannot be decoded
            problems[page] = error
        areas.append(image_headers.tiff_area(image))

    largest = areas.index(max(areas))
    if largest in problems:
        raise problems[largest]
    image.seek(largest)


def limit(image: Image.Image, name: str, max_pixels: int) -> None:
    """Raise `BadSample`, kind `too large`, above `max_pixels`."""
    if image.width * image.height > max_pixels:
        raise BadSample(
            "too large",
            f"{name}: {image.width} x {image.height} pixels are more than {max_pixels}; shrink the image, remove it, "
            "or raise data.params.max_pixels",
        )


def refuse_incomplete(image: Image.Image, stream: BinaryIO) -> None:
    """Raise an OSError for a decoded image whose pixels end early without an error of the decoder."""
    if image.format in JPEGS:
        ends_early = image_damage.jpeg_ends_early(image, stream)
    else:
        ends_early = image.format == "PNG" and image_damage.png_ends_early(image, stream)
    if ends_early:
        raise OSError("image file is truncated: its pixel data end early")


# ---- names of files in errors and warnings ----

current_name: ContextVar[str] = ContextVar("current_name", default="")  # of the image that is being read
show_warning = warnings.showwarning


def show_warning_with_name(message: Warning | str, *args: object, **kwargs: object) -> None:
    """Print a warning of a library with the name of the image that is being read."""
    if name := current_name.get():
        message = f"{name}: {message}"
    show_warning(message, *args, **kwargs)


warnings.showwarning = show_warning_with_name  # a context manager around each image would not be safe in threads


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Turn any exception of a decoder into a `BadSample` with the name of the image; name it in warnings too."""
    token = current_name.set(name)
    try:
        yield
    except BadSample:
        raise
    except FileNotFoundError as error:
        raise BadSample("missing", f"{name}: no such image; correct the line or data.params.base_dir") from error
    except Exception as error:  # decoders of damaged files raise anything from KeyError to MemoryError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        kind = "truncated" if "truncated" in reason.lower() else "undecodable"
        message = f"{name}: cannot be decoded ({reason}); replace the image or remove the line"
        raise BadSample(kind, message) from error
    finally:
        current_name.reset(token)


# ---- colours ----


def to_rgb(image: Image.Image, header: Header, stream: BinaryIO, convert_icc: bool) -> tuple[Image.Image, str]:
    """Convert any mode to sRGB, with transparency on white; returns the name of the profile too."""
    mask = transparent_colour(image, header, stream)
    image = to_levels(image, header)
    if mask:
        image.putalpha(mask)

    # separate colours from transparency
    alpha = None
    if image.has_transparency_data:
        image = image.convert("LA" if image.mode in ("L", "LA") else "RGBA")
        alpha = image.getchannel("A")
        image = image.convert("L" if image.mode == "LA" else "RGB")
    elif image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("L" if image.mode == "1" else "RGB")

    profile = header.profile or image.info.get("icc_profile", b"")
    image, name = color_profiles.to_srgb(image, profile if convert_icc else b"")

    if alpha:
        image.putalpha(alpha)
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    return image, name


def to_levels(image: Image.Image, header: Header) -> Image.Image:
    """Scale samples to 8-bit levels by their number of bits."""
    if image.mode.startswith("I"):
        shift, bits = header.scales[0]
        samples = np.asarray(image).astype(np.int64).clip(0, 65535) >> shift
        levels = (samples * 255 // (2**bits - 1)).clip(0, 255).astype(np.uint8)
        scaled = Image.fromarray(255 - levels if header.inverted else levels)
        scaled.info = dict(image.info)
        return scaled

    if header.scales:
        table = []
        for shift, bits in header.scales:
            table += [(sample >> shift) * 255 // (2**bits - 1) for sample in range(256)]
        return image.point(table)
    return image


def transparent_colour(image: Image.Image, header: Header, stream: BinaryIO) -> Image.Image | None:
    """The alpha channel of a PNG with one transparent colour, where Pillow would compare it with other samples."""
    if header.transparent is None:
        return None
    image.info.pop("transparency", None)

    if image.mode == "RGB":  # Pillow has dropped the lower byte of each sample; decode those as well
        stream.seek(0)
        lower = Image.OPEN["PNG"][0](stream, "")
        lower.tile = [lower.tile[0]._replace(args="RGB;16L")]
        samples = np.asarray(image).astype(np.int64) * 256 + np.asarray(lower)
    else:
        samples = np.asarray(image).astype(np.int64)[..., None]
        if header.depth < 8:  # Pillow has scaled them to 8-bit levels
            samples //= 255 // (2**header.depth - 1)

    opaque = (samples != np.array(header.transparent)).any(axis=-1)
    return Image.fromarray(opaque.astype(np.uint8) * 255)
