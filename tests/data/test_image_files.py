"""Image files of other programs are read to the right pixels, or refused with their cause."""

import json
import runpy
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from selfe import cli
from selfe.data.manifest import ManifestData
from selfe.data.shards import ShardData
from selfe.errors import BadSample
from selfe.io import color_profiles, image_decode
from selfe.tools import check_data, precompute
from tests.helpers import image_files

ROOT = Path(__file__).parents[2]
CASES = image_files.all_cases()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_file_gives_the_pixels_that_it_stands_for_or_its_cause(case, tmp_path):
    path = tmp_path / case.name
    path.write_bytes(case.content)

    if case.error:
        with pytest.raises(BadSample) as refused:
            image_decode.read(path, case.name)
        assert case.error in str(refused.value)
        assert str(refused.value).startswith(f"{case.name}: cannot be decoded (")
        return

    pixels = np.asarray(image_decode.read(path, case.name)).astype(int)
    assert pixels.shape == case.pixels.shape
    assert np.abs(pixels - case.pixels).max() <= case.tolerance
    assert image_decode.size(path, case.name) == case.pixels.shape[:2]
    assert (np.asarray(image_decode.read(BytesIO(case.content), case.name)) == pixels).all()


# ---- colour profiles ----


@pytest.mark.parametrize(
    ("profile", "name"),
    [
        (None, "none"),
        (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), "sRGB"),
        (image_files.rgb_profile(image_files.DISPLAY_P3, 2.2, "Display\nP3 "), "Display P3"),
        (image_files.rgb_profile(image_files.SRGB, 1.8, "Gamma 1.8"), "Gamma 1.8"),
        (image_files.grey_profile(2.2), "unreadable"),  # of another kind of image
        (b"not a profile", "unreadable"),
    ],
)
def test_a_profile_has_a_name_and_changes_pixels_only_if_it_is_not_srgb(profile, name):
    content = image_files.saved(image_files.IMAGE, "PNG", icc_profile=profile)
    decoded = image_decode.decode(BytesIO(content), "it")
    assert decoded.profile == name
    same = (np.asarray(decoded.image) == image_files.QUARTERS).all()
    assert same == (name in (color_profiles.NONE, color_profiles.SRGB, color_profiles.UNREADABLE))


def test_profiles_are_ignored_on_request(tmp_path):
    """And a cache of encoded images depends on it."""
    profile = image_files.rgb_profile(image_files.DISPLAY_P3, 2.2, "Display P3")
    (tmp_path / "a.png").write_bytes(image_files.saved(image_files.IMAGE, "PNG", icc_profile=profile))
    (tmp_path / "a.tsv").write_text("a.png\tquarters\n")

    facts = set()
    for convert_icc in (True, False):
        data = ManifestData(str(tmp_path / "a.tsv"), str(tmp_path), convert_icc=convert_icc)
        pixels = np.asarray(data.sources["train"][0].image(0, None))
        assert (pixels == image_files.QUARTERS).all() != convert_icc
        facts.add(data.facts()["data.convert_icc"])
    assert facts == {"True", "False"}


# ---- every door to the same pixels ----


def test_manifest_shards_precompute_and_check_data_read_the_same_pixels(tmp_path):
    """Over all orientations, modes, profiles and ranges."""
    cases = [case for case in CASES if not case.error]
    image_files.write(tmp_path, cases)
    manifest, shards = tmp_path / "a.tsv", tmp_path / "shards"
    manifest.write_text("".join(f"{case.name}\t{case.name}\n" for case in cases))
    cli.run(["make-shards", str(manifest), "--base-dir", str(tmp_path), "--out", str(shards)])

    datasets = [
        ManifestData(str(manifest), str(tmp_path), pixels=1024, multiple=4),
        ShardData(str(shards / "*.tar"), pixels=1024, multiple=4),
    ]
    limits = check_data.Limits(tmp_path, min_side=1, max_pixels=10**6)
    precomputed = precompute.Images(datasets[0])
    for index, case in enumerate(cases):
        expected = np.asarray(image_decode.read(BytesIO(case.content), case.name))
        for data in datasets:
            source = data.sources["train"][0]
            assert (np.asarray(source.image(index, None)) == expected).all()
            assert source.sizes(np.array([index])).tolist() == [list(expected.shape[:2])]

        height, width = precomputed.shape(index)
        _, _, encoded = precomputed[index]
        fitted = image_decode.fit(Image.fromarray(expected), (height, width))
        assert (encoded == fitted).all()

        line = f"{case.name}\tcaption".encode()
        assert check_data.examine((index, line), limits).size == expected.shape[:2]


def test_check_data_reports_profiles_and_images_without_contrast(tmp_path, capsys):
    profile = image_files.rgb_profile(image_files.DISPLAY_P3, 2.2, "Display P3")
    dark = np.array([[0, 4095] * 32] * 64)  # 12-bit samples in a file of 16 bits
    files = {
        "a.png": image_files.saved(image_files.IMAGE, "PNG", icc_profile=profile),
        "b.png": image_files.saved(image_files.IMAGE, "PNG"),
        "dark.png": image_files.png(dark, 16, 0),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "a.tsv").write_text("".join(f"{name}\tcaption {name}\n" for name in files))

    cli.run(["check-data", str(tmp_path / "a.tsv"), "--base-dir", str(tmp_path), "--workers", "0", "--min-side", "1"])
    output = capsys.readouterr().out
    assert "Display P3          1 ####" in output
    assert "none          2 ####" in output
    assert "no contrast: line 3: dark.png: all pixels are within 15 of 255 levels; it counts as valid" in output
    assert "1 of 3 images have no contrast" in output
    assert "3 valid lines, 0 with problems" in output


# ---- names ----


def test_shards_know_the_suffixes_of_all_formats():
    expected = {"jfif", "jpe", "jpg", "jpeg", "png", "apng", "pgm", "ppm", "j2k", "jp2", "tif", "tiff", "webp", "qoi"}
    assert expected <= image_decode.SUFFIXES
    assert not {"txt", "json", "eps", "pdf"} & image_decode.SUFFIXES


def test_warnings_of_libraries_carry_the_name_of_the_image(monkeypatch):
    shown = []
    monkeypatch.setattr(image_decode, "show_warning", lambda message, *args, **kwargs: shown.append(message))
    monkeypatch.setattr(warnings, "showwarning", image_decode.show_warning_with_name)
    with image_decode.naming("a.jpg"):
        warnings.warn("corrupt data", stacklevel=1)
    warnings.warn("other", stacklevel=1)
    assert [str(message) for message in shown] == ["a.jpg: corrupt data", "other"]


# ---- scripts/compare_decoders.py ----


@pytest.fixture(scope="module")
def compare_decoders() -> dict:
    return runpy.run_path(str(ROOT / "scripts" / "compare_decoders.py"))


def test_the_script_checks_files_against_expected_pixels(compare_decoders, tmp_path, capsys):
    image_files.write(tmp_path, CASES)
    expected = tmp_path / "expected.json"
    command = [str(tmp_path), "--expected", str(expected)]
    assert compare_decoders["main"](command) == 0
    output = capsys.readouterr().out
    assert f"{len(CASES):8d} files" in output
    assert f"{sum(bool(case.error) for case in CASES):8d} refused" in output
    assert "expectations" not in output

    # a wrong pixel, a file that should be refused, one that should not
    facts = json.loads(expected.read_text())
    facts["black.png"]["pixels"]["0,0"] = [9, 9, 9]
    facts["mid_grey.jpg"] = facts["float.tif"]
    facts["float.tif"] = facts["black.png"]
    expected.write_text(json.dumps(facts))
    assert compare_decoders["main"](command) == 1
    output = capsys.readouterr().out
    assert "wrong: black.png: pixel 0,0 is [0, 0, 0], should be [9, 9, 9]" in output
    assert "wrong: mid_grey.jpg: should be refused" in output
    assert "wrong: float.tif: should be read" in output
    assert "       3 expectations not met" in output


def test_the_script_agrees_with_libvips(compare_decoders, tmp_path):
    pytest.importorskip("pyvips")
    for case in CASES:
        if case.error or "thumbnail" in case.name or "significant" in case.name:
            continue  # libvips reads the first page, and knows no significant bits
        path = tmp_path / case.name
        path.write_bytes(case.content)
        other, reason = compare_decoders["libvips"](path)
        if not reason:
            assert compare_decoders["compare"](compare_decoders["ours"](path)[0], other, 3) == "", case.name
