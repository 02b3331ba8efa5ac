"""What image headers state and Pillow leaves out: orientation, bits per sample, transparent colours, misread kinds.

`examine` is the only place that decides how a file is to be read. The scan of image sizes and the decoder both use it,
so that they accept the same files and agree on their sizes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import BinaryIO

from PIL import ExifTags, Image
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    COMPRESSION,
    IMAGELENGTH,
    IMAGEWIDTH,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    SAMPLEFORMAT,
)

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
CODESTREAM = b"\xff\x4f\xff\x51"  # start of a JPEG 2000 codestream
LAST_CHUNKS = (b"IDAT", b"IEND")  # end of a PNG header
GREY, PALETTE, GREY_ALPHA = 0, 3, 4  # colour types of PNG
RLE4 = 2  # compression of a BMP
SIGNED = 2  # sample format of a TIFF
YCBCR, WHITE_IS_ZERO, PLANES, UNCOMPRESSED = 6, 0, 2, 1  # values of TIFF tags
# first bytes of files that are often taken for images -> what they are
OTHER_FILES = {
    b"<": "an HTML or XML page",
    b"version https://git-lfs": "a git-lfs pointer; run git lfs pull",
    b"%PDF": "a PDF document",
    b"%!PS": "a PostScript program",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "a gzip file",
    b"8BPS": "a Photoshop document",
    b"\xff\x0a": "a JPEG XL image, which is not supported",
    b"\x00\x00\x00\x0cJXL ": "a JPEG XL image, which is not supported",
}
HEIC = {b"heic", b"heix", b"hevc", b"heim", b"heis"}  # brands of HEIF files that hold HEVC


class Unsupported(ValueError):
    """Pixels without a known range, or a kind of file that Pillow decodes wrongly."""


@dataclass(frozen=True)
class Header:
    """How to turn decoded samples into upright 8-bit RGB.

    Attributes:
        orientation: 1 to 8, as defined by EXIF.
        scales: (shift, bits) per channel: an 8-bit level is (sample >> shift) * 255 / (2^bits - 1). Empty: samples are
            8-bit levels.
        inverted: 0 is white.
        transparent: the one colour that is transparent, in stored samples of `depth` bits; None if Pillow handles it.
        depth: bits of a stored sample.
        profile: ICC profile that Pillow does not read.
    """

    orientation: int = 1
    scales: tuple[tuple[int, int], ...] = ()
    inverted: bool = False
    transparent: tuple[int, ...] | None = None
    depth: int = 8
    profile: bytes | None = None

    def size(self, image: Image.Image) -> tuple[int, int]:
        """(height, width) of the upright image."""
        return (image.width, image.height) if self.orientation >= 5 else (image.height, image.width)


def examine(image: Image.Image, file: BinaryIO) -> Header:
    """The header of an image that has been opened from `file` and not been decoded yet.

    Raises:
        Unsupported: the file cannot be decoded to the right pixels.
    """
    position = file.tell()
    reader = {"TIFF": of_tiff, "PNG": of_png, "JPEG2000": of_jpeg2000, "BMP": of_bmp}.get(image.format)
    header = reader(image, file) if reader else Header()
    file.seek(position)

    if image.mode == "F":
        raise Unsupported("floating point pixels have no known range")
    if image.mode == "I" and not header.scales:  # of a PGM, which Pillow has scaled to 16 bits
        header = replace(header, scales=((0, 16),))
    return replace(header, orientation=orientation(image))


def not_an_image(start: bytes) -> str:
    """What a file is that no decoder accepts, by its first bytes."""
    if start[4:8] == b"ftyp" and start[8:12] in HEIC:
        return "an HEIC image, which is not supported; convert it to JPEG or AVIF"
    for signature, kind in OTHER_FILES.items():
        if start.lstrip().startswith(signature):
            return kind
    return ""


# ---- orientation ----


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, from data in front of the pixels; XMP does not count.

    It is 1 for TIFF files, which Pillow turns while decoding. In AVIF files, Pillow puts the container's own rotation
    and mirroring in place of the orientation.
    """
    if image.format == "TIFF":
        return 1
    exif = image.info.get("exif")
    if exif is None and isinstance(text := image.info.get("Raw profile type exif"), str):  # written by ImageMagick
        try:
            exif = bytes.fromhex("".join(text.split("\n")[3:]))
        except ValueError:
            return 1
    return exif_orientation(exif) if isinstance(exif, bytes) else 1


def exif_orientation(exif: bytes) -> int:
    """The orientation tag of a block of EXIF data, or 1. No other tag is read: any of them may be damaged."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if not order:
        return 1

    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, length = struct.unpack_from(f"{order}HHI", exif, entry)
            if tag == ExifTags.Base.Orientation:
                formats = {1: "B", 3: "H", 4: "I"}  # of TIFF's integer types
                (value,) = struct.unpack_from(f"{order}{formats[kind]}", exif, entry + 8)
                return value if length == 1 and 1 <= value <= 8 else 1
    except (struct.error, KeyError):
        pass  # the data end early, or the tag is no integer
    return 1


# ---- formats ----


def of_tiff(image: Image.Image, file: BinaryIO) -> Header:
    tags = image.tag_v2
    bits, formats = tags.get(BITSPERSAMPLE, (1,)), tags.get(SAMPLEFORMAT, (1,))
    uncompressed = tags.get(COMPRESSION, UNCOMPRESSED) == UNCOMPRESSED

    if SIGNED in formats:
        raise Unsupported("signed integers have no known range")
    if image.mode == "I":
        raise Unsupported("32-bit integers have no known range")
    if uncompressed and tags.get(PLANAR_CONFIGURATION) == PLANES and max(bits) > 8:
        raise Unsupported("Pillow misreads uncompressed TIFF files with 16 bits in separate planes")
    if uncompressed and tags.get(PHOTOMETRIC_INTERPRETATION) == YCBCR and len(bits) == 3:
        raise Unsupported("Pillow misreads uncompressed TIFF files in YCbCr")

    if not image.mode.startswith("I"):
        return Header()
    return Header(scales=((0, bits[0]),), inverted=tags.get(PHOTOMETRIC_INTERPRETATION, WHITE_IS_ZERO) == WHITE_IS_ZERO)


def of_png(image: Image.Image, file: BinaryIO) -> Header:
    chunks = png_header(file)
    depth, colour = chunks[b"IHDR"][8:10]
    if colour == PALETTE:
        return Header()

    # significant bits, where samples were scaled up to fill `depth` bits
    container = 16 if image.mode.startswith("I") else 8  # bits of a decoded sample
    significant = tuple(chunks.get(b"sBIT", b""))
    if colour == GREY_ALPHA and image.mode == "RGBA" and len(significant) == 2:  # of 16 bits, which Pillow reads so
        significant = (significant[0],) * 3 + significant[1:]
    if len(significant) != len(image.getbands()) or not all(0 < bits <= depth for bits in significant):
        significant = (depth,) * len(image.getbands())
    scales = tuple((max(container - bits, 0), min(bits, container)) for bits in significant)
    if depth < 8 or all(scale == (0, 8) for scale in scales):
        scales = ()  # Pillow has scaled samples of fewer bits

    # a transparent colour is stored in 16 bits per sample; Pillow compares it with samples that it has scaled
    transparent = None
    if b"tRNS" in chunks and depth in (2, 4, 16):
        values = chunks[b"tRNS"]
        stored = [int.from_bytes(values[i : i + 2], "big") for i in range(0, len(values), 2)]
        if len(stored) == (1 if colour == GREY else 3):
            transparent = tuple(value % 2**depth for value in stored)
    return Header(scales=scales, transparent=transparent, depth=depth)


def of_jpeg2000(image: Image.Image, file: BinaryIO) -> Header:
    profile = None
    file.seek(0)
    if file.read(4) != CODESTREAM:
        boxes = jpeg2000_boxes(file, 0, file.seek(0, 2))
        inner = jpeg2000_boxes(file, *boxes.get(b"jp2h", (0, 0)))

        if b"pclr" in inner:
            raise Unsupported("Pillow misreads JPEG 2000 files with a palette")
        if b"colr" in inner:
            start, end = inner[b"colr"]
            file.seek(start)
            content = file.read(end - start)
            profile = content[3:] if content[:1] == b"\2" else None  # method 2: an ICC profile

        file.seek(boxes.get(b"jp2c", (0, 0))[0])
        if file.read(4) != CODESTREAM:
            raise Unsupported("the JPEG 2000 codestream is damaged")

    # the SIZ segment: sizes and offsets, then three bytes per component
    fixed = file.read(38)
    (count,) = struct.unpack_from(">H", fixed, 36)
    precisions = [(byte & 0x7F) + 1 for byte in file.read(3 * count)[::3]]
    if len(precisions) > 1 and (max(precisions) > 8 or len(set(precisions)) > 1):
        raise Unsupported(f"Pillow misreads JPEG 2000 colours of {max(precisions)} bits")

    # Pillow shifts samples up to 8 or 16 bits
    container = 16 if image.mode.startswith("I") else 8
    scales = tuple((max(container - bits, 0), bits) for bits in precisions)
    return Header(scales=() if set(precisions) == {8} else scales, profile=profile)


def of_bmp(image: Image.Image, file: BinaryIO) -> Header:
    file.seek(14)
    (length,) = struct.unpack("<I", file.read(4))
    if length >= 40:
        file.seek(30)
        if struct.unpack("<I", file.read(4)) == (RLE4,):
            raise Unsupported("Pillow misreads BMP files with RLE4 compression")
    return Header()


def png_header(file: BinaryIO) -> dict[bytes, bytes]:
    """The chunks of a PNG in front of its pixels, by name."""
    chunks = {}
    file.seek(len(PNG_SIGNATURE))
    while len(start := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", start)
        if name in LAST_CHUNKS:
            break
        chunks[name] = file.read(length)
        file.seek(4, 1)  # the checksum, which Pillow verifies
    return chunks


def jpeg2000_boxes(file: BinaryIO, start: int, end: int) -> dict[bytes, tuple[int, int]]:
    """Start and end of the content of the boxes between two offsets, by name; of several, the first counts."""
    boxes = {}
    while start + 8 <= end:
        file.seek(start)
        length, name = struct.unpack(">I4s", file.read(8))
        content = start + 8
        if length == 1:  # the length follows, in 64 bits
            (length,) = struct.unpack(">Q", file.read(8))
            content += 8
        if length == 0:  # up to the end
            length = end - start
        if length < content - start:
            break
        boxes.setdefault(name, (content, start + length))
        start += length
    return boxes


def tiff_area(image: Image.Image) -> int:
    """Number of pixels of the current page of a TIFF file; 0 if it states none."""
    sides = image.tag_v2.get(IMAGEWIDTH), image.tag_v2.get(IMAGELENGTH)
    return sides[0] * sides[1] if all(isinstance(side, int) for side in sides) else 0
