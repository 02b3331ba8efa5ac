"""From sources of captioned pictures to batches whose make-up is a function of seed, step and schedule.

A step's global batch is planned from the pictures' sizes alone: which samples, in which shapes, at which positions.
Only then are the pictures of some positions read, so that any number of processes and workers can share the work.
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

from selfe.data.buckets import Buckets, ResolutionPhase
from selfe.data.shuffle import interleave, permute
from selfe.io import image_decode
from selfe.rng import philox
from selfe.types import BadSample, Batch, Split, UserError

BYTES_PER_TOKEN = 4  # of English captions, about
MAX_CAPTION = 512  # tokens; longer ones are cut by the text encoder


class Source(Protocol):
    """Captioned pictures by number. What it knows without reading them costs no memory: it lies in mapped files."""

    def __len__(self) -> int: ...

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        """(n,) -> (n, 2) height and width of the upright pictures; height 0: cannot be read."""
        ...

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """(n,) -> (n,) bytes of the captions, about."""
        ...

    def prompt(self, index: int) -> str: ...

    def name(self, index: int) -> str:
        """How an error message calls the picture."""
        ...

    def image(self, index: int, enough: int | None) -> Image.Image:
        """The picture as RGB; see `images.read`."""
        ...

    def digest(self) -> str:
        """Changes when the source does."""
        ...


@dataclass(frozen=True)
class WeightedManifest:
    """One of several manifests: `weight` samples of every sum of weights come from it."""

    manifest: str
    weight: int = 1
    base_dir: str | None = None  # by default that of all

    def __post_init__(self):
        if self.weight < 1:
            raise ValueError(f"weight is a whole number of at least 1, got {self.weight}")


class SampleSpec(NamedTuple):
    """What a plan says of a sample."""

    source: int
    index: int  # in its source
    place: int  # in the stream of its source
    budget: int  # number of its pixel budget in the phase
    shape: tuple[int, int]  # height, width
    cost: int  # tokens of picture and caption, about


ReadImage = Callable[[Split, SampleSpec, bool], Tensor]  # (split, row, flipped) -> picture or what stands for it


class BucketedDataset:
    """Every picture once per epoch, in a new order each epoch; of several manifests, each has its own epochs.

    Positions of a global batch are sorted by shape: neighbours are alike, which is what objectives that treat
    neighbouring rows differently and dealing to ranks both want.
    """

    def __init__(
        self,
        train_manifest: str | tuple[WeightedManifest, ...],
        base_dir: str = ".",
        val_manifest: str | None = None,
        pixels: int = 65536,
        phases: tuple[ResolutionPhase, ...] = (),
        multiple: int = 16,
        max_aspect: float = 2.0,
        flip: bool = False,
        max_pixels: int = image_decode.MAX_PIXELS,
        on_bad_image: Literal["error", "replace"] = "error",
        index_dir: str | None = None,
    ):
        """
        Args:
            train_manifest: a file, or several with weights.
            base_dir: where relative picture paths start.
            val_manifest: for validation, used in the file's order and at the first pixel budget.
            pixels: height x width of a bucket is at most this, from the start.
            phases: later changes of the budget, or several that share each batch.
            multiple: height and width are multiples of this: 8 (autoencoder) x 2 (patches).
            max_aspect: of the longest bucket.
            flip: every second picture, by chance, is mirrored.
            max_pixels: larger picture files are bad: a safeguard against decompression bombs.
            on_bad_image: stop, or take the next sample of the same bucket; that is counted and listed.
            index_dir: where indices of manifests are kept, by default beside them.
        """
        self.phases = (ResolutionPhase(0, (pixels,)), *phases)
        if list(self.phases) != sorted(self.phases, key=lambda phase: phase.step):
            raise ValueError(f"phases must be in the order of their steps, got {[phase.step for phase in phases]}")
        self.multiple, self.max_aspect, self.flip, self.on_bad_image = multiple, max_aspect, flip, on_bad_image
        self.buckets = {p: Buckets(p, multiple, max_aspect) for phase in self.phases for p in phase.pixels}
        parts = (WeightedManifest(train_manifest),) if isinstance(train_manifest, str) else train_manifest
        if not parts:
            raise ValueError("train_manifest: the list is empty; name a file")
        self.max_pixels, self.index_dir = max_pixels, Path(index_dir) if index_dir else None
        self.weights = tuple(part.weight for part in parts)
        self.sources = {"train": [self.open(Path(part.manifest), Path(part.base_dir or base_dir)) for part in parts]}
        if val_manifest:
            self.sources["val"] = [self.open(Path(val_manifest), Path(base_dir))]

    def open(self, path: Path, base_dir: Path) -> Source:
        """The source behind a name in the configuration."""
        raise NotImplementedError

    @property
    def has_val(self) -> bool:
        return "val" in self.sources

    def facts(self) -> dict[str, str]:
        """What a cache of encoded pictures depends on, by key path."""
        facts = {"pixels": sorted(self.buckets), "multiple": self.multiple, "max_aspect": self.max_aspect}
        facts["flip"] = self.flip
        for split, sources in self.sources.items():
            facts |= {f"{split}_manifest[{i}]": source.digest() for i, source in enumerate(sources)}
        return {f"data.{key}": str(value) for key, value in facts.items()}

    def resolution(self, step: int) -> tuple[int, ...]:
        """Pixel budgets of the training images at a step."""
        return self.phase(step, "train").pixels

    def costs(self, seed: int, step: int, samples: range, split: Split) -> tuple[int, ...]:
        """Tokens of picture and caption at each position of the step's global batch; captions by their length."""
        return tuple(row.cost for row in plan(self, seed, step, samples, split))

    def batch(self, seed: int, step: int, samples: range, positions: Sequence[int], split: Split) -> Batch:
        """These positions of the step's global batch."""
        return self.load(seed, step, samples, positions, split, self.read)

    def load(
        self, seed: int, step: int, samples: range, positions: Sequence[int], split: Split, read: ReadImage
    ) -> Batch:
        """As `batch`, with pictures by `read`."""
        rows = plan(self, seed, step, samples, split)
        found, problems = [], []
        for position in positions:
            flipped = self.flip and split == "train" and philox(seed, step, position, "flip").random() < 0.5
            for row in self.replacements(seed, self.phase(step, split), split, rows[position]):
                source = self.sources[split][row.source]
                try:
                    found.append((read(split, row, flipped), source.prompt(row.index), source.name(row.index)))
                    break
                except BadSample as problem:
                    if self.on_bad_image == "error":
                        raise
                    problems.append(str(problem))
            else:
                raise UserError(f"{problems[-1]}; and no picture of shape {rows[position].shape} can stand in for it")
        pictures, prompts, names = zip(*found, strict=True)
        return Batch(pictures, prompts, tuple(positions), names, tuple(problems))

    def read(self, split: Split, row: SampleSpec, flipped: bool) -> Tensor:
        """(3, height, width) uint8."""
        image = self.sources[split][row.source].image(row.index, enough=2 * max(row.shape))
        picture = image_decode.fit(image, row.shape)
        return picture.flip(-1) if flipped else picture

    def phase(self, step: int, split: Split) -> ResolutionPhase:
        """Validation stays in the first phase, so that only the weights change its value."""
        return [phase for phase in self.phases if phase.step <= step or phase is self.phases[0]][
            -1 if split == "train" else 0
        ]

    def indices(self, seed: int, split: Split, source: int, places: np.ndarray) -> np.ndarray:
        """Places (n,) in the endless stream of a source -> which of its pictures come there."""
        length = len(self.sources[split][source])
        epochs, places = np.divmod(places, length)
        if split == "val":
            return places
        found = np.empty_like(places)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            found[now] = permute(places[now], length, seed, "epoch", int(epoch), source)
        return found

    def sizes(self, split: Split, source: int, indices: np.ndarray) -> np.ndarray:
        """(n, 2); unreadable pictures count as squares until they are read."""
        sizes = self.sources[split][source].sizes(indices)
        return np.where(sizes > 0, sizes, 1)

    def replacements(self, seed: int, phase: ResolutionPhase, split: Split, row: SampleSpec) -> Iterator[SampleSpec]:
        """A row and then those that may stand in for it: of the same shape, in the order of its source's stream."""
        yield row
        buckets = self.buckets[phase.pixels[row.budget]]
        end = row.place + 2 * len(self.sources[split][row.source])  # a whole epoch lies in between
        for first in range(row.place + 1, end, 256):
            places = np.arange(first, min(first + 256, end))
            indices = self.indices(seed, split, row.source, places)
            shapes = buckets.nearest(self.sizes(split, row.source, indices))
            for i in np.flatnonzero((shapes == row.shape).all(axis=1)):
                yield row._replace(index=int(indices[i]), place=int(places[i]))


@lru_cache(maxsize=4)  # asked for by every micro-batch of a step
def plan(feed: BucketedDataset, seed: int, step: int, samples: range, split: Split) -> tuple[SampleSpec, ...]:
    """The step's global batch, position by position."""
    numbers = np.arange(samples.start, samples.stop)
    weights = feed.weights if split == "train" else (1,)
    sources, places = interleave(numbers, weights)
    indices, lengths, sizes = np.empty_like(numbers), np.empty_like(numbers), np.empty((len(samples), 2), np.int64)
    for source in range(len(weights)):
        its = sources == source
        indices[its] = feed.indices(seed, split, source, places[its])
        sizes[its] = feed.sizes(split, source, indices[its])
        lengths[its] = feed.sources[split][source].lengths(indices[its])
    phase = feed.phase(step, split)
    budgets = dealt_budgets(phase, samples, sizes)
    shapes = np.empty_like(sizes)
    for number, pixels in enumerate(phase.pixels):
        shapes[budgets == number] = feed.buckets[pixels].nearest(sizes[budgets == number])
    order = np.lexsort((shapes[:, 0], -shapes.prod(axis=1)))
    costs = shapes.prod(axis=1) // feed.multiple**2 + (lengths // BYTES_PER_TOKEN).clip(max=MAX_CAPTION)
    columns = (column[order].tolist() for column in (sources, indices, places, budgets, shapes, costs))
    return tuple(SampleSpec(*values[:4], tuple(values[4]), values[5]) for values in zip(*columns, strict=True))


def dealt_budgets(phase: ResolutionPhase, samples: range, sizes: np.ndarray) -> np.ndarray:
    """A pixel budget's number for each picture (n,): shares as the phase says, and pictures that are too small for a
    larger budget get the smaller ones first, so that as few as possible are enlarged."""
    filled = np.searchsorted(phase.pixels, sizes.prod(axis=1), side="right").clip(1)
    budgets = np.empty(len(sizes), np.int64)
    budgets[np.argsort(filled, kind="stable")] = np.repeat(np.arange(len(phase.pixels)), phase.counts(samples))
    return budgets
