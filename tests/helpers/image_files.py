"""Image files as other programs write them, each with the pixels that it stands for.

The right values come from the definitions of the formats (PNG, TIFF 6, EXIF, ICC, sRGB), not from a decoder.
"""

import io
import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

ORIENTATION = 0x0112
RESOLUTION_UNIT, WINDOWS_TITLE = 0x0128, 0x9C9B
# first column and row of each pass of an interlaced PNG, then the steps between columns and between rows
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
# what each orientation does to the pixels of a stored image, to show it upright
UPRIGHT = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}


@dataclass(frozen=True)
class Case:
    """A file and what reading it must give: RGB pixels (height, width, 3) within `tolerance`, or an error."""

    name: str
    content: bytes
    pixels: np.ndarray | None = None
    tolerance: int = 0
    error: str = ""  # a part of the message, if the file must be refused


# ---- writers ----


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(
    pixels: np.ndarray,
    depth: int,
    colour: int,
    chunks: Sequence[tuple[bytes, bytes]] = (),
    size: tuple[int, int] | None = None,
    interlaced: bool = False,
) -> bytes:
    """A PNG of samples (height, width) or (height, width, channels); `size` (width, height): what the header states."""
    rows = b""
    for left, top, across, down in ADAM7 if interlaced else ((0, 0, 1, 1),):
        part = pixels[top::down, left::across]
        for row in part if part.size else ():
            rows += b"\0" + png_row(row.reshape(-1), depth)

    header = struct.pack(">IIBBBBB", *(size or pixels.shape[1::-1]), depth, colour, 0, 0, interlaced)
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return content


def png_row(samples: np.ndarray, depth: int) -> bytes:
    if depth == 16:
        return samples.astype(">u2").tobytes()
    bits = np.unpackbits(samples.astype(np.uint8)[:, None], axis=1)[:, 8 - depth :]
    return np.packbits(bits.reshape(-1)).tobytes()


def tiff(pages: Sequence[tuple[dict[int, Sequence[int]], bytes]]) -> bytes:
    """A little-endian TIFF of pages: integer tags, and the bytes of one strip. Tag 273 (the strip) is added."""
    content = b"II*\0" + struct.pack("<I", 8)
    for number, (tags, data) in enumerate(pages, start=1):
        # directory, values that do not fit into it, strip
        table = {273: [0], 279: [len(data)], **tags}
        start = len(content)
        end_of_table = start + 2 + 12 * len(table) + 4
        values = {tag: struct.pack(f"<{len(value)}I", *value) for tag, value in table.items()}
        outside = sum(len(value) for value in values.values() if len(value) > 4)
        if 273 not in tags:
            values[273] = struct.pack("<I", end_of_table + outside)

        entries, more = b"", b""
        for tag in sorted(table):
            value = values[tag]
            if len(value) > 4:
                value = struct.pack("<I", end_of_table + len(more))
                more += values[tag]
            entries += struct.pack("<HHI", tag, 4, len(table[tag])) + value

        following = end_of_table + outside + len(data) if number < len(pages) else 0
        content += struct.pack("<H", len(table)) + entries + struct.pack("<I", following) + more + data
    return content


def page(width: int, height: int, bits: Sequence[int], photometric: int = 1, **more: Sequence[int]) -> dict:
    """The tags of a TIFF page; `more` are given as t284=[2]."""
    tags = {256: [width], 257: [height], 258: bits, 259: [1], 262: [photometric], 277: [len(bits)], 278: [height]}
    return tags | {int(name[1:]): value for name, value in more.items()}


def exif(orientation: int, damaged: bool = False) -> bytes:
    """EXIF data with an orientation; if damaged, with tags of wrong values, offsets and types."""
    entries = struct.pack(">HHIHH", ORIENTATION, 3, 1, orientation, 0)
    if damaged:
        entries += struct.pack(">HHII", RESOLUTION_UNIT, 4, 1, 1 << 20)  # a tag of 16 bits
        entries += struct.pack(">HHII", WINDOWS_TITLE, 2, 4000, 1 << 30)
        entries += struct.pack(">HHII", WINDOWS_TITLE + 1, 77, 9, 9)
    count = len(entries) // 12
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, count) + entries + bytes(4)


def xmp(orientation: int) -> bytes:
    """XMP data with an orientation, which does not count."""
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{orientation}"/>'
        "</rdf:RDF></x:xmpmeta>"
    ).encode()


# ---- ICC profiles ----

WHITE = (0.9642, 1.0, 0.8249)  # D50
# red, green and blue in XYZ, adapted to D50
SRGB = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
DISPLAY_P3 = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
ADOBE_RGB = ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446))


def fixed(*values: float) -> bytes:
    """Numbers in the s15Fixed16 format of ICC."""
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def icc(kind: bytes, space: bytes, connection: bytes, name: str, tags: dict[bytes, bytes]) -> bytes:
    """A version 2 profile of a class, a colour space and a connection space."""
    text = name.encode("ascii") + b"\0"
    tags = {
        b"desc": b"desc" + struct.pack(">II", 0, len(text)) + text + bytes(78),
        b"cprt": b"text" + bytes(4) + b"no copyright\0",
        b"wtpt": b"XYZ " + bytes(4) + fixed(*WHITE),
        **tags,
    }
    start = 128 + 4 + 12 * len(tags)
    table, data = struct.pack(">I", len(tags)), b""
    for tag, value in tags.items():
        table += tag + struct.pack(">II", start + len(data), len(value))
        data += value + bytes(-len(value) % 4)

    header = struct.pack(">I4s4s", start + len(data), b"test", b"\x02\x10\0\0") + kind + space + connection
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(*WHITE)
    return header.ljust(128, b"\0") + table + data


def gamma_curve(gamma: float) -> bytes:
    return b"curv" + struct.pack(">IIHH", 0, 1, round(gamma * 256), 0)


def rgb_profile(primaries: Sequence[Sequence[float]], gamma: float, name: str) -> bytes:
    tags = {}
    for channel, xyz in zip("rgb", primaries, strict=True):
        tags[f"{channel}XYZ".encode()] = b"XYZ " + bytes(4) + fixed(*xyz)
        tags[f"{channel}TRC".encode()] = gamma_curve(gamma)
    return icc(b"mntr", b"RGB ", b"XYZ ", name, tags)


def grey_profile(gamma: float) -> bytes:
    return icc(b"mntr", b"GRAY", b"XYZ ", f"Grey {gamma}", {b"kTRC": gamma_curve(gamma)})


def cmyk_profile() -> bytes:
    """Full ink of any kind gives L* = 50, no ink L* = 100; linear in between, and always neutral."""
    corners = b""
    for corner in range(16):
        corners += bytes((255 if corner == 0 else 128, 128, 128))  # L*, a*, b* in 8 bits
    identity = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    return icc(b"prtr", b"CMYK", b"Lab ", "Test ink", {b"A2B0": table + identity * 4 + corners + identity * 3})


def srgb_levels(linear: np.ndarray) -> np.ndarray:
    """Linear light in [0, 1] -> sRGB levels of 255."""
    linear = np.clip(linear, 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(255 * encoded).astype(int)


def in_srgb(colour: Sequence[int], primaries: Sequence[Sequence[float]], gamma: float) -> np.ndarray:
    """The sRGB levels of a colour in another space."""
    xyz = np.array(primaries).T @ (np.array(colour) / 255) ** gamma
    return srgb_levels(np.linalg.solve(np.array(SRGB).T, xyz))


# ---- cases ----

# 24 wide, 16 high, all four quarters different
QUARTERS = np.zeros((16, 24, 3), np.uint8)
QUARTERS[:8, :12], QUARTERS[:8, 12:] = (200, 0, 0), (0, 200, 0)
QUARTERS[8:, :12], QUARTERS[8:, 12:] = (0, 0, 200), (200, 200, 200)
IMAGE = Image.fromarray(QUARTERS)
KINDS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "tif": "TIFF"}
STEPS = np.array([[0, 64, 128, 192, 255]])  # levels of grey
LARGE = 2 << 20  # bytes of metadata, above Pillow's limit of 1 MB


def grey(levels: np.ndarray) -> np.ndarray:
    """Levels (height, width) as RGB."""
    return levels[..., None].repeat(3, axis=2)


def orientations() -> list[Case]:
    """EXIF counts in every format, XMP in none, and no other tag can do harm."""
    cases = []
    for orientation, upright in UPRIGHT.items():
        block = exif(orientation)
        for suffix, kind in KINDS.items():
            options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True}
            content = saved(IMAGE, kind, exif=block, **options)
            cases.append(Case(f"exif_{orientation}.{suffix}", content, upright(QUARTERS), 12 if kind == "JPEG" else 0))

        for mode in ("L", "P", "RGBA", "CMYK", "1", "LA"):
            image = IMAGE.convert(mode)
            pixels = upright(np.asarray(image.convert("RGB")))
            cases.append(Case(f"{mode}_{orientation}.tif", saved(image, "TIFF", exif=block), pixels))
        deep = Image.fromarray(QUARTERS[..., 0].astype(np.uint16) * 257)
        pixels = upright(grey(QUARTERS[..., 0]))
        cases.append(Case(f"grey16_{orientation}.tif", saved(deep, "TIFF", exif=block), pixels))

    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", xmp(6).decode())
    cases += [
        Case("xmp.jpg", saved(IMAGE, "JPEG", xmp=xmp(6), quality=100, subsampling=0), QUARTERS, 12),
        Case("xmp.webp", saved(IMAGE, "WEBP", xmp=xmp(6), lossless=True), QUARTERS),
        Case("xmp.png", saved(IMAGE, "PNG", pnginfo=text), QUARTERS),
        Case("xmp.tif", saved(IMAGE, "TIFF", tiffinfo={700: xmp(6)}), QUARTERS),
    ]
    damaged, turned = exif(6, damaged=True), UPRIGHT[6](QUARTERS)
    raw_profile = f"Raw profile type exif\0\nexif\n{len(exif(6))}\n{exif(6).hex()}"  # as ImageMagick writes it
    cases += [
        Case("odd_tags.jpg", saved(IMAGE, "JPEG", exif=damaged, quality=100, subsampling=0), turned, 12),
        Case("odd_tags.png", saved(IMAGE, "PNG", exif=damaged), turned),
        Case("odd_tags.webp", saved(IMAGE, "WEBP", exif=damaged, lossless=True), turned),
        Case("no_exif.jpg", saved(IMAGE, "JPEG", exif=b"Exif\0\0MM", quality=100, subsampling=0), QUARTERS, 12),
        Case(
            "raw_profile.png",
            png(QUARTERS, 8, 2, [(b"tEXt", raw_profile.encode())]),
            turned,
        ),
    ]
    if "AVIF" in Image.SAVE:  # optional in Pillow; the container holds the orientation
        image, lossless = IMAGE.resize((48, 32), Image.Resampling.NEAREST), {"quality": 100, "subsampling": "4:4:4"}
        pixels = np.asarray(image)
        for orientation, upright in UPRIGHT.items():
            content = saved(image, "AVIF", exif=exif(orientation), **lossless)
            cases.append(Case(f"container_{orientation}.avif", content, upright(pixels), 2))
    return cases


def profiles() -> list[Case]:
    """Embedded ICC profiles are converted to sRGB; unreadable ones count as sRGB."""
    colour = (150, 110, 90)  # inside of all spaces
    solid, cases = Image.new("RGB", (16, 16), colour), []
    for name, primaries in (("display_p3", DISPLAY_P3), ("adobe_rgb", ADOBE_RGB)):
        profile = rgb_profile(primaries, 2.2, name)
        pixels = np.broadcast_to(in_srgb(colour, primaries, 2.2), (16, 16, 3))
        for suffix, kind in KINDS.items():
            options = {"quality": 100} if kind == "JPEG" else {"lossless": True}
            cases.append(Case(f"{name}.{suffix}", saved(solid, kind, icc_profile=profile, **options), pixels, 3))

    # half transparent, on white
    profile = rgb_profile(DISPLAY_P3, 2.2, "display_p3")
    solid.putalpha(128)
    half = np.broadcast_to((in_srgb(colour, DISPLAY_P3, 2.2) * 128 + 255 * 127) // 255, (16, 16, 3))
    cases.append(Case("display_p3_alpha.png", saved(solid, "PNG", icc_profile=profile), half, 3))

    # in JPEG 2000, in a box that Pillow does not read; method 2 is an ICC profile
    solid = Image.new("RGB", (16, 16), colour)
    box = struct.pack(">I4sBBB", len(profile) + 11, b"colr", 2, 0, 0) + profile
    pixels = np.broadcast_to(in_srgb(colour, DISPLAY_P3, 2.2), (16, 16, 3))
    cases.append(Case("display_p3.jp2", with_box(saved(solid, "JPEG2000"), box, b"colr"), pixels, 3))

    steps = Image.fromarray(STEPS.astype(np.uint8))
    linear = grey(srgb_levels(STEPS / 255))
    cases.append(Case("grey_linear.png", saved(steps, "PNG", icc_profile=grey_profile(1.0)), linear, 3))
    cases.append(Case("grey_of_rgb.png", saved(steps, "PNG", icc_profile=profile), grey(STEPS), 6))

    # L* = 100 and 50 are 100% and 18.4% of the light
    inks = Image.fromarray(np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255]]], np.uint8), "CMYK")
    light = grey(srgb_levels(np.array([[1.0, 0.184, 0.184]])))
    cases.append(Case("cmyk.tif", saved(inks, "TIFF", icc_profile=cmyk_profile()), light, 3))

    cases += [
        Case("damaged_profile.png", saved(IMAGE, "PNG", icc_profile=b"not a profile"), QUARTERS),
        Case("cut_profile.png", saved(IMAGE, "PNG", icc_profile=profile[:200]), QUARTERS),
        Case(
            "profile_of_numbers.tif", tiff([(page(2, 1, [8], t34675=[1, 2, 3]), b"\0\x80")]), grey(np.array([[0, 128]]))
        ),
        Case("cmyk_profile.png", saved(IMAGE, "PNG", icc_profile=cmyk_profile()), QUARTERS),
    ]
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * LARGE, zip=True)
    cases += [
        Case("large_text.png", saved(IMAGE, "PNG", pnginfo=text), QUARTERS),
        Case("large_profile.png", saved(solid, "PNG", icc_profile=profile + bytes(LARGE)), pixels, 3),
    ]
    return cases


def ranges() -> list[Case]:
    """Samples are scaled by the number of bits that the file states; those without a known range are refused."""
    deep = np.array([[0, 64 * 257, 128 * 257, 192 * 257, 65535]])
    twelve = np.array([[0, 1028, 2056, 3084, 4095, 0]])
    packed = b"".join((first << 12 | second).to_bytes(3, "big") for first, second in twelve.reshape(3, 2).tolist())
    four, two = np.array([[0, 5, 10, 15]]), np.array([[0, 1, 2, 3]])

    wide = page(5, 1, [16])
    cases = [
        Case("grey16.png", png(deep, 16, 0), grey(STEPS)),
        Case("grey16.tif", tiff([(wide, deep.astype("<u2").tobytes())]), grey(STEPS)),
        Case("grey12.tif", tiff([(page(6, 1, [12]), packed)]), grey(np.append(STEPS, [[0]], axis=1)), 1),
        Case("white_is_zero16.tif", tiff([(page(5, 1, [16], 0), deep.astype("<u2").tobytes())]), grey(255 - STEPS)),
        Case("significant12.png", png(np.array([[0, 2056 << 4, 4095 << 4]]), 16, 0, [(b"sBIT", b"\x0c")]),
             grey(np.array([[0, 128, 255]]))),
        Case("significant5.png", png(np.array([[[0, 128, 248]]]), 8, 2, [(b"sBIT", b"\5\5\5")]),
             np.array([[[0, 131, 255]]]), 1),
        Case("grey4.png", png(four, 4, 0), grey(four * 17)),
        Case("int32.tif", tiff([(page(5, 1, [32]), deep.astype("<u4").tobytes())]), error="32-bit integers"),
        Case("signed16.tif", tiff([(page(5, 1, [16], t339=[2]), bytes(10))]), error="signed integers"),
        Case("signed8.tif", tiff([(page(5, 1, [8], t339=[2]), bytes(5))]), error="signed integers"),
        Case("float.tif", saved(Image.new("F", (4, 4)), "TIFF"), error="floating point"),
        Case("float.pfm", b"Pf\n2 2\n-1.0\n" + bytes(16), error="floating point"),
        Case("grey16.pgm", b"P5\n3 1\n65535\n" + np.array([0, 128 * 257, 65535], ">u2").tobytes(),
             grey(np.array([[0, 128, 255]]))),
    ]  # fmt: skip

    # one transparent colour, which shows white; colours next to it do not
    white = 255
    near = np.array([[[7, 8, 9], [7, 8, 10]]]) + 256 * np.array([100, 150, 200])
    cases += [
        Case("transparent2.png", png(two, 2, 0, [(b"tRNS", b"\0\1")]), grey(np.array([[0, white, 170, 255]]))),
        Case("transparent4.png", png(four, 4, 0, [(b"tRNS", b"\0\5")]), grey(np.array([[0, white, 170, 255]]))),
        Case("transparent8.png", png(STEPS, 8, 0, [(b"tRNS", b"\0\x40")]), grey(np.array([[0, white, 128, 192, 255]]))),
        Case("transparent16.png", png(np.array([[1000, 1001]]), 16, 0, [(b"tRNS", struct.pack(">H", 1000))]),
             grey(np.array([[white, 3]]))),
        Case("transparent48.png", png(near, 16, 2, [(b"tRNS", struct.pack(">3H", *near[0, 0]))]),
             np.array([[[white] * 3, [100, 150, 200]]])),
    ]  # fmt: skip

    # JPEG 2000: the number of bits in a file is lowered, which moves its samples by half of each range
    eight = saved(Image.fromarray((120 + four).astype(np.uint8).repeat(4, axis=0)), "JPEG2000")
    sixteen = saved(Image.fromarray((32768 - 2048 + twelve[:, :5]).astype(np.uint16).repeat(4, axis=0)), "JPEG2000")
    colours = saved(IMAGE, "JPEG2000")
    palette = struct.pack(">I4sHB", 12, b"pclr", 1, 1) + b"\7"
    cases += [
        Case("grey4.jp2", with_bits(eight, 4), grey((four * 17).repeat(4, axis=0))),
        Case("grey12.jp2", with_bits(sixteen, 12), grey(STEPS.repeat(4, axis=0)), 1),
        Case("colours16.jp2", with_bits(colours, 16), error="colours of 16 bits"),
        Case("palette.jp2", with_box(colours, palette), error="palette"),
    ]
    return cases


def with_box(content: bytes, box: bytes, in_place_of: bytes = b"") -> bytes:
    """A JPEG 2000 file with another box in its header, instead of the one of a name."""
    start = content.index(b"jp2h") - 4
    end = start + struct.unpack_from(">I", content, start)[0]
    inner = content[start + 8 : end]
    if in_place_of:
        old = inner.index(in_place_of) - 4
        inner = inner[:old] + inner[old + struct.unpack_from(">I", inner, old)[0] :]
    inner += box
    return content[:start] + struct.pack(">I4s", len(inner) + 8, b"jp2h") + inner + content[end:]


def with_bits(content: bytes, bits: int) -> bytes:
    """A JPEG 2000 file whose components have this number of bits."""
    changed, start = bytearray(content), content.index(b"\xff\x51")
    for component in range(struct.unpack_from(">H", content, start + 38)[0]):
        changed[start + 40 + 3 * component] = bits - 1
    return bytes(changed)


def damaged() -> list[Case]:
    """Files that end early, are misread by Pillow, or are no images; each names its cause. And some that are fine."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).resize((64, 64))
    plain, progressive = saved(noise, "JPEG"), saved(noise, "JPEG", progressive=True)
    stereo = saved(noise, "MPO", save_all=True, append_images=[noise])
    end, cut = b"\xff\xd9", len(plain) * 2 // 3
    broken_start = bytearray(png(QUARTERS, 8, 2))
    broken_start[20] ^= 1  # the width, so that the checksum of the header is wrong
    twelve_bits = bytearray(plain)
    twelve_bits[plain.index(b"\xff\xc0") + 4] = 12
    bmp = bytearray(saved(IMAGE.quantize(16), "BMP"))
    bmp[30] = 2
    small, large = np.full((4, 4), 9, np.uint8), np.full((8, 8), 99, np.uint8)
    pages = [(page(4, 4, [8]), small.tobytes()), (page(8, 8, [8]), large.tobytes())]
    planes = tiff([(page(4, 4, [16, 16, 16], 2, t284=[2], t273=[8] * 3, t279=[32] * 3), bytes(96))])

    return [
        Case("cut_with_end.jpg", plain[:cut] + end, error="truncated"),
        Case("cut_with_end_progressive.jpg", progressive[: len(progressive) * 2 // 3] + end, error="truncated"),
        Case("cut_with_end.mpo", stereo[:cut] + end + stereo[cut + 2 :], error="truncated"),
        Case("stereo.mpo", stereo, np.asarray(noise), 60),
        Case("cut.jpg", plain[:cut], error="truncated"),
        Case("few_rows.png", png(QUARTERS[:12], 8, 2, size=(24, 16)), error="truncated"),
        Case("thumbnail_first.tif", tiff(pages), grey(large)),
        Case("thumbnail_last.tif", tiff(pages[::-1]), grey(large)),
        Case("rle4.bmp", bytes(bmp), error="RLE4"),
        Case("planes16.tif", planes, error="separate planes"),
        Case("ycbcr.tif", saved(IMAGE.convert("YCbCr"), "TIFF"), error="YCbCr"),
        Case("twelve_bits.jpg", bytes(twelve_bits), error="JPEG: cannot handle 12-bit layers"),
        Case("checksum.png", bytes(broken_start), error="PNG: broken PNG file (bad header checksum"),
        Case("empty.png", b"", error="the file is empty"),
        Case("page.jpg", b"<!DOCTYPE html><html>not found</html>", error="an HTML or XML page"),
        Case("pointer.png", b"version https://git-lfs.github.com/spec/v1\n", error="git lfs pull"),
        Case("photo.heic", b"\0\0\0\x18ftypheic" + bytes(20), error="an HEIC image"),
        Case("noise.jpg", np.random.default_rng(1).bytes(500), error="not one of"),
        Case("mid_grey.jpg", saved(Image.new("RGB", (40, 40), (128,) * 3), "JPEG"), np.full((40, 40, 3), 128)),
        Case("mid_grey_twice.jpg", saved(Image.new("L", (9, 9), 128), "JPEG") * 2, np.full((9, 9, 3), 128)),
        Case("black.png", saved(Image.new("RGB", (9, 9)), "PNG"), np.zeros((9, 9, 3))),
        Case("progressive.jpg", progressive, np.asarray(noise), 60),
    ]  # fmt: skip


def interlaced() -> list[Case]:
    """Complete interlaced PNG files with a black end, and without their last row."""
    cases = []
    for width, height in ((1, 1), (2, 3), (5, 9), (8, 8), (13, 7)):
        pixels = np.zeros((height, width), int)
        pixels[: height // 2] = 1
        for depth in (1, 8, 16):
            name, shown = f"interlaced_{width}x{height}x{depth}", grey(pixels * 255 // (2**depth - 1))
            cases.append(Case(f"{name}.png", png(pixels, depth, 0, interlaced=True), shown))

        short = png(pixels[:-1], 8, 0, size=(width, height), interlaced=True)
        cases.append(Case(f"interlaced_{width}x{height}_short.png", short, error="truncated"))
    return cases


def all_cases() -> list[Case]:
    return orientations() + profiles() + ranges() + interlaced() + damaged()


def write(folder: Path, cases: Sequence[Case]) -> None:
    """The files of the cases, and `expected.json` with their sizes and some of their pixels."""
    expected = {}
    for case in cases:
        (folder / case.name).write_bytes(case.content)
        expected[case.name] = {"tolerance": case.tolerance, "refuse": True}
        if case.pixels is not None:
            height, width = case.pixels.shape[:2]
            corners = {f"{y},{x}": case.pixels[y, x].tolist() for y in (0, height - 1) for x in (0, width - 1)}
            expected[case.name] = {"tolerance": case.tolerance, "size": (height, width), "pixels": corners}
    (folder / "expected.json").write_text(json.dumps(expected))
