"""Convert images from their embedded ICC profile to sRGB (relative colorimetric)."""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

NONE, SRGB, UNREADABLE = "none", "sRGB", "unreadable"  # names of profiles that change no pixel
TOLERANCE = 2  # levels of 255; profiles that are meant to be sRGB differ from each other by rounding
PROFILE = ImageCms.createProfile("sRGB")
MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # colour space of a profile -> Pillow's mode


class Conversion(NamedTuple):
    """How to convert the colours of a profile: `transform` takes images of `mode` to RGB, None leaves them alone."""

    name: str
    mode: str = ""
    transform: ImageCms.ImageCmsTransform | None = None


def to_srgb(image: Image.Image, profile: object) -> tuple[Image.Image, str]:
    """Convert an RGB, L or CMYK image without transparency to RGB.

    Args:
        profile: the bytes of its profile, empty if it has none. Of damaged profiles, Pillow gives None or a number.

    Returns:
        The image and the name of the profile: its description, or one of `NONE`, `SRGB` and `UNREADABLE`. A profile
        that is damaged, or not one of this kind of image, is `UNREADABLE`, and the image counts as sRGB.
    """
    if profile == b"":
        return as_rgb(image), NONE
    if not isinstance(profile, bytes):
        return as_rgb(image), UNREADABLE

    name, mode, transform = conversion(profile)
    if transform is None:
        return as_rgb(image), name
    if image.mode == "L" and mode == "RGB":  # a grey image saved with the profile of a colour space
        image = image.convert("RGB")
    if image.mode != mode:
        return as_rgb(image), UNREADABLE
    return ImageCms.applyTransform(image, transform), name


def as_rgb(image: Image.Image) -> Image.Image:
    """The image in mode RGB, not copied if it is."""
    return image if image.mode == "RGB" else image.convert("RGB")


@lru_cache(maxsize=64)  # a data set has few distinct profiles
def conversion(profile: bytes) -> Conversion:
    """The conversion of a profile to sRGB; none for profiles that change no colour by more than `TOLERANCE` levels."""
    try:
        opened = ImageCms.ImageCmsProfile(BytesIO(profile))
        mode = MODES[opened.profile.xcolor_space.strip()]
        transform = ImageCms.buildTransform(
            opened, PROFILE, mode, "RGB", renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC
        )
        description = opened.profile.profile_description or ""
    except (ImageCms.PyCMSError, OSError, KeyError, UnicodeError):
        return Conversion(UNREADABLE)

    # compare colours of all lightnesses and hues before and after
    if mode != "CMYK":
        colours = grid(mode)
        before = np.asarray(colours.convert("RGB")).astype(int)
        after = np.asarray(ImageCms.applyTransform(colours, transform)).astype(int)
        if np.abs(before - after).max() <= TOLERANCE:
            return Conversion(SRGB)

    words = "".join(character if character.isprintable() else " " for character in description).split()
    return Conversion(" ".join(words)[:60] or "unnamed", mode, transform)


def grid(mode: str) -> Image.Image:
    """Every level of grey, or 17 levels of each of red, green and blue."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.linspace(0, 255, 17).astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1)
    return Image.fromarray(colours.reshape(17 * 17, 17, 3))
