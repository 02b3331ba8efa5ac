"""A TSV manifest of pictures and captions, cut to aspect-ratio buckets; its order is a function of (seed, step)."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from selfe.draws import generator
from selfe.types import Batch, UserError

DAMAGE = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)  # of a picture file


@dataclass(frozen=True)
class Entry:
    """A line of a manifest."""

    where: str  # "FILE, line N"
    path: Path
    prompt: str


class ManifestData:
    """Lines `path<TAB>prompt`; every picture once per epoch, in a new order each epoch.

    A picture goes to the bucket of the nearest aspect ratio: scaled so that it just covers it, then cut at the centre.
    """

    def __init__(
        self,
        train_manifest: str,
        base_dir: str = ".",
        val_manifest: str | None = None,
        pixels: int = 65536,
        multiple: int = 16,
        max_aspect: float = 2.0,
    ):
        """
        Args:
            train_manifest: a UTF-8 file with a line per picture.
            base_dir: where relative picture paths start.
            val_manifest: the same for validation, used in the file's order.
            pixels: height x width of a bucket is at most this.
            multiple: height and width are multiples of this: 8 (autoencoder) x 2 (patches).
            max_aspect: of the longest bucket.
        """
        if pixels < multiple**2:
            raise ValueError(f"pixels {pixels} is less than {multiple} x {multiple}; give at least {multiple**2}")
        if max_aspect < 1:
            raise ValueError(f"max_aspect must be at least 1, got {max_aspect}")
        self.buckets = buckets(pixels, multiple, max_aspect)
        self.entries = {"train": read_manifest(Path(train_manifest), Path(base_dir))}
        if val_manifest:
            self.entries["val"] = read_manifest(Path(val_manifest), Path(base_dir))

    @property
    def has_val(self) -> bool:
        return "val" in self.entries

    def batch(self, seed: int, step: int, total: int, positions: range, split: Literal["train", "val"]) -> Batch:
        """These positions of the step's global batch of `total` samples; sample step x total + position of the run."""
        entries = self.entries[split]
        chosen = []
        for position in positions:
            epoch, place = divmod(step * total + position, len(entries))
            chosen.append(entries[order(seed, epoch, len(entries))[place] if split == "train" else place])
        return Batch(
            images=tuple(self.load(entry) for entry in chosen),
            prompts=tuple(entry.prompt for entry in chosen),
            positions=tuple(positions),
            names=tuple(str(entry.path) for entry in chosen),
        )

    def load(self, entry: Entry) -> Tensor:
        """(3, height, width) in [-1, 1], cut to the nearest bucket."""
        image = read_image(entry)
        height, width = nearest(self.buckets, image.height, image.width)
        image = ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def order(seed: int, epoch: int, length: int) -> np.ndarray:
    """A permutation of the lines."""
    return generator(seed, "epoch", epoch).permutation(length)


def read_manifest(path: Path, base_dir: Path) -> list[Entry]:
    """Every line of a manifest, checked; blank lines are left out."""
    if not path.is_file():
        raise UserError(f"{path}: no such manifest; set data.params.train_manifest (or val_manifest) to a TSV file")
    entries = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        where = f"{path}, line {number}"
        try:
            name, *prompt = line.decode("utf-8-sig" if number == 1 else "utf-8").split("\t")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 at byte {error.start} of the line; save the file as UTF-8") from error
        if not name.strip() and not prompt:
            continue
        if len(prompt) != 1:
            raise UserError(f"{where}: expected path, one tab, prompt; found {len(prompt)} tabs in {preview(line)}")
        if not name.strip() or not prompt[0].strip():
            raise UserError(f"{where}: path or prompt is empty in {preview(line)}; give both")
        entries.append(Entry(where, base_dir / name.strip(), prompt[0].strip()))
    if not entries:
        raise UserError(f"{path}: the manifest is empty; write a line per picture: path, tab, prompt")
    return entries


def preview(line: bytes) -> str:
    return repr(line[:60].decode(errors="replace"))


def read_image(entry: Entry) -> Image.Image:
    """A picture as RGB: upright as its EXIF data say, transparency on white, 16-bit grey scaled to 8."""
    if not entry.path.is_file():
        raise UserError(f"{entry.where}: {entry.path}: no such image; mend the line or data.params.base_dir")
    try:
        with Image.open(entry.path) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except DAMAGE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{entry.where}: {entry.path}: cannot be decoded ({reason}); replace the image or remove the line"
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, which `convert` would clip
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("32-bit floating point pixels have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def buckets(pixels: int, multiple: int, max_aspect: float) -> tuple[tuple[int, int], ...]:
    """(height, width) pairs up to `max_aspect`: the largest of every height, and with the two exchanged."""
    longest = int(math.sqrt(pixels * max_aspect))
    found = set()
    for height in range(multiple, longest + 1, multiple):
        width = pixels // height // multiple * multiple
        if width and max(height, width) <= max_aspect * min(height, width):
            found |= {(height, width), (width, height)}
    side = math.isqrt(pixels) // multiple * multiple
    return tuple(sorted(found | {(side, side)}))


def nearest(buckets: tuple[tuple[int, int], ...], height: int, width: int) -> tuple[int, int]:
    """The bucket whose aspect ratio is nearest, measured in logarithms."""
    aspect = math.log(height / width)
    return min(buckets, key=lambda bucket: (abs(math.log(bucket[0] / bucket[1]) - aspect), -bucket[0] * bucket[1]))
