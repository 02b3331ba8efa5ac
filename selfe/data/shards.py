"""Tar files in the WebDataset layout: an image and a text file with the same name up to the first dot form a sample.

Read by random access through an index of all members, so that order, mixing and resuming work as for a manifest.
"""

from __future__ import annotations

import glob
import os
import sys
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from selfe.data import index
from selfe.data.dataset import BucketedDataset
from selfe.io import image_decode
from selfe.types import BadSample, UserError

FIELDS = "shard:<u4 image:<u8 image_bytes:<u4 prompt:<u8 prompt_bytes:<u4 height:<u2 width:<u2"  # sizes as in `index`
RECORD = np.dtype([tuple(field.split(":")) for field in FIELDS.split()])
IMAGES = image_decode.SUFFIXES | {"img"}  # `make-shards` calls files of other suffixes .img
PROMPT = "txt"


class ShardData(BucketedDataset):
    """As `ManifestData`, with glob patterns such as `shards/train-*.tar` as `train_manifest` and `val_manifest`."""

    def open(self, path: Path, base_dir: Path) -> Shards:
        return Shards(path, self.max_pixels, self.index_dir, self.on_bad_image == "error", self.convert_icc)


class Shards:
    """The samples of all tar files that match a pattern, by index, files in the order of their names."""

    def __init__(
        self,
        pattern: Path,
        max_pixels: int,
        index_dir: Path | None = None,
        strict: bool = True,
        convert_icc: bool = True,
    ):
        self.pattern, self.max_pixels, self.index_dir, self.strict = pattern, max_pixels, index_dir, strict
        self.convert_icc = convert_icc
        self.tars = [Path(path) for path in sorted(glob.glob(str(pattern)))]
        if not self.tars:
            raise UserError(
                f"{pattern}: no such tar file; set data.params.train_manifest to a pattern such as a/b-*.tar"
            )

        self.opened = lru_cache(maxsize=64)(lambda number: self.tars[number].open("rb", buffering=0))

        facts = [(tar.name, tar.stat().st_size, tar.stat().st_mtime_ns) for tar in self.tars]
        key = index.stamp(RECORD, facts, max_pixels)
        self.records = index.load(self.tars[0], key, index_dir, RECORD, self.scan, self.measure)

    def __reduce__(self) -> tuple:
        return Shards, (self.pattern, self.max_pixels, self.index_dir, self.strict, self.convert_icc)

    def __len__(self) -> int:
        return len(self.records)

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        return self.records.sizes(indices)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return self.records.take(indices)["prompt_bytes"].astype(np.int64)

    def prompt(self, index: int) -> str:
        try:
            prompt = self.bytes_of(index, "prompt").decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            message = f"{self.name(index)}: the text is not UTF-8 at byte {error.start}; write the shard again"
            raise BadSample("invalid UTF-8", message) from error
        if not prompt:
            raise BadSample("empty caption", f"{self.name(index)}: empty text; write the shard without it")
        return prompt

    def name(self, index: int) -> str:
        record = self.records[index]
        return f"{self.tars[record['shard']]}, image at byte {record['image']}"

    def image(self, index: int, enough: int | None) -> Image.Image:
        file = BytesIO(self.bytes_of(index, "image"))
        return image_decode.read(file, self.name(index), self.max_pixels, enough, self.convert_icc)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) in pixels, from the image header."""
        return image_decode.size(BytesIO(self.bytes_of(index, "image")), self.name(index), self.max_pixels)

    def digest(self) -> str:
        """Digest of the names and sizes of the tar files and of up to 1024 evenly spaced records."""
        some = np.unique(np.linspace(0, len(self) - 1, 1024).astype(np.int64))
        return index.stamp([(tar.name, tar.stat().st_size) for tar in self.tars], self.records.take(some).tolist())

    def bytes_of(self, index: int, part: str) -> bytes:
        """The content of one member of a sample; `part` is `image` or `prompt`."""
        record = self.records[index]
        file = self.opened(int(record["shard"]))
        return os.pread(file.fileno(), int(record[f"{part}_bytes"]), int(record[part]))

    def measure(self, records: np.ndarray) -> None:
        self.records = records  # needed by `size`, which reads members by index
        index.measure(records, self.size, self.pattern.name, self.strict)

    def scan(self, out: Path) -> None:
        """Write one record per sample, from the tar headers of all members."""
        with out.open("wb") as file:
            for number, tar in enumerate(tqdm(self.tars, desc="tar files", disable=not sys.stderr.isatty())):
                np.array(list(self.samples(number, tar)), RECORD).tofile(file)
        if not out.stat().st_size:
            raise UserError(f"{self.pattern}: no images; a sample is NAME.jpg (or .png, .webp ...) and NAME.{PROMPT}")

    def samples(self, number: int, tar: Path) -> Iterator[tuple]:
        """The records of one tar file, in the order of the first member of each sample.

        Raises:
            UserError: the tar file is truncated or compressed.
            BadSample: kind `incomplete`, in strict mode: a sample has no image or no text.
        """
        found: dict[str, dict[str, tuple[int, int]]] = {}

        # read member headers only
        try:
            with tarfile.open(tar, "r:") as members:
                for member in members:
                    folder, _, base = member.name.rpartition("/")
                    stem, _, suffix = base.partition(".")
                    suffix = suffix.lower()
                    part = "image" if suffix in IMAGES else "prompt" if suffix == PROMPT else None
                    if part and member.isfile():
                        found.setdefault(f"{folder}/{stem}", {})[part] = (member.offset_data, member.size)
        except (tarfile.TarError, OSError) as error:
            raise UserError(
                f"{tar}: not a complete, uncompressed tar file ({error}); write or download it again"
            ) from error

        # incomplete samples are recorded with zero bytes unless strict
        for stem, parts in found.items():
            if self.strict and (missing := {"image", "prompt"} - parts.keys()):
                lacks = "image" if "image" in missing else f".{PROMPT}"
                raise BadSample("incomplete", f"{tar}: {stem.lstrip('/')}: has no {lacks}; write the shard again")
            yield (number, *parts.get("image", (0, 0)), *parts.get("prompt", (0, 0)), 0, 0)
