"""Build the emoji data set of debug_data/emoji: 64 x 64 pixel images in four drawing styles, with captions.

    .venv/bin/python scripts/studies/emoji/build.py --out DIR                   fetch the packages with `npm pack`
    .venv/bin/python scripts/studies/emoji/build.py --out DIR --tarballs DIR    read tarballs fetched before

The same versions of resvg-py and of Pillow's libwebp give the same bytes.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from PIL import Image

from selfe import log
from selfe.errors import UserError

RESVG = "resvg-py==0.5.0"
SIDE = 64  # pixels
HELD_OUT_CONCEPTS, HELD_OUT_PAIRS = 0.03, 0.10
PRESENTATION = "FE0F"  # variation selector: an emoji, not a letter; the packages differ in where they have it


@dataclass(frozen=True)
class Package:
    """An npm package. `integrity` is npm's: the SHA-512 of the tarball in base 64."""

    name: str
    version: str
    integrity: str

    @property
    def tarball(self) -> str:
        """The file name that `npm pack` chooses."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


LABELS = Package(
    "emojibase-data",
    "17.0.0",
    "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
)
# by the name of the style in captions
DRAWINGS = {
    "noto": Package(
        "@iconify-json/noto",
        "1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
    "twemoji": Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
    ),
    "fluent flat": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    ),
    "openmoji": Package(
        "@iconify-json/openmoji",
        "1.2.29",
        "vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
    ),
}


@dataclass
class Concept:
    """An emoji, and its drawings as WebP files by style."""

    hexcode: str  # code points, such as 1F98A
    label: str
    tags: list[str]
    images: dict[str, bytes] = field(default_factory=dict)

    def captions(self, style: str) -> list[str]:
        """The label with the style, the label alone, and the tags with the style if there are any."""
        captions = [f"{self.label}, {style}", self.label]
        if self.tags:
            captions.append(", ".join([*self.tags, style]))
        return captions


# ---- packages ----


def fetch(packages: Iterable[Package], folder: Path) -> None:
    """Download the tarballs into `folder`. Raises UserError if npm is missing or fails."""
    npm = shutil.which("npm")
    if npm is None:
        raise UserError("npm is not installed; install it, or give a folder of the tarballs with --tarballs")
    for package in packages:
        name = f"{package.name}@{package.version}"
        done = subprocess.run([npm, "pack", name, "--silent"], cwd=folder, stdout=subprocess.DEVNULL)
        if done.returncode:
            raise UserError(f"npm pack {name} failed; run it by hand, and give its folder with --tarballs")


def read_package(folder: Path, package: Package, *names: str) -> list[dict | list]:
    """JSON files of a package. Raises UserError if the tarball is missing or is not the expected one."""
    path = folder / package.tarball
    if not path.is_file():
        raise UserError(f"{path}: no such file; run npm pack {package.name}@{package.version} in its folder")
    content = path.read_bytes()
    if base64.b64encode(hashlib.sha512(content).digest()).decode() != package.integrity:
        raise UserError(f"{path}: is not {package.name} {package.version} (its SHA-512 differs); fetch it again")

    with tarfile.open(fileobj=BytesIO(content)) as members:
        return [json.load(members.extractfile(f"package/{name}")) for name in names]


def plain(hexcode: str) -> str:
    """Code points without the variation selector, in capitals, to compare those of two packages."""
    return "-".join(code for code in hexcode.upper().split("-") if code != PRESENTATION)


# ---- images ----


def renderer():
    """The package that renders SVG. Raises UserError if it is missing."""
    try:
        import resvg_py
    except ImportError as error:
        raise UserError(f"resvg-py is not installed; run uv pip install {RESVG}") from error
    return resvg_py


def render(icon: dict, icons: dict) -> bytes:
    """A lossless WebP file of an icon, centred in a white square of `SIDE` pixels.

    `icons` has the default width and height. Lossy files of quality 90 would be larger.
    """
    width, height = (icon.get(side, icons[side]) for side in ("width", "height"))
    longest = max(width, height)
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{(width - longest) / 2} {(height - longest) / 2} {longest} {longest}" width="{SIDE}" '
        f'height="{SIDE}">{icon["body"]}</svg>'
    )
    png = renderer().svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, background="#ffffff", skip_system_fonts=True)

    file = BytesIO()
    Image.open(BytesIO(png)).convert("RGB").save(file, "WEBP", lossless=True, quality=100, method=6)
    return file.getvalue()


def read_concepts(folder: Path, labels: Package, drawings: dict[str, Package]) -> list[Concept]:
    """All emoji that one of the sets has, sorted by code points. Skin tones are entries of their own, not read here."""
    (entries,) = read_package(folder, labels, "en/data.json")
    concepts = [Concept(entry["hexcode"], entry["label"], entry.get("tags", [])) for entry in entries]
    concepts.sort(key=lambda concept: concept.hexcode)

    for style, package in drawings.items():
        icons, characters = read_package(folder, package, "icons.json", "chars.json")
        names = {plain(hexcode): name for hexcode, name in characters.items()}
        for concept in concepts:
            name = names.get(plain(concept.hexcode))
            if name in icons["icons"]:
                concept.images[style] = render(icons["icons"][name], icons)
        log.print_line(f"{style}: {sum(style in concept.images for concept in concepts)} images")
    return [concept for concept in concepts if concept.images]


# ---- splits ----


def fraction(name: str) -> float:
    """A number in [0, 1) that depends on the name alone, so that more emoji do not change the splits of others."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def repeated_images(concepts: Iterable[Concept]) -> set[str]:
    """Hexcodes of concepts that have an image in common with another one, such as the flags of Norway and Svalbard."""
    owners = defaultdict(set)
    for concept in concepts:
        for image in concept.images.values():
            owners[image].add(concept.hexcode)
    return {hexcode for hexcodes in owners.values() if len(hexcodes) > 1 for hexcode in hexcodes}


def splits(concept: Concept, repeated: bool) -> dict[str, str]:
    """The split of each style: train, held_out_pairs or held_out_concepts.

    A concept with a repeated image is not held out: the same image would be trained under another label. A pair is only
    held out if its concept is trained in another style.
    """
    styles = list(concept.images)
    if repeated:
        return dict.fromkeys(styles, "train")
    if fraction(concept.hexcode) < HELD_OUT_CONCEPTS:
        return dict.fromkeys(styles, "held_out_concepts")

    places = {style: fraction(f"{concept.hexcode} {style}") for style in styles}
    trained = max(places, key=places.get)
    return {
        style: "held_out_pairs" if place < HELD_OUT_PAIRS and style != trained else "train"
        for style, place in places.items()
    }


# ---- files ----


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Append a member without owner, mode or time of the machine."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, BytesIO(content))


def as_json(value: dict) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def build(folder: Path, out: Path, labels: Package, drawings: dict[str, Package]) -> Counter:
    """Read the tarballs of `folder`, write the shards and index.jsonl to `out`. Returns counts by (split, style)."""
    concepts = read_concepts(folder, labels, drawings)
    repeated = repeated_images(concepts)
    shards, lines, counts = defaultdict(list), [], Counter()

    for concept in concepts:
        places = splits(concept, concept.hexcode in repeated)
        for style, split in places.items():
            dashed = style.replace(" ", "-")
            # one file per style for training: styles have different licences
            shard = f"train-{dashed}.tar" if split == "train" else f"{split}.tar"
            captions = concept.captions(style)
            sample = {"caption": captions[0], "captions": captions}
            shards[shard].append((f"{concept.hexcode}_{dashed}", concept.images[style], as_json(sample)))
            counts[split, style] += 1

        entry = {"hexcode": concept.hexcode, "label": concept.label, "tags": concept.tags, "splits": places}
        lines.append(as_json(entry) + "\n")

    out.mkdir(parents=True, exist_ok=True)
    for shard, samples in shards.items():
        with tarfile.open(out / shard, "w", format=tarfile.GNU_FORMAT) as tar:
            for name, image, sample in samples:
                add(tar, f"{name}.webp", image)
                add(tar, f"{name}.json", sample.encode())
    (out / "index.jsonl").write_text("".join(lines), encoding="utf-8")
    return counts


def archive(folder: Path, path: Path) -> None:
    """Pack the shards of a folder into one .tar.xz file: the headers of a tar file take more space than the images."""
    with tarfile.open(path, "w:xz", format=tarfile.GNU_FORMAT, preset=6) as tar:
        for shard in sorted(folder.glob("*.tar")):
            add(tar, shard.name, shard.read_bytes())


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards and index.jsonl")
    parser.add_argument("--tarballs", type=Path, help="folder with the tarballs of the five packages")
    parser.add_argument("--archive", type=Path, help="also pack the shards into this .tar.xz file")
    options = parser.parse_args(arguments)
    renderer()  # a missing package is reported before anything is fetched

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.tarballs or Path(temporary)
        if options.tarballs is None:
            fetch([LABELS, *DRAWINGS.values()], folder)
        counts = build(folder, options.out, LABELS, DRAWINGS)
    if options.archive:
        archive(options.out, options.archive)
    for (split, style), count in sorted(counts.items()):
        log.print_line(f"{split}, {style}: {count}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
