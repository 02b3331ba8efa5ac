"""The images that are evaluated: those of a sampling job, one set per sampling setting, and those of a reference."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from selfe import config
from selfe.data.dataset import BucketedDataset, Source
from selfe.data.manifest import Manifest
from selfe.data.shards import Shards
from selfe.errors import UserError
from selfe.io import image_decode
from selfe.protocols import Data
from selfe.types import Split

MANIFESTS = (".tsv", ".csv", ".jsonl")
# of an image's metadata: what differs between images of one set, and where the set is
PER_IMAGE = ("file", "prompt", "negative_prompt", "category", "seed", "sample", "height", "width", "checkpoint")


class ImageSet(Protocol):
    """Images by index, with captions."""

    size: tuple[int, int] | None  # height and width to which images are fitted; None: unchanged

    def __len__(self) -> int: ...

    def stamp(self, index: int) -> tuple:
        """Changes when the file of an image or its caption changes; known without decoding the image."""
        ...

    def caption(self, index: int) -> str:
        """The caption of an image; empty if the set has none."""
        ...

    def read(self, index: int) -> tuple[Tensor, str]:
        """Pixels (3, H, W), uint8 or in [-1, 1], and caption."""
        ...


@dataclass(frozen=True)
class Cell:
    """The images of a sampling job with one sampling setting, in the order of the job's prompts."""

    folder: Path
    settings: dict[str, Any]  # weights, num_steps, cfg_scale, s_ratio, the sampler and its parameters, the checkpoint
    images: list[dict] = field(repr=False)  # of their lines of metadata.jsonl, what is not in `settings`
    size: tuple[int, int] | None = None  # images have the size at which they were generated

    def __len__(self) -> int:
        return len(self.images)

    def stamp(self, index: int) -> tuple:
        path = self.path(index)
        try:
            status = path.stat()
        except FileNotFoundError as error:
            raise UserError(
                f"{path}: no such image, though metadata.jsonl lists it; run selfe infer again, which generates what "
                "is missing"
            ) from error
        return path.name, status.st_size, status.st_mtime_ns, self.images[index]["prompt"]

    def caption(self, index: int) -> str:
        return self.images[index]["prompt"]

    def read(self, index: int) -> tuple[Tensor, str]:
        path = self.path(index)
        return as_tensor(image_decode.read(path, str(path))), self.caption(index)

    def path(self, index: int) -> Path:
        return self.folder / self.images[index]["file"]

    def record(self) -> dict[str, Any]:
        """What numbers of this cell are about, besides its sampling settings: prompts, noise and image sizes."""
        prompts = [(image["prompt"], image["negative_prompt"]) for image in self.images]
        noise = [(image["seed"], image["sample"]) for image in self.images]
        sizes = sorted({(image["height"], image["width"]) for image in self.images})
        return {
            "count": len(self.images),
            "prompts": digest(prompts),
            "seeds": sorted({seed for seed, _ in noise}),
            "noise": digest(noise),
            "sizes": [list(size) for size in sizes],
        }


def read_job(folder: Path) -> list[Cell]:
    """The cells of a sampling job's folder, in the order of weights, guidance, s ratio and number of steps.

    Raises:
        UserError: the folder is not that of a finished job.
    """
    path = folder / "metadata.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the folder of a finished sampling job (inferencer.output_dir)")

    # settings of a cell, and what differs between its images
    by_settings: dict[str, tuple[dict, list[dict]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line:
            continue
        try:
            record = json.loads(line)
            settings = {name: value for name, value in record.items() if name not in PER_IMAGE}
            own = {name: record[name] for name in PER_IMAGE if name in record}
            by_settings.setdefault(json.dumps(settings, sort_keys=True), (settings, []))[1].append(own)
        except (ValueError, AttributeError) as error:
            raise UserError(
                f"{path}, line {number}: not a JSON object; run selfe infer again, which writes it"
            ) from error

    cells = [Cell(folder, settings, images) for settings, images in by_settings.values()]
    if not cells:
        raise UserError(f"{path}: the job has no images; give the folder of a finished sampling job")
    order = ("weights", "cfg_scale", "s_ratio", "num_steps")
    return sorted(cells, key=lambda cell: [cell.settings[name] for name in order])


@dataclass(frozen=True)
class Folder:
    """All image files of a folder and its sub-folders, in the order of their names. Captions are empty."""

    path: Path
    files: Sequence[Path] = field(repr=False)
    size: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def stamp(self, index: int) -> tuple:
        status = self.files[index].stat()
        return str(self.files[index].relative_to(self.path)), status.st_size, status.st_mtime_ns

    def caption(self, index: int) -> str:
        return ""

    def read(self, index: int) -> tuple[Tensor, str]:
        return fitted(image_decode.read(self.files[index], str(self.files[index])), self.size), ""


@dataclass(frozen=True)
class Captioned:
    """The images of a manifest or of tar shards, in their order."""

    source: Source
    size: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def stamp(self, index: int) -> tuple:
        path, offset, length = self.source.location(index)
        status = path.stat()
        return path.name, status.st_size, status.st_mtime_ns, offset, length, self.source.prompt(index)

    def caption(self, index: int) -> str:
        return self.source.prompt(index)

    def read(self, index: int) -> tuple[Tensor, str]:
        enough = None if self.size is None else 2 * max(self.size)
        return fitted(self.source.image(index, enough), self.size), self.caption(index)


@dataclass(frozen=True)
class FromConfig:
    """Images of the part `data` of a config, as training reads them: at its own sizes, in the order of the seed."""

    settings: dict[str, Any] = field(repr=False)
    split: Split
    count: int
    size: tuple[int, int] | None = None

    @cached_property
    def data(self) -> Data:
        return config.build(self.settings, "data")

    @cached_property
    def identity(self) -> str:
        """What decides the images: the settings, and of data sets in files their content."""
        facts = self.data.facts() if isinstance(self.data, BucketedDataset) else {}
        described = {"seed": self.settings["seed"], "data": config.plain(self.settings["data"])}
        return json.dumps([described, facts, self.split], sort_keys=True)

    def __len__(self) -> int:
        return self.count

    def stamp(self, index: int) -> tuple:
        return self.identity, index

    def caption(self, index: int) -> str:
        return self.read(index)[1]

    def read(self, index: int) -> tuple[Tensor, str]:
        batch = self.data.batch(self.settings["seed"], 0, range(index, index + 1), [0], self.split)
        return batch.images[0], batch.prompts[0]


@dataclass(frozen=True)
class Subset:
    """Some images of a set."""

    images: ImageSet
    indices: Sequence[int] = field(repr=False)

    @property
    def size(self) -> tuple[int, int] | None:
        return self.images.size

    def __len__(self) -> int:
        return len(self.indices)

    def stamp(self, index: int) -> tuple:
        return self.images.stamp(self.indices[index])

    def caption(self, index: int) -> str:
        return self.images.caption(self.indices[index])

    def read(self, index: int) -> tuple[Tensor, str]:
        return self.images.read(self.indices[index])


def open_reference(
    path: Path, base_dir: Path, split: Split, size: tuple[int, int] | None, most: int | None, section: str
) -> ImageSet:
    """The images of a folder, of a manifest (.tsv, .csv, .jsonl), of tar shards (a pattern), or of a config (.yaml).

    Args:
        base_dir: folder that relative image paths of a manifest start from.
        split: of a config.
        size: height and width that images are resized to cover, and cropped to, as in training; None: unchanged.
        most: number of images, evenly spaced over the set; None: all.
        section: of the config, for error messages.

    Raises:
        UserError: there is nothing at the path, or it has too few images.
    """
    if path.is_dir():
        suffixes = {f".{suffix}" for suffix in image_decode.SUFFIXES}
        files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in suffixes]
        images: ImageSet = Folder(path, files, size)
    elif path.suffix.lower() in MANIFESTS:
        if not path.is_file():
            raise UserError(f"{section}.reference: {path}: no such file; relative paths start from the current folder")
        images = Captioned(Manifest(path, base_dir, image_decode.MAX_PIXELS), size)
    elif path.suffix.lower() in (".yaml", ".yml"):
        return from_config(path, split, most, section)
    elif ".tar" in path.name:
        images = Captioned(Shards(path, image_decode.MAX_PIXELS), size)
    else:
        raise UserError(
            f"{section}.reference: {path}: give a folder of images, a manifest ({', '.join(MANIFESTS)}), a pattern "
            "of tar shards, or a config with a section data"
        )

    if len(images) < 2:
        raise UserError(f"{section}.reference: {path}: has {len(images)} images; at least 2 are needed")
    return images if most is None else subset(images, most)


def from_config(path: Path, split: Split, count: int | None, section: str) -> FromConfig:
    """The first images of a config's data. Raises UserError."""
    if count is None:
        raise UserError(f"{section}.reference_images: missing; set how many images of {path} are taken")
    images = FromConfig(config.load(path), split, count)
    if split == "val" and not images.data.has_val:
        raise UserError(f"{section}.reference: {path}: has no validation images; set {section}.reference_split=train")

    # training images are repeated without end, those for validation are read once
    if split == "val" and isinstance(images.data, BucketedDataset):
        (source,) = images.data.sources["val"]
        if count > len(source):
            raise UserError(f"{section}.reference_images: {count}, but {path} has {len(source)} validation images")
    return images


def subset(images: ImageSet, most: int) -> ImageSet:
    """At most so many images, evenly spaced."""
    return images if len(images) <= most else Subset(images, evenly_spaced(len(images), most))


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly spaced."""
    return list(range(count)) if count <= most else (np.arange(most) * count // most).tolist()


def common_size(cells: Sequence[Cell]) -> tuple[int, int] | None:
    """Height and width of all images of a job; None if they differ."""
    sizes = {(image["height"], image["width"]) for cell in cells for image in cell.images}
    return next(iter(sizes)) if len(sizes) == 1 else None


def fitted(image: Any, size: tuple[int, int] | None) -> Tensor:
    return as_tensor(image) if size is None else image_decode.fit(image, size)


def digest(values: Sequence[tuple]) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=8).hexdigest()


def as_tensor(image: Any) -> Tensor:
    """RGB image -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
