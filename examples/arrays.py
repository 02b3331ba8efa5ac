"""A data set held in memory: an .npz file with `images` (n, height, width, 3), uint8, and `captions` (n,) or (n, k)."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from selfe.data.captions import Captions
from selfe.data.dataset import BucketedDataset
from selfe.errors import UserError


class ArrayData(BucketedDataset):  # order, epochs, buckets, mixing and resuming
    def open(self, path: Path, base_dir: Path) -> "Arrays":
        return Arrays(path)


class Arrays:
    def __init__(self, path: Path):
        if not path.is_file():
            raise UserError(f"{path}: no such file; set data.params.train_manifest to an .npz file")
        with np.load(path) as file:
            self.path, self.images, self.texts = path, file["images"], file["captions"].reshape(len(file["images"]), -1)

    def __len__(self) -> int:
        return len(self.images)

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        return np.tile(self.images.shape[1:3], (len(indices), 1))

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return np.array([self.captions(index).mean_bytes for index in indices])

    def captions(self, index: int) -> Captions:
        return Captions(tuple(self.texts[index].tolist()))

    def name(self, index: int) -> str:
        return f"{self.path}, image {index}"

    def location(self, index: int) -> tuple[Path, int, int | None]:
        return self.path, 0, None  # the complete file: `selfe precompute` encodes all images again if it changes

    def image(self, index: int, enough: int | None) -> Image.Image:
        return Image.fromarray(self.images[index])

    def digest(self) -> str:
        return hashlib.blake2b(self.path.read_bytes(), digest_size=16).hexdigest()
