"""Small images and manifests."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def make_image(seed: int, size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """Smooth colours of (height, width), different for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC).convert(mode)


def manifest(folder: Path, sizes: Sequence[tuple[int, int]], name: str = "train.tsv", columns: bool = False) -> Path:
    """A JPEG for each (height, width) and a line for each, with the captions drawing 0, drawing 1 ..."""
    lines = []
    for number, size in enumerate(sizes):
        path = f"{Path(name).stem}_{number:04d}.jpg"
        make_image(number, size).save(folder / path)
        lines.append(f"{path}\tdrawing {number}" + (f"\t{size[1]}\t{size[0]}" if columns else ""))
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def lines_only(path: Path, sizes: np.ndarray) -> Path:
    """A manifest with sizes (n, 2) whose images do not exist."""
    path.write_text("".join(f"{i:07d}.jpg\tdrawing {i}\t{w}\t{h}\n" for i, (h, w) in enumerate(sizes.tolist())))
    return path
