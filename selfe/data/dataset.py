"""From sources of captioned images to batches whose composition is a function of seed, step and schedule.

A step's global batch is planned from image sizes alone: which samples, in which shapes, at which positions. Images are
read only for the requested positions, so any number of processes and workers can share the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from selfe import compare
from selfe.data.buckets import MAX_SHARE, Buckets, ResolutionPhase
from selfe.data.captions import CaptionPhase, Captions
from selfe.data.shuffle import interleave, permute
from selfe.errors import BadSample, UserError
from selfe.io import image_decode
from selfe.io.disk_cache import DiskCache
from selfe.io.storage import RemotePath, as_path
from selfe.rng import philox
from selfe.types import Batch, Split, check_range

BYTES_PER_TOKEN = 4  # approximate, English captions
MAX_CAPTION = 512  # tokens; the text encoder truncates longer captions


class Source(Protocol):
    """Captioned images by index. Sizes and lengths come from memory-mapped files, not from resident memory."""

    def __len__(self) -> int: ...

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        """Indices (n,) -> (n, 2) height and width in pixels after EXIF rotation; height 0 means unreadable."""
        ...

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Indices (n,) -> (n,) approximate caption lengths in bytes; of several captions, their mean."""
        ...

    def captions(self, index: int) -> Captions: ...

    def prompt(self, index: int) -> str:
        """The first caption."""
        return self.captions(index).first

    def name(self, index: int) -> str:
        """Name of the image in error messages."""
        ...

    def location(self, index: int) -> tuple[Path | RemotePath, int, int | None]:
        """File, offset and number of bytes of the image; None: to the end of the file."""
        ...

    def image(self, index: int, enough: int | None) -> Image.Image:
        """The image as RGB; see `image_decode.read`."""
        ...

    def digest(self) -> str:
        """Changes whenever the content of the source changes."""
        ...


@dataclass(frozen=True)
class WeightedManifest:
    """One of several manifests, which contributes `weight` of every sum-of-weights samples."""

    manifest: str | Path  # as a single `train_manifest`
    weight: int = 1  # samples of this manifest, of every sum of all weights
    base_dir: str | Path | None = None  # default: the `base_dir` of the dataset

    def __post_init__(self):
        check_range("weight", self.weight, 1, MAX_SHARE)


@dataclass(frozen=True)
class Reading:
    """How a source reads images, and where it keeps indices and copies."""

    base_dir: Path | RemotePath
    max_pixels: int
    index_dir: Path | None
    strict: bool  # whether a bad image is an error
    convert_icc: bool
    cache: DiskCache
    image_column: str | None = None
    caption_column: str | None = None


class SampleSpec(NamedTuple):
    """A planned sample."""

    source: int
    index: int  # within its source
    place: int  # position in the shuffled, endless stream of its source
    budget: int  # index of its pixel budget in the phase
    shape: tuple[int, int]  # height, width
    cost: int  # approximate number of image and caption tokens


# (split, sample, flipped) -> the image or its latents
ReadImage = Callable[[Split, SampleSpec, bool], Tensor]


class BucketedDataset:
    """Every image once per epoch, reshuffled each epoch; with several manifests, each has its own epochs.

    Positions of a global batch are sorted by shape, so that neighbouring rows have similar shapes. Objectives that
    treat neighbouring rows differently and balancing over ranks both rely on this.
    """

    def __init__(
        self,
        train_manifest: str | Path | tuple[WeightedManifest, ...],
        base_dir: str | Path = ".",
        val_manifest: str | Path | None = None,
        pixels: int = 65536,
        phases: tuple[ResolutionPhase, ...] = (),
        multiple: int = 16,
        max_aspect: float = 2.0,
        flip: bool = False,
        max_pixels: int = image_decode.MAX_PIXELS,
        convert_icc: bool = True,
        on_bad_image: Literal["error", "replace"] = "error",
        index_dir: Path | None = None,
        caption_weights: tuple[float, ...] = (),
        caption_phases: tuple[CaptionPhase, ...] = (),
        image_column: str | None = None,
        caption_column: str | None = None,
        cache_dir: Path | None = None,
        cache_gb: float = 50.0,
    ):
        """
        Args:
            train_manifest: a manifest file, or several with weights; paths or URLs, such as s3://bucket/train.jsonl.
            base_dir: directory or URL that relative image paths start from.
            val_manifest: for validation; read in file order and at the first pixel budget.
            pixels: maximum height x width of a bucket, from step 0.
            phases: later changes of the pixel budget, or several budgets within each batch.
            multiple: height and width are multiples of this: 8 (autoencoder) x 2 (patches).
            max_aspect: largest ratio of the longer to the shorter side of a bucket.
            flip: mirror training images horizontally with probability 0.5.
            max_pixels: images with more pixels are rejected; protects against decompression bombs.
            convert_icc: convert images from their embedded ICC profile to sRGB; otherwise profiles are ignored.
            on_bad_image: `error` stops; `replace` uses the next sample of the same bucket, counts and lists it.
            index_dir: directory for manifest indices; default: next to each manifest.
            caption_weights: of the captions of a training image, by position; `[]`: as the file states, or the first.
            caption_phases: later changes of the caption weights.
            image_column: column or key of the images in tables; default: the first of the usual names.
            caption_column: the same for the captions.
            cache_dir: directory for copies of remote data and of images in Parquet files; default: one of this user in
                the system's directory of temporary files.
            cache_gb: largest size of these copies, GB of 10^9 bytes.
        """
        check_range("max_pixels", max_pixels, 1, 2**63 - 1)
        self.phases = (ResolutionPhase(0, (pixels,)), *phases)
        self.caption_phases = (CaptionPhase(0, caption_weights), *caption_phases)
        for name, ordered in {"phases": self.phases, "caption_phases": self.caption_phases}.items():
            steps = [phase.step for phase in ordered]
            if steps != sorted(steps):
                raise ValueError(f"{name} must be in the order of their steps, got {steps[1:]}")

        self.multiple, self.max_aspect, self.flip, self.on_bad_image = multiple, max_aspect, flip, on_bad_image
        budgets = [pixels for phase in self.phases for pixels in phase.pixels]
        self.buckets = {budget: Buckets(budget, multiple, max_aspect) for budget in budgets}

        # one source per manifest
        entries = train_manifest if isinstance(train_manifest, tuple) else (WeightedManifest(train_manifest),)
        if not entries:
            raise ValueError("train_manifest: the list is empty; name a file")
        self.max_pixels, self.convert_icc = max_pixels, convert_icc
        self.index_dir = Path(index_dir) if index_dir else None
        self.image_column, self.caption_column = image_column, caption_column
        check_range("cache_gb", cache_gb, 1e-5, 10**9)
        self.cache = DiskCache(Path(cache_dir) if cache_dir else None, int(cache_gb * 10**9))
        self.weights = tuple(entry.weight for entry in entries)
        self.sources = {
            "train": [self.open(as_path(entry.manifest), as_path(entry.base_dir or base_dir)) for entry in entries]
        }

        if val_manifest:
            self.sources["val"] = [self.open(as_path(val_manifest), as_path(base_dir))]

    def open(self, path: Path | RemotePath, base_dir: Path | RemotePath) -> Source:
        """The source for a path in the config."""
        raise NotImplementedError

    def reading(self, base_dir: Path | RemotePath) -> Reading:
        """How the sources of this dataset read images."""
        return Reading(
            base_dir,
            self.max_pixels,
            self.index_dir,
            strict=self.on_bad_image == "error",
            convert_icc=self.convert_icc,
            cache=self.cache,
            image_column=self.image_column,
            caption_column=self.caption_column,
        )

    @property
    def has_val(self) -> bool:
        return "val" in self.sources

    @property
    def num_images(self) -> int:
        """Training images, over all manifests."""
        return sum(len(source) for source in self.sources["train"])

    def facts(self) -> dict[str, str]:
        """Settings that a cache of encoded images depends on, by key path."""
        facts = {
            "module": compare.class_path(self),
            "pixels": sorted(self.buckets),
            "multiple": self.multiple,
            "max_aspect": self.max_aspect,
            "flip": self.flip,
            "convert_icc": self.convert_icc,
        }
        for split, sources in self.sources.items():
            facts |= {f"{split}_manifest[{i}]": source.digest() for i, source in enumerate(sources)}
        return {f"data.{key}": str(value) for key, value in facts.items()}

    def resolution(self, step: int) -> tuple[int, ...]:
        """Pixel budgets of the training images at a step."""
        return self.phase(step, "train").pixels

    def costs(self, seed: int, step: int, samples: range, split: Split) -> tuple[int, ...]:
        """Approximate number of image and caption tokens at each position of the global batch of a step."""
        return tuple(row.cost for row in plan(self, seed, step, samples, split))

    def batch(self, seed: int, step: int, samples: range, positions: Sequence[int], split: Split) -> Batch:
        """The given positions of the global batch of a step."""
        return self.load(seed, step, samples, positions, split, self.read)

    def load(
        self, seed: int, step: int, samples: range, positions: Sequence[int], split: Split, read: ReadImage
    ) -> Batch:
        """As `batch`, with images read by `read`.

        Raises:
            BadSample: an image cannot be read and `on_bad_image` is `error`.
            UserError: no readable image of the same shape is left to replace one.
        """
        rows = plan(self, seed, step, samples, split)
        loaded, problems = [], []

        for position in positions:
            flipped = self.flip and split == "train" and philox(seed, step, position, "flip").random() < 0.5

            # the planned sample first, then its replacements
            for row in self.replacements(seed, self.phase(step, split), split, rows[position]):
                source = self.sources[split][row.source]
                try:
                    image, captions = read(split, row, flipped), source.captions(row.index)
                    loaded.append((image, self.caption(captions, seed, step, split, row), source.name(row.index)))
                    break
                except BadSample as problem:
                    if self.on_bad_image == "error":
                        raise
                    problems.append(str(problem))
            else:
                raise UserError(f"{problems[-1]}; no readable image of shape {rows[position].shape} can replace it")

        images, prompts, names = zip(*loaded, strict=True)
        return Batch(images, prompts, tuple(positions), names, tuple(problems))

    def caption(self, captions: Captions, seed: int, step: int, split: Split, row: SampleSpec) -> str:
        """The caption of a sample: a function of the seed and the sample. Validation always uses the first."""
        if split == "val" or len(captions.texts) == 1:
            return captions.first
        weights = [phase for phase in self.caption_phases if phase.step <= step][-1].weights
        return captions.choose(weights, philox(seed, "caption", row.source, row.place).random())

    def read(self, split: Split, row: SampleSpec, flipped: bool) -> Tensor:
        """The image, (3, height, width) uint8."""
        image = self.sources[split][row.source].image(row.index, enough=2 * max(row.shape))
        pixels = image_decode.fit(image, row.shape)
        return pixels.flip(-1) if flipped else pixels

    def phase(self, step: int, split: Split) -> ResolutionPhase:
        """The phase of a step. Validation stays in the first phase, so that its loss is comparable over a run."""
        if split == "val":
            return self.phases[0]
        return [phase for phase in self.phases if phase.step <= step][-1]

    def indices(self, seed: int, split: Split, source: int, places: np.ndarray) -> np.ndarray:
        """Places (n,) in the endless stream of a source -> indices (n,) of its images."""
        length = len(self.sources[split][source])
        epochs, places = np.divmod(places, length)
        if split == "val":
            return places

        # a new permutation in each epoch
        indices = np.empty_like(places)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            indices[in_epoch] = permute(places[in_epoch], length, seed, "epoch", int(epoch), source)
        return indices

    def sizes(self, split: Split, source: int, indices: np.ndarray) -> np.ndarray:
        """Heights and widths (n, 2); unreadable images count as square until they are read."""
        sizes = self.sources[split][source].sizes(indices)
        return np.where(sizes > 0, sizes, 1)

    def replacements(self, seed: int, phase: ResolutionPhase, split: Split, row: SampleSpec) -> Iterator[SampleSpec]:
        """The row, then its possible replacements: samples of the same shape, in stream order."""
        yield row

        buckets = self.buckets[phase.pixels[row.budget]]
        end = row.place + 2 * len(self.sources[split][row.source])  # covers at least one complete epoch

        for first in range(row.place + 1, end, 256):
            places = np.arange(first, min(first + 256, end))
            indices = self.indices(seed, split, row.source, places)
            shapes = buckets.nearest(self.sizes(split, row.source, indices))
            for i in np.flatnonzero((shapes == row.shape).all(axis=1)):
                yield row._replace(index=int(indices[i]), place=int(places[i]))


@lru_cache(maxsize=4)  # called for every micro-batch of a step
def plan(data: BucketedDataset, seed: int, step: int, samples: range, split: Split) -> tuple[SampleSpec, ...]:
    """The global batch of a step, position by position."""
    # which sample of which source
    numbers = np.arange(samples.start, samples.stop)
    weights = data.weights if split == "train" else (1,)
    sources, places = interleave(numbers, weights)
    indices, lengths = np.empty_like(numbers), np.empty_like(numbers)
    sizes = np.empty((len(samples), 2), np.int64)
    for source in range(len(weights)):
        chosen = sources == source
        indices[chosen] = data.indices(seed, split, source, places[chosen])
        sizes[chosen] = data.sizes(split, source, indices[chosen])
        lengths[chosen] = data.sources[split][source].lengths(indices[chosen])

    # bucket shape of each sample, within the pixel budget assigned to it
    phase = data.phase(step, split)
    budgets = dealt_budgets(phase, samples, sizes)
    shapes = np.empty_like(sizes)
    for number, pixels in enumerate(phase.pixels):
        shapes[budgets == number] = data.buckets[pixels].nearest(sizes[budgets == number])

    # sort by shape, largest first
    order = np.lexsort((shapes[:, 0], -shapes.prod(axis=1)))
    costs = shapes.prod(axis=1) // data.multiple**2 + (lengths // BYTES_PER_TOKEN).clip(max=MAX_CAPTION)
    columns = [column[order].tolist() for column in (sources, indices, places, budgets, shapes, costs)]
    return tuple(
        SampleSpec(source, index, place, budget, tuple(shape), cost)
        for source, index, place, budget, shape, cost in zip(*columns, strict=True)
    )


def dealt_budgets(phase: ResolutionPhase, samples: range, sizes: np.ndarray) -> np.ndarray:
    """Sizes (n, 2) -> index of the pixel budget (n,) for each image, in the shares of the phase.

    The smallest images get the smallest budgets, so that as few images as possible are upscaled.
    """
    filled = np.searchsorted(phase.pixels, sizes.prod(axis=1), side="right").clip(1)
    budgets = np.empty(len(sizes), np.int64)
    budgets[np.argsort(filled, kind="stable")] = np.repeat(np.arange(len(phase.pixels)), phase.counts(samples))
    return budgets
