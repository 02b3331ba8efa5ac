"""Ordinary image files, and more than 300 damaged or unusual ones, treated alike by check-data and training."""

import warnings
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfe.data.manifest import ManifestData
from selfe.errors import BadSample
from selfe.io import image_decode
from selfe.tools import check_data
from selfe.types import signed
from tests.helpers import image_files
from tests.helpers.image_files import saved
from tests.helpers.images import make_image

SIZE = (48, 64)


def read(content: bytes, **options: object) -> np.ndarray:
    return np.asarray(image_decode.read(BytesIO(content), "it", **options)).astype(int)


RGB = np.asarray(make_image(0, SIZE)).astype(int)
GREY = np.asarray(make_image(0, SIZE, "L")).astype(int)[..., None].repeat(3, axis=2)
ALPHA = Image.fromarray(np.linspace(0, 255, 64, dtype=np.uint8)[None].repeat(48, axis=0))


def transparent(mode: str) -> Image.Image:
    image = make_image(0, SIZE, mode)
    image.putalpha(ALPHA)
    return image


@pytest.mark.parametrize(
    ("content", "expected", "tolerance"),
    [
        (saved(make_image(0, SIZE), "PNG"), RGB, 0),
        (saved(make_image(0, SIZE), "JPEG", quality=95), RGB, 16),
        (saved(make_image(0, SIZE), "WEBP", lossless=True), RGB, 0),
        (saved(make_image(0, SIZE), "TIFF"), RGB, 0),
        (saved(make_image(0, SIZE, "L"), "JPEG", quality=95), GREY, 8),
        (saved(make_image(0, SIZE).quantize(256), "PNG"), RGB, 40),
        (saved(make_image(0, SIZE).quantize(256), "GIF"), RGB, 40),
        (saved(make_image(0, SIZE, "CMYK"), "TIFF"), RGB, 4),
        (saved(make_image(0, SIZE, "CMYK"), "JPEG", quality=95), RGB, 20),
        (saved(Image.fromarray((GREY[..., 0] * 257).astype(np.uint16)), "PNG"), GREY, 0),
        (saved(make_image(0, SIZE, "1"), "PNG"), np.asarray(make_image(0, SIZE, "1").convert("RGB")), 0),
        (saved(make_image(0, SIZE), "GIF", save_all=True, append_images=[make_image(1, SIZE)]), RGB, 40),
    ],
)
def test_modes_become_rgb(content, expected, tolerance):
    assert np.abs(read(content) - expected).max() <= tolerance


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_transparency_is_put_on_white(mode):
    opaque = RGB if mode == "RGB" else GREY
    share = np.asarray(ALPHA)[..., None] / 255
    assert np.abs(read(saved(transparent(mode), "PNG")) - (opaque * share + 255 * (1 - share))).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_put_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = read(content := saved(make_image(0, SIZE), "PNG", exif=exif))
    turns = {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}[orientation]  # by 90 degrees, to the left
    expected = np.rot90(RGB[:, ::-1] if orientation in (2, 4, 5, 7) else RGB, turns)
    assert (turned == expected).all()
    assert image_decode.size(BytesIO(content), "it") == turned.shape[:2]


def test_large_jpegs_are_decoded_smaller_and_look_the_same():
    content = saved(make_image(0, (1200, 1600)), "JPEG", quality=95)
    small = image_decode.read(BytesIO(content), "it", enough=256)
    assert min(small.size) >= 256
    assert small.width < 1600
    complete, quick = (
        image_decode.fit(image, (96, 128)).int() for image in (image_decode.read(BytesIO(content), "it"), small)
    )
    assert (complete - quick).abs().max() <= 3


def test_fit_cuts_no_more_than_it_must():
    image = Image.new("RGB", (200, 100), "red")
    image.paste("blue", (50, 0, 150, 100))
    square = signed(image_decode.fit(image, (32, 32)))
    assert square.shape == (3, 32, 32)
    assert square[2, :, 1:-1].min() > 0.98
    assert square[0, :, 1:-1].max() < -0.98
    assert signed(image_decode.fit(image, (32, 64)))[0, :, 0].min() > 0.98


def test_too_many_pixels_are_refused_before_decoding():
    content = saved(Image.new("1", (3000, 3000)), "PNG")
    with pytest.raises(BadSample, match="3000 x 3000 pixels are more than 8999999") as error:
        image_decode.read(BytesIO(content), "it", max_pixels=8_999_999)
    assert error.value.kind == "too large"
    assert image_decode.read(BytesIO(content), "it", max_pixels=9_000_000).size == (3000, 3000)


# ---- damaged and unusual files ----

FLIPS = 14  # damaged versions of each file
SIZES_CLAIMED = ((2**31 - 1, 2**31 - 1), (60000, 60000), (0, 10), (1, 70000), (10**6, 1), (3, 5))
NAMES = ("with space.jpg", "été.jpg", "紅い.jpg", "quote'\".jpg", "-dash.jpg", "%20.jpg", "a#b?.jpg", "x" * 200)
NO_FILES = ("nothing.jpg", "y" * 300 + ".jpg", "no/such/folder.jpg", "empty.jpg/below.jpg", ".")
NOT_IMAGES = {
    "empty.jpg": b"",
    "one.jpg": b"\xff",
    "page.jpg": b"<html>not found</html>",
    "program.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
}


def good_files() -> dict[str, bytes]:
    image = make_image(0, SIZE)
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "jpg": saved(image, "JPEG", exif=exif),
        "png": saved(transparent("RGB"), "PNG"),
        "gif": saved(image, "GIF", save_all=True, append_images=[make_image(1, SIZE)]),
        "webp": saved(image, "WEBP"),
        "tiff": saved(image, "TIFF", compression="tiff_lzw"),
        "bmp": saved(image, "BMP"),
        "ppm": saved(image, "PPM"),
        "tga": saved(image, "TGA"),
        "jp2": saved(image, "JPEG2000"),
    }


def with_flipped_bits(content: bytes, count: int, random: np.random.Generator) -> bytes:
    flipped = np.frombuffer(content, np.uint8).copy()
    for position in random.integers(len(flipped), size=count):
        flipped[position] ^= 1 << random.integers(8)
    return flipped.tobytes()


def damaged_files(suffix: str, content: bytes, random: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Versions of a file, with their names: cut, with flipped bits, with zeros at the end, under wrong names."""
    for version in range(FLIPS):
        yield f"cut_{version}.{suffix}", content[: random.integers(len(content))]
    for version in range(FLIPS):
        yield f"flipped_{version}.{suffix}", with_flipped_bits(content, random.integers(1, 20), random)

    start = random.integers(len(content) // 2)
    yield f"zeros.{suffix}", content[:start] + bytes(len(content) - start)

    yield f"called_{suffix}.txt", content
    yield f"really_{suffix}.{'png' if suffix == 'jpg' else 'jpg'}", content
    yield f"twice.{suffix}", content + content


def odd_inputs(seed: int) -> Iterator[tuple[str, bytes | None]]:
    """(file name, content or None for no file); some can be read, some cannot."""
    random, good = np.random.default_rng(seed), good_files()
    for suffix, content in good.items():
        yield from damaged_files(suffix, content, random)

    # sizes and modes
    for width, height in SIZES_CLAIMED:
        rows = np.zeros((1, 5, 3), np.uint8)
        yield f"claims_{width}x{height}.png", image_files.png(rows, 8, 2, size=(width, height))
    for mode in ("F", "I", "YCbCr", "CMYK"):
        yield f"mode_{mode}.tiff", saved(make_image(0, SIZE, mode), "TIFF")
    for mode in ("RGBA", "1", "P"):
        yield f"mode_{mode}.png", saved(make_image(0, SIZE, mode), "PNG")
    yield "mode_LA.png", saved(transparent("L"), "PNG")

    # names, missing files, other files
    for name in NAMES:
        yield name, good["jpg"]
    for name in NO_FILES:
        yield name, None
    yield from NOT_IMAGES.items()


def check(manifest: Path, base_dir: Path) -> dict[int, check_data.Finding]:
    """The findings of check-data, by line."""
    limits = check_data.Limits(base_dir, min_side=1, max_pixels=10**7)
    lines = check_data.batched(check_data.read_records(manifest, limits.format))
    findings = check_data.findings(lines, manifest.stat().st_size, limits, workers=0)
    return {int(finding.where.removeprefix("line ")): finding for finding in findings}


def test_checker_and_training_refuse_the_same_files(tmp_path):
    lines, number_of = [], {}
    for number, (name, content) in enumerate(odd_inputs(0), start=1):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        lines.append(f"{name}\timage {number}".encode())
        number_of[name] = number
    assert len(number_of) == len(lines) >= 300
    path = tmp_path / "odd.tsv"
    path.write_bytes(b"\n".join(lines) + b"\n")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about metadata
        findings = check(path, tmp_path)
        data = ManifestData(str(path), str(tmp_path), pixels=1024, max_pixels=10**7, on_bad_image="replace")
        problems = problems_of_training(data)
        batch = data.batch(0, 0, range(16), range(16), "train")

    # the same lines, each with its number
    assert sorted(findings) == list(range(1, len(lines) + 1))
    assert set(problems) == {number for number, finding in findings.items() if finding.kind}
    for number, problem in problems.items():
        for message in (problem, findings[number].problem):
            assert f"line {number}: " in message
            assert "\n" not in message

    # a batch replaces them
    assert all(image.shape[1] * image.shape[2] <= 1024 for image in batch.images)
    assert batch.replaced

    kinds = {finding.kind for finding in findings.values()}
    assert {"", "missing", "undecodable", "truncated", "too large"} <= kinds
    assert 100 < len(problems) < len(lines) - 30
    for name in ("claims_60000x60000.png", "mode_F.tiff", "mode_I.tiff", "program.jpg", "empty.jpg", "zeros.png"):
        assert number_of[name] in problems, name
    for name in ("with space.jpg", "été.jpg", "紅い.jpg", "called_jpg.txt", "twice.jpg", "mode_CMYK.tiff"):
        assert number_of[name] not in problems, name


def problems_of_training(data: ManifestData) -> dict[int, str]:
    """Read every image as training does; the messages by line."""
    source, problems = data.sources["train"][0], {}
    for index in range(len(source)):
        try:
            tensor = image_decode.fit(source.image(index, 32), (32, 32))
        except BadSample as problem:
            problems[index + 1] = str(problem)
        else:
            assert tensor.shape == (3, 32, 32)
            assert tensor.dtype == torch.uint8
    return problems


def test_checker_and_training_refuse_the_same_lines(tmp_path):
    """Lines of a manifest with flipped bits: whatever the checker names, opening or reading the manifest names too."""
    random = np.random.default_rng(1)
    make_image(0, SIZE).save(tmp_path / "a.jpg")
    good, path = "a.jpg\tan été, 紅い\t64\t48".encode(), tmp_path / "odd.tsv"

    for _ in range(100):
        line = with_flipped_bits(good, random.integers(1, 4), random)
        path.write_bytes(line + b"\n")
        kinds = {finding.kind for finding in check(path, tmp_path).values()} - {"", "wrong size"}
        assert kind_in_training(path) in (kinds or {""}), line
        for index in tmp_path.glob("*.index"):
            index.unlink()


def kind_in_training(path: Path) -> str:
    """The kind of problem that training has with a manifest of one line; empty if there is none."""
    try:
        ManifestData(str(path), str(path.parent), pixels=1024).batch(0, 0, range(1), [0], "train")
    except BadSample as problem:
        return problem.kind
    return ""
