"""Features of images, computed once in files of `CHUNK` images on any number of processes.

A file is named by a digest of what decides its content: the extractor, its weights, the images and their captions. A
file that exists is complete and is not computed again, so an interrupted evaluation resumes, and several evaluations
share their features. The files of a set are the same for any number of processes; they are read one at a time.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from selfe.device import to_device
from selfe.errors import UserError
from selfe.evaluation.image_sets import ImageSet, evenly_spaced
from selfe.io import image_encode
from selfe.protocols import Extractor
from selfe.types import signed

CHUNK = 256  # images or captions per file
READERS = 4  # threads that decode images
CONTENT = "content"  # name of the digests of the pixels in a file


@dataclass(frozen=True)
class Chunk:
    """Consecutive images or captions of a set, and the file of their features."""

    file: Path
    start: int
    stop: int


@dataclass(frozen=True)
class FeatureSet:
    """The features of a set of images, in files that exist."""

    chunks: tuple[Chunk, ...]
    device: torch.device

    def __len__(self) -> int:
        return self.chunks[-1].stop if self.chunks else 0

    def names(self) -> set[str]:
        """What the extractor returned."""
        return set(load_file(self.chunks[0].file)) - {CONTENT}

    def blocks(self, name: str = "features") -> Iterator[Tensor]:
        """All rows in order, float64 (n, d) each, on the device."""
        for chunk in self.chunks:
            with safe_open(chunk.file, "pt") as file:  # reads one output, maps are much larger than features
                rows = file.get_tensor(name)
            yield to_device(rows.double(), self.device)

    def all(self, name: str) -> Tensor:
        """Everything in one tensor (n, ...): for scores, and for features of bounded sets."""
        return torch.cat(list(self.blocks(name)))

    def some(self, most: int, name: str = "features") -> tuple[Tensor, Tensor]:
        """At most `most` evenly spaced rows (n, d), and their indices (n,)."""
        indices = torch.tensor(evenly_spaced(len(self), most))
        rows = []
        for chunk, block in zip(self.chunks, self.blocks(name), strict=True):
            mine = indices[(indices >= chunk.start) & (indices < chunk.stop)] - chunk.start
            rows.append(block[to_device(mine, self.device)])
        return torch.cat(rows), indices

    def digest(self) -> str:
        """Identifies the pixels of all images and their order."""
        digest = hashlib.blake2b(digest_size=8)
        for chunk in self.chunks:
            digest.update(load_file(chunk.file)[CONTENT].numpy().tobytes())
        return digest.hexdigest()


class FeatureFolder:
    """Computes the features of one extractor into a folder."""

    def __init__(
        self,
        folder: Path,
        name: str,
        extractor: Extractor,
        record: dict[str, Any],
        batch_size: int,
        section: str = "evaluation",
    ):
        """
        Args:
            folder: for the files.
            name: of the extractor, in error messages.
            record: `extractor.record()`.
            batch_size: images per call of the extractor.
            section: the section of the config, in error messages.
        """
        self.folder, self.name, self.extractor, self.batch_size = folder, name, extractor, batch_size
        self.where = f"{section}.extractors.{name}"
        self.identity = json.dumps(record, sort_keys=True)
        self.is_loaded = False

    def load(self, device: torch.device) -> None:
        """Load the extractor, unless it is."""
        if not self.is_loaded:
            self.extractor.load(device)
            self.is_loaded = True

    # ---- files ----

    def of_images(self, images: ImageSet) -> list[Chunk]:
        """The files of a set of images, whether they exist or not."""
        keys = ((images.size, images.stamp(index)) for index in range(len(images)))
        return self.chunks("images", keys)

    def of_captions(self, captions: Sequence[str]) -> list[Chunk]:
        """The files of captions, whether they exist or not."""
        return self.chunks("texts", captions)

    def chunks(self, kind: str, keys: Iterable[Any], size: int | None = None) -> list[Chunk]:
        """The files of what these keys identify, `size` (default: `CHUNK`) in each."""
        keys, chunks, start = iter(keys), [], 0
        while some := list(islice(keys, size or CHUNK)):
            text = json.dumps([self.identity, kind, some], ensure_ascii=False)
            name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
            chunks.append(Chunk(self.folder / f"{name}.safetensors", start, start + len(some)))
            start += len(some)
        return chunks

    # ---- computation ----

    def compute_images(self, chunk: Chunk, images: ImageSet) -> None:
        """Compute and write a file of images."""
        with ThreadPoolExecutor(READERS, "read images") as threads:
            self.compute(chunk, threads.map(images.read, range(chunk.start, chunk.stop)))

    def compute(self, chunk: Chunk, pairs: Iterator[tuple[Tensor, str]]) -> None:
        """Compute and write a file of images that are given, with their captions."""
        rows: dict[str, list[Tensor]] = {CONTENT: []}
        while some := list(islice(pairs, self.batch_size)):
            batch, captions = zip(*some, strict=True)
            rows[CONTENT].append(torch.stack([digest_of(image) for image in batch]))
            for name, values in self.extract(batch, captions).items():
                rows.setdefault(name, []).append(values)
        self.save(chunk, {name: torch.cat(values) for name, values in rows.items()})

    def extract(self, batch: Sequence[Tensor], captions: Sequence[str]) -> dict[str, Tensor]:
        """The extractor's output on the host, checked. Raises UserError."""
        with torch.no_grad():
            output = self.extractor([signed(image) for image in batch], captions)
        checked = {}
        for name, values in output.items():
            self.check(values, name, len(batch), dims=2 if name in ("features", "aligned", "maps") else 1)
            checked[name] = values.detach().float().cpu().contiguous()
        if "features" not in checked or CONTENT in checked:
            problem = "returns no `features`" if "features" not in checked else f"returns the reserved name {CONTENT}"
            raise UserError(f"{self.where}: {problem}; see selfe.protocols.Extractor")
        return checked

    def compute_captions(self, chunk: Chunk, captions: Sequence[str]) -> None:
        """Compute and write a file of captions."""
        rows = []
        mine = captions[chunk.start : chunk.stop]
        for first in range(0, len(mine), self.batch_size):
            batch = mine[first : first + self.batch_size]
            with torch.no_grad():
                values = self.extractor.texts(batch)
            self.check(values, "texts", len(batch), dims=2)
            rows.append(values.detach().float().cpu())
        self.save(chunk, {"texts": torch.cat(rows)})

    def check(self, values: Tensor, name: str, count: int, dims: int) -> None:
        """Raise UserError unless values have a row per image and are finite."""
        where = f"{self.where}: {name}"
        if values.ndim != dims or len(values) != count:
            shape = f"({count}, d)" if dims == 2 else f"({count},)"
            raise UserError(f"{where} of {count} inputs must have the shape {shape}, got {tuple(values.shape)}")
        if not values.isfinite().all():
            raise UserError(f"{where} is not finite; the weights of the extractor may be damaged")

    def save(self, chunk: Chunk, tensors: dict[str, Tensor]) -> None:
        """Write a file atomically; another evaluation that shares the folder may be writing the same one."""
        chunk.file.parent.mkdir(parents=True, exist_ok=True)
        partial = chunk.file.with_suffix(f".{uuid.uuid4().hex}{image_encode.PARTIAL}")
        partial.write_bytes(save(tensors))
        partial.replace(chunk.file)


def digest_of(image: Tensor) -> Tensor:
    """16 bytes that identify the pixels of an image (3, H, W)."""
    digest = hashlib.blake2b(repr(tuple(image.shape)).encode(), digest_size=16)
    digest.update(image.contiguous().numpy().tobytes())
    return torch.from_numpy(np.frombuffer(digest.digest(), np.uint8).copy())
