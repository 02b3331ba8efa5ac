"""Read every image of a folder as training does, and compare with libvips and with pixels that are known to be right.

    .venv/bin/python scripts/compare_decoders.py FOLDER
    .venv/bin/python scripts/compare_decoders.py FOLDER --expected FOLDER/expected.json

libvips is an independent reader with its own decoders. It is used if pyvips is installed:

    uv pip install "pyvips[binary]"

Prints a line for each file that training refuses, or that libvips reads differently, and a summary. The other reader is
not always right: see "Image files" in docs/data.md for what this project does on purpose.

expected.json maps a file name to {"refuse": true}, or to its upright "size" (height, width), "pixels" ("row,column" to
red, green, blue) and "tolerance" (levels of 255). Exit code 1 if a file does not meet its expectations.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from selfe.errors import BadSample, UserError
from selfe.io import image_decode

try:
    import pyvips
except (ImportError, OSError):  # not installed, or the library behind it is not
    pyvips = None


def ours(path: Path) -> tuple[np.ndarray | None, str, str]:
    """Pixels (height, width, 3), name of the colour profile, and the reason if the file is refused."""
    try:
        height_width = image_decode.size(path, path.name)
        image, profile = image_decode.decode(path, path.name)
    except BadSample as problem:
        return None, "", str(problem)
    if height_width != (image.height, image.width):
        raise RuntimeError(f"{path}: the header gives {height_width}, the decoder {image.size[::-1]}; please report")
    return np.asarray(image).astype(int), profile, ""


def libvips(path: Path) -> tuple[np.ndarray | None, str]:
    """Pixels (height, width, 3), upright, in sRGB and on white, and the reason if libvips refuses the file."""
    try:
        image = pyvips.Image.new_from_file(str(path), fail_on="warning").autorot()
        if image.get_typeof("icc-profile-data"):
            image = image.icc_transform("srgb", embedded=True, intent="relative", depth=8)
        image = image.colourspace("srgb")
        if image.hasalpha():
            image = image.flatten(background=255)
        pixels = image.cast("uchar").numpy()
    except pyvips.Error as error:
        return None, str(error).splitlines()[0]
    return np.broadcast_to(pixels.reshape(*pixels.shape[:2], -1), (*pixels.shape[:2], 3)).astype(int), ""


def compare(pixels: np.ndarray | None, other: np.ndarray | None, tolerance: float) -> str:
    """How two readers differ; empty if their mean difference is at most `tolerance` levels."""
    if pixels is None and other is None:
        return ""
    if pixels is None:
        return "refused by training only"
    if other is None:
        return "refused by libvips only"
    if pixels.shape != other.shape:
        return f"size {pixels.shape[:2]}, libvips {other.shape[:2]}"

    difference = np.abs(pixels - other)
    if difference.mean() <= tolerance:
        return ""
    return f"mean difference {difference.mean():.1f}, largest {difference.max()}"


def unmet(pixels: np.ndarray | None, expected: dict) -> str:
    """The first expectation that a file does not meet, or nothing."""
    if expected.get("refuse"):
        return "" if pixels is None else "should be refused"
    if pixels is None:
        return "should be read"
    if pixels.shape[:2] != tuple(expected["size"]):
        return f"size {pixels.shape[:2]} should be {tuple(expected['size'])}"

    for place, colour in expected["pixels"].items():
        row, column = map(int, place.split(","))
        if np.abs(pixels[row, column] - colour).max() > expected["tolerance"]:
            return f"pixel {place} is {pixels[row, column].tolist()}, should be {list(colour)}"
    return ""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with image files; subfolders are searched")
    parser.add_argument("--expected", type=Path, help="JSON file of sizes and pixels")
    parser.add_argument("--tolerance", type=float, default=1, help="largest mean difference in levels of 255")
    options = parser.parse_args(arguments)

    expectations = json.loads(options.expected.read_text()) if options.expected else {}
    paths = sorted(path for path in options.folder.rglob("*") if path.is_file() and path.suffix != ".json")
    if not paths:
        raise UserError(f"{options.folder}: no files; give a folder of images")

    counts, profiles, failed = Counter(), Counter(), False
    for path in paths:
        pixels, profile, reason = ours(path)
        counts["files"] += 1
        counts["refused"] += pixels is None
        if reason:
            print(f"refused: {reason}")
        else:
            profiles[profile] += 1

        if pyvips:
            other, other_reason = libvips(path)
            difference = compare(pixels, other, options.tolerance)
            counts["different from libvips"] += bool(difference)
            if difference:
                print(f"different: {path.name}: {difference}" + (f" ({other_reason})" if other_reason else ""))

        if path.name in expectations and (problem := unmet(pixels, expectations[path.name])):
            counts["expectations not met"] += 1
            failed = True
            print(f"wrong: {path.name}: {problem}")

    print("\n".join(f"{count:8d} {name}" for name, count in counts.items()))
    print("colour profiles: " + ", ".join(f"{count} {name}" for name, count in profiles.most_common()))
    if not pyvips:
        print('libvips is not installed (uv pip install "pyvips[binary]"); nothing was compared with it')
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
