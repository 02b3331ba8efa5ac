"""Manifests and images: the order is a function of (seed, step), and every mistake is one line with its place."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selfe.data.buckets import Buckets, ResolutionPhase
from selfe.data.dataset import WeightedManifest
from selfe.data.manifest import ManifestData
from selfe.data.shapes import ShapesData
from selfe.errors import UserError
from selfe.types import signed

SMOKE = Path(__file__).parents[2] / "debug_data/t2i_smoke"


def smoke(**changes) -> ManifestData:
    return ManifestData(str(SMOKE / "manifest.tsv"), str(SMOKE), **{"pixels": 9216} | changes)


def paths(data: ManifestData) -> list[Path]:
    (source,) = data.sources["train"]
    return [Path(source.name(i)) for i in range(len(source))]


def write_image(path: Path, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)).convert(mode).save(path)
    return path


def one(folder: Path, path: Path) -> ManifestData:
    (folder / "one.tsv").write_text(f"{path}\tan image\n")
    return ManifestData(str(folder / "one.tsv"), pixels=2048)


def test_bundled_photographs():
    data, size = smoke(), sum(file.stat().st_size for file in SMOKE.rglob("*") if file.is_file())
    files = paths(data)
    assert len(files) >= 24
    assert size < 2e6
    assert len(set(files)) == len(files) == len(list((SMOKE / "images").iterdir()))
    kinds = {"landscape": 0, "portrait": 0, "square": 0}
    modes = set()
    for file in files:
        with Image.open(file) as image:
            kinds[
                "square" if image.width == image.height else "landscape" if image.width > image.height else "portrait"
            ] += 1
            modes.add(image.mode)
    assert min(kinds.values()) > 0
    assert {"L", "RGBA"} <= modes
    assert all(file.name.split(".")[0].split("_")[0] in (SMOKE / "LICENSES.md").read_text() for file in files)


def test_every_image_once_an_epoch_in_an_order_of_its_own():
    data = smoke()
    count = len(paths(data))

    def names(seed: int, step: int) -> list[str]:
        return list(data.batch(seed, step, range(step * count, (step + 1) * count), range(count), "train").names)

    assert sorted(names(0, 0)) == sorted(names(0, 1)) == sorted(map(str, paths(data)))
    assert names(0, 0) != names(0, 1)
    assert names(0, 0) != names(1, 0)
    assert names(0, 0) == names(0, 0)


def test_a_batch_is_the_same_however_it_is_dealt():
    data = smoke()
    complete = data.batch(3, 5, range(40, 48), range(8), "train")
    parts = [data.batch(3, 5, range(40, 48), range(i, i + 2), "train") for i in range(0, 8, 2)]
    assert complete.names == sum((part.names for part in parts), ())
    assert complete.positions == sum((part.positions for part in parts), ()) == tuple(range(8))
    for a, b in zip(complete.images, (image for part in parts for image in part.images), strict=True):
        assert a.equal(b)


def test_shapes_of_a_batch_are_buckets_near_the_images():
    data = smoke()
    shapes = {tuple(shape) for shape in data.buckets[9216].shapes.tolist()}
    for i, image in enumerate(map(signed, data.batch(0, 0, range(8), range(8), "train").images)):
        _, height, width = image.shape
        assert (height, width) in shapes, i
        assert height * width <= 9216
        assert image.min() >= -1
        assert image.max() <= 1
    assert {(96, 96), (80, 112), (112, 80), (64, 128)} <= shapes


def test_buckets_and_the_nearest_of_them():
    buckets = Buckets(65536, 16, 2.0)
    assert [256, 256] in buckets.shapes.tolist()
    assert all(h % 16 == w % 16 == 0 and h * w <= 65536 and max(h, w) <= 2 * min(h, w) for h, w in buckets.shapes)
    square, tall, wide = buckets.nearest(np.array([[1000, 1000], [4000, 1000], [1000, 4000]])).tolist()
    assert square == [256, 256]
    assert tall == wide[::-1]
    assert tall[0] == 2 * tall[1]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA", "I;16", "YCbCr"])
def test_modes(tmp_path, mode):
    suffix = {"CMYK": "tiff", "YCbCr": "jpg"}.get(mode, "png")
    path = tmp_path / f"image.{suffix}"
    if mode == "I;16":
        Image.fromarray(np.full((30, 40), 40000, np.uint16)).save(path)
    else:
        write_image(path, mode)
    (image,) = one(tmp_path, path).batch(0, 0, range(1), range(1), "train").images
    assert image.shape[0] == 3
    if mode == "I;16":
        assert abs(float(signed(image).mean()) - (40000 / 65535 * 2 - 1)) < 0.01


def test_transparency_is_white_and_exif_turns(tmp_path):
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    (image,) = one(tmp_path, tmp_path / "clear.png").batch(0, 0, range(1), range(1), "train").images
    assert (signed(image) == 1).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.new("RGB", (64, 16)).save(tmp_path / "turned.jpg", exif=exif)
    (image,) = one(tmp_path, tmp_path / "turned.jpg").batch(0, 0, range(1), range(1), "train").images
    assert image.shape[1] > image.shape[2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the manifest is empty"),
        (b"\n \n", "the manifest is empty"),
        (b"a.jpg\ta cat\nb.jpg a dog\n", "line 2: expected path, one tab, prompt; found 0 tabs"),
        (b"a.jpg\ta\tcat\n", "line 1: expected path, one tab, prompt; found 2 tabs"),
        (b"a.jpg\t \n", "line 1: path or prompt is empty"),
        (b"\ta cat\n", "line 1: path or prompt is empty"),
        (b"a.jpg\ta cat\n\nb.jpg\t\xff\n", "line 3: not UTF-8 at byte 6"),
    ],
)
def test_manifests_that_are_none(tmp_path, content, message):
    path = tmp_path / "bad.tsv"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        ManifestData(str(path))
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_windows_files_are_read(tmp_path):
    write_image(tmp_path / "a.png")
    (tmp_path / "windows.tsv").write_bytes("\ufeffa.png\tein Café\r\n".encode())
    batch = ManifestData(str(tmp_path / "windows.tsv"), str(tmp_path), pixels=1024).batch(
        0, 0, range(1), range(1), "train"
    )
    assert batch.prompts == ("ein Café",)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "no such image"),
        (lambda path: path.write_bytes(b""), "cannot be decoded"),
        (lambda path: path.write_bytes(b"not an image"), "cannot be decoded"),
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "cannot be decoded"),
    ],
)
def test_bad_images_name_file_and_line(tmp_path, damage, message):
    path = write_image(tmp_path / "bad.jpg")
    damage(path)
    with pytest.raises(UserError) as caught:
        one(tmp_path, path).batch(0, 0, range(1), range(1), "train")
    assert str(caught.value).startswith(f"{tmp_path / 'one.tsv'}, line 1: {path}: {message}")
    assert "\n" not in str(caught.value)


def test_settings_out_of_range_are_named(tmp_path):
    with pytest.raises(UserError, match="no such manifest"):
        ManifestData(str(tmp_path / "nothing.tsv"))
    for changes, name in (({"pixels": 10}, "pixels"), ({"max_aspect": 0.5}, "max_aspect")):
        with pytest.raises(ValueError, match=name):
            smoke(**changes)


HUGE = 10**30
OUT_OF_RANGE = {
    "pixels": (lambda value: smoke(pixels=value), (-1, 0, HUGE)),
    "at least": (lambda value: smoke(multiple=value), (-1, 0, HUGE)),  # a multiple above the square root of `pixels`
    "max_aspect": (lambda value: smoke(max_aspect=value), (-1, 0, math.inf, math.nan, HUGE)),
    "max_pixels": (lambda value: smoke(max_pixels=value), (-1, 0)),
    "pixels ": (lambda value: smoke(phases=(ResolutionPhase(5, (value,)),)), (-1, 0, HUGE)),
    "step": (lambda value: ResolutionPhase(value, (256,)), (-1, HUGE)),
    "shares": (lambda value: ResolutionPhase(5, (256, 1024), (1, value)), (-1, 0, HUGE)),
    "weight": (lambda value: WeightedManifest("a.tsv", value), (-1, 0, HUGE)),
    "size": (lambda value: ShapesData(size=value), (-1, 0, HUGE)),
    "contrast": (lambda value: ShapesData(contrast=(1, value)), (-1, 0, math.inf, math.nan)),
}


@pytest.mark.parametrize(
    ("message", "make", "value"),
    [(message, make, value) for message, (make, values) in OUT_OF_RANGE.items() for value in values],
)
def test_numbers_out_of_range_are_refused(message, make, value):
    with pytest.raises(ValueError, match=message):
        make(value)
