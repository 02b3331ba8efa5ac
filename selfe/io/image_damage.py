"""Find files whose pixels end early although the decoder reports nothing.

libjpeg fills missing blocks with mid-grey, and zlib's end of stream leaves missing rows at zero. The last pixels of the
decoded image therefore show whether a closer look is needed; the files of most images are read only once.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from io import BytesIO
from typing import BinaryIO

from PIL import Image, ImageChops

# ---- JPEG ----

START_OF_SCAN, END_OF_IMAGE, PROGRESSIVE = 0xDA, 0xD9, (0xC2, 0xCA)
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # not a stuffed byte, not a restart inside of a scan
MID_GREY = {127, 128}  # of blocks without data; 127 in inverted CMYK
# other data in place of the end: decoded where data are missing, skipped where they are complete
FILLER = bytes(range(1, 250)) * 40


def jpeg_ends_early(image: Image.Image, file: BinaryIO) -> bool:
    """Whether a decoded JPEG lacks data in front of its end marker, or scans of a progressive file."""
    last = image.getpixel((image.width - 1, image.height - 1))
    grey = {last} if isinstance(last, int) else set(last)
    if not image.info.get("progressive") and not grey <= MID_GREY:
        return False

    file.seek(0)
    content = file.read()
    segments = list(jpeg_segments(content))
    if image.info.get("progressive") and lacks_scans(segments):
        return True
    if not grey <= MID_GREY:
        return False

    # decode again with other data at the end
    end = segments[-1][1]
    versions = (content, content[:end] + FILLER + content[end:])
    before, after = (Image.open(BytesIO(version), formats=["JPEG"]).convert("RGB") for version in versions)
    return ImageChops.difference(before, after).getbbox() is not None


def jpeg_segments(content: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Marker, offset and parameters of each segment of the first image of a file, through its end marker."""
    position = 2  # after the start marker
    while match := MARKER.search(content, position):
        marker, start = content[match.end() - 1], match.start()
        (length,) = struct.unpack(">H", content[match.end() : match.end() + 2].rjust(2, b"\0"))
        position = match.end() + length
        yield marker, start, content[match.end() + 2 : position]
        if marker == END_OF_IMAGE:
            return


def lacks_scans(segments: list[tuple[int, int, bytes]]) -> bool:
    """Whether a progressive JPEG ends before every bit of every coefficient has been sent."""
    missing: dict[int, set[int]] = {}  # component -> coefficients whose lowest bit has not been sent
    for marker, _, parameters in segments:
        if marker in PROGRESSIVE:
            missing = {component: set(range(64)) for component in parameters[6::3]}

        if marker == START_OF_SCAN:
            count = parameters[0]
            first, last, bits = parameters[1 + 2 * count : 4 + 2 * count]
            if bits & 15 == 0:  # the lowest bit of this scan
                for component in parameters[1 : 1 + 2 * count : 2]:
                    missing.get(component, set()).difference_update(range(first, last + 1))

    return any(missing.values())


# ---- PNG ----

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
# first column and row, then steps between columns and rows, of each pass of an interlaced image
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def png_ends_early(image: Image.Image, file: BinaryIO) -> bool:
    """Whether a decoded PNG has fewer rows than its header states."""
    rows = [image.crop((0, y, image.width, y + 1)) for y in range(max(image.height - 2, 0), image.height)]
    if all(row.getbbox(alpha_only=False) for row in rows):
        return False

    # count the bytes of all rows, each of which starts with a byte for its filter
    file.seek(16)
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", file.read(13))
    expected = 0
    for left, top, across, down in PASSES if interlaced else ((0, 0, 1, 1),):
        columns, lines = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0:
            expected += lines * (1 + -(-columns * depth * CHANNELS[colour] // 8))
    return inflated_size(file, expected) < expected


def inflated_size(file: BinaryIO, enough: int) -> int:
    """Number of bytes that the pixel data of a PNG inflate to; counts to `enough`."""
    inflate, size = zlib.decompressobj(), 0
    file.seek(8)
    while len(start := file.read(8)) == 8 and size < enough:
        length, name = struct.unpack(">I4s", start)
        if name != b"IDAT":
            file.seek(length + 4, 1)
            continue

        piece = file.read(length)
        file.seek(4, 1)  # the checksum
        while piece and not inflate.eof:
            size += len(inflate.decompress(piece, 1 << 20))
            piece = inflate.unconsumed_tail
    return size
