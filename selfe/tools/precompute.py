"""The verb `selfe precompute`: encode all images and captions of a training config into a feature cache.

Runs on any number of processes under torchrun: each writes its own shards of the cache, and existing shards are kept,
so a rerun resumes. The cache folder gets a `config.yaml` that trains from it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, islice, product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from selfe import config, device, launch, log, signals
from selfe.data import cached
from selfe.data.dataset import BucketedDataset, SampleSpec
from selfe.data.loader import WatchedLoader, share
from selfe.distributed import collectives
from selfe.distributed.collectives import World
from selfe.encoders.latent_preview import LatentPreview
from selfe.errors import BadSample, UserError
from selfe.io import feature_cache
from selfe.io.feature_cache import FileStamp
from selfe.io.folder_lock import FolderLock
from selfe.protocols import Objective
from selfe.rng import SampleRNG
from selfe.system import System
from selfe.training.settings import without_evaluation
from selfe.types import Packed, Split, signed

LATENTS_PER_SHARD, CAPTIONS_PER_SHARD = 4096, 512
SAMPLE = 64  # captions encoded to estimate the size of the text cache
PREVIEW_IMAGES = 256  # to which the linear preview of the latents is fitted
BYTES = 2  # per value in bf16
POSITION_BITS = 16  # of the position of a caption in its line

Work = Callable[[int, Sequence[int], log.Progress], None]  # encode these items to the shard of this number


@dataclass(frozen=True)
class Block:
    """All images of a source at one pixel budget, flipped or not."""

    split: Split
    source: int
    pixels: int
    flipped: bool
    length: int


class Images(Dataset):
    """Every image at every pixel budget that training uses: number -> (key of its cache entry, file stamp, image).

    An error takes the place of an image that cannot be read.
    """

    def __init__(self, data: BucketedDataset):
        self.data = data
        self.blocks = []
        for split, sources in data.sources.items():
            is_train = split == "train"
            budgets = sorted(data.buckets) if is_train else data.phases[0].pixels
            orientations = (False, True) if data.flip and is_train else (False,)
            for source, samples in enumerate(sources):
                for pixels, flipped in product(budgets, orientations):
                    self.blocks.append(Block(split, source, pixels, flipped, len(samples)))

    def __len__(self) -> int:
        return sum(block.length for block in self.blocks)

    def __getitem__(self, number: int) -> tuple[str, FileStamp, Tensor | UserError]:
        block, index = self.locate(number)
        shape = self.shape(number)
        stamp = feature_cache.file_stamp(self.location(number))  # before reading: a change in between is seen later
        try:
            image = self.data.read(block.split, SampleSpec(block.source, index, 0, 0, shape, 0), block.flipped)
            share(image, "--workers")
        except UserError as problem:  # returned: raised in a worker, it would arrive as a traceback
            image = problem
        return self.key(number), stamp, image

    def key(self, number: int) -> str:
        """The key of an item's cache entry."""
        block, index = self.locate(number)
        return feature_cache.latent_key(block.split, block.source, index, self.shape(number), block.flipped)

    def location(self, number: int) -> feature_cache.Location:
        """Where the bytes of an item's image are."""
        block, index = self.locate(number)
        return self.data.sources[block.split][block.source].location(index)

    def locate(self, number: int) -> tuple[Block, int]:
        """The block of an item, and the image's index in its source."""
        for block in self.blocks:
            if number < block.length:
                return block, number
            number -= block.length
        raise IndexError(number)

    def shape(self, number: int) -> tuple[int, int]:
        """Height and width of an item's bucket."""
        block, index = self.locate(number)
        return tuple(self.shapes(block, np.array([index]))[0].tolist())

    def shapes(self, block: Block, indices: np.ndarray) -> np.ndarray:
        """Height and width (n, 2) of the buckets of these images of a block."""
        return self.data.buckets[block.pixels].nearest(self.data.sizes(block.split, block.source, indices))

    def num_tokens(self) -> int:
        """Image tokens of all items together."""
        pixels = 0
        for block in self.blocks:
            for first in range(0, block.length, 1 << 20):
                indices = np.arange(first, min(first + (1 << 20), block.length))
                pixels += int(self.shapes(block, indices).prod(axis=1).sum())
        return pixels // self.data.multiple**2


class Captions:
    """The distinct captions of all images by first occurrence, then the null prompt and `more` if not among them."""

    def __init__(self, data: BucketedDataset, more: Sequence[str]):
        self.sources = [source for sources in data.sources.values() for source in sources]
        self.starts = np.cumsum([0, *map(len, self.sources)])
        self.more = list(dict.fromkeys(["", *more]))

        # for each caption its key, and the numbers of its line and of its position there, instead of its text
        keys, places = array("Q"), array("Q")
        for line in range(self.starts[-1]):
            try:
                texts = self.of_line(line)
            except BadSample:
                if data.on_bad_image == "error":
                    raise
                continue
            for position, text in enumerate(texts):
                if text:
                    keys.extend(key_of(text).tolist())
                    places.append(line << POSITION_BITS | position)

        # keep the first place of each caption
        unique, first = np.unique(np.asarray(keys).reshape(-1, 2), axis=0, return_index=True)
        self.first = np.asarray(places)[np.sort(first)]
        self.more = [caption for caption in self.more if not (unique == key_of(caption)).all(axis=1).any()]

    def of_line(self, line: int) -> tuple[str, ...]:
        """The captions of a line by position, empty where there is none. Lines are counted over all sources."""
        source = int(np.searchsorted(self.starts, line, side="right")) - 1
        return self.sources[source].captions(int(line - self.starts[source])).texts

    def __len__(self) -> int:
        return len(self.first) + len(self.more)

    def __getitem__(self, number: int) -> str:
        if number >= len(self.first):
            return self.more[number - len(self.first)]
        place = int(self.first[number])
        return self.of_line(place >> POSITION_BITS)[place % (1 << POSITION_BITS)]


def key_of(caption: str) -> np.ndarray:
    """The digest of a caption as two 64-bit integers."""
    return np.frombuffer(bytes.fromhex(feature_cache.digest(caption)), np.uint64)


def wanted(objective: Objective, prompts: Sequence[str], num_steps: int) -> list[str]:
    """The distinct captions that an objective may request in a run over these prompts."""
    rows = [prompt for prompt in prompts for _ in range(objective.batch_multiple)]
    rng = SampleRNG.of_step(0, 0, range(len(rows)))
    captions = []
    for step in (0, num_steps - 1):
        captions += chain(*objective.captions(rows, rng, step, drop=False).values())
    return list(dict.fromkeys(captions))


class Precompute:
    """Fills the cache in `folder`: shard n is encoded by rank n modulo the world size."""

    def __init__(
        self, system: System, data: BucketedDataset, folder: Path, world: World, options: argparse.Namespace, trainer
    ):
        self.system, self.data, self.folder, self.world, self.options = system, data, folder, world, options
        self.num_steps = trainer.max_steps
        self.feature_encoder = getattr(system.objective, "feature_encoder", None)
        self.images, self.captions = Images(data), Captions(data, trainer.samples.prompts)

    @cached_property
    def num_shards(self) -> dict[str, int]:
        text = -(-len(self.captions) // CAPTIONS_PER_SHARD)
        images = -(-len(self.images) // LATENTS_PER_SHARD)
        features = {"features": images} if self.feature_encoder is not None else {}
        return {"text": text, "pooled": text, "latents": images} | features

    def run(self) -> None:
        self.system.load_encoders(self.world.device)
        if self.feature_encoder is not None:
            self.feature_encoder.load(self.world.device)
        if self.world.is_main:
            self.check_space()
        collectives.barrier()

        self.encode("pooled", len(self.captions), CAPTIONS_PER_SHARD, self.encode_captions)
        self.encode("latents", len(self.images), LATENTS_PER_SHARD, self.encode_images)
        collectives.barrier()
        self.encode_changed()

        # an index is written once all ranks have written their shards
        collectives.barrier()
        if self.world.is_main:
            cached.write_stamps(self.folder, self.data)
            for name, number in self.num_shards.items():
                feature_cache.write_index(self.folder / name, number)
            self.fit_preview()

    def encode(self, name: str, total: int, per_shard: int, work: Work) -> None:
        """Encode this rank's shards, except existing ones."""
        of_rank = set(range(self.world.rank, self.num_shards[name], self.world.size))
        self.existing = of_rank & set(feature_cache.shard_numbers(self.folder / name))
        missing = {
            number: range(number * per_shard, min((number + 1) * per_shard, total))
            for number in sorted(of_rank - self.existing)
        }
        self.encode_shards({"pooled": "captions", "latents": "images"}[name], missing, work)

    def encode_changed(self) -> None:
        """Encode images again whose files have changed since they were encoded, to shards behind the existing ones."""
        folder, num_shards = self.folder / "latents", self.num_shards["latents"]
        added = [number for number in feature_cache.shard_numbers(folder) if number >= num_shards]
        later = {}
        for number in added:
            later |= feature_cache.read_stamps(feature_cache.shard_path(folder, number))
        first = (added[-1] + 1 if added else num_shards) + self.world.rank
        collectives.barrier()  # every rank has listed the shards

        changed = []
        for number in sorted(self.existing):
            stamps = feature_cache.read_stamps(feature_cache.shard_path(folder, number)) | later
            items = range(number * LATENTS_PER_SHARD, min((number + 1) * LATENTS_PER_SHARD, len(self.images)))
            for item in items:
                stamp = stamps.get(self.images.key(item))
                if stamp is None or feature_cache.has_changed(stamp, self.images.location(item)):
                    changed.append(item)

        if changed:
            rank = f"rank {self.world.rank}: " if self.world.size > 1 else ""
            log.print_line(f"{rank}{len(changed)} cached images have changed; encoding them again")
        numbered = enumerate(chunks(changed, LATENTS_PER_SHARD))
        shards = {first + place * self.world.size: items for place, items in numbered}
        self.encode_shards("changed images", shards, self.encode_images)

    def encode_shards(self, what: str, shards: dict[int, Sequence[int]], work: Work) -> None:
        """Encode the items of each shard."""
        progress = log.Progress(what, sum(map(len, shards.values())), quiet=not self.world.is_main)
        for number, items in shards.items():
            work(number, items, progress)
        progress.close()

    def encode_captions(self, number: int, items: range, progress: log.Progress) -> None:
        """Write one shard of text tokens and one of pooled vectors."""
        # every caption that the objective derives from these prompts
        prompts = [self.captions[i] for i in items]
        captions = wanted(self.system.objective, prompts, self.num_steps)
        if "" not in prompts:  # captions derived from the null prompt belong to its own shard
            null = wanted(self.system.objective, [""], self.num_steps)
            captions = [caption for caption in captions if caption not in null]
        captions.sort(key=len)  # similar lengths share a batch

        text, pooled = {}, {}
        for batch in chunks(captions, self.options.batch_size):
            cond = self.system.text_encoder(batch)
            keys = [feature_cache.digest(caption) for caption in batch]
            text |= {key: tokens[None] for key, tokens in zip(keys, cond.text.split(), strict=True)}
            pooled |= {key: vector[None, None] for key, vector in zip(keys, cond.pooled, strict=True)}

        feature_cache.write_shard(self.folder / "text", number, text)
        feature_cache.write_shard(self.folder / "pooled", number, pooled)
        progress.advance(len(items))

    def encode_images(self, number: int, items: Sequence[int], progress: log.Progress) -> None:
        """Write one shard of latents, and before it one of features: a shard of latents means that both exist."""
        order = sorted(items, key=self.images.shape)  # equal shapes share a batch
        loader = DataLoader(
            self.images,
            sampler=order,
            batch_size=None,
            num_workers=self.options.workers,
            worker_init_fn=signals.end_with_parent,
        )
        loader = WatchedLoader(loader, f"rank {self.world.rank}", "--workers")

        entries, features, stamps = {}, {}, {}
        for batch in chunks(loader, self.options.batch_size):
            # unreadable images are recorded and have no entry, or stop the run
            problems = [image for _, _, image in batch if isinstance(image, UserError)]
            for problem in problems:
                if self.data.on_bad_image == "error" or not isinstance(problem, BadSample):
                    raise problem
            log.record_replaced(self.folder, list(map(str, problems)))

            stamps |= {key: stamp for key, stamp, _ in batch}
            good = {key: image for key, _, image in batch if not isinstance(image, UserError)}
            if good:
                latents = self.latents(list(good), list(good.values()))
                entries |= zip(good, latents, strict=True)
            if good and self.feature_encoder is not None:
                grids = [tuple(entry.shape[:2]) for entry in latents]
                encoded = self.feature_encoder([signed(image) for image in good.values()], grids)
                features |= zip(good, unpacked(encoded), strict=True)
            progress.advance(len(batch))

        if self.feature_encoder is not None:
            feature_cache.write_shard(self.folder / "features", number, features, stamps)
        feature_cache.write_shard(self.folder / "latents", number, entries, stamps)

    def latents(self, keys: Sequence[str], images: Sequence[Tensor]) -> list[Tensor]:
        """B x (rows, columns, values per token): means and standard deviations, or one fixed sample (--one-sample)."""
        mean, deviation = self.system.autoencoder.moments([signed(image) for image in images])
        entries = mean.tokens
        if deviation is not None and self.options.one_sample:
            noise = SampleRNG(tuple(("cache", key) for key in keys)).normal_like("latent", mean)
            entries = mean.tokens + deviation * noise
        elif deviation is not None:
            entries = torch.cat([mean.tokens, deviation], dim=1)
        return unpacked(mean.with_tokens(entries))

    def fit_preview(self) -> None:
        """Fit the linear preview of the latents to some images, by which training from the cache shows samples."""
        some = np.unique(np.linspace(0, len(self.images) - 1, PREVIEW_IMAGES).astype(int))
        store, width = feature_cache.Store(self.folder / "latents"), self.system.autoencoder.token_dim

        def samples() -> Iterator[tuple[Tensor, Tensor]]:
            for item in some:
                key, _, image = self.images[int(item)]
                if isinstance(image, UserError) or store.find(key) is None:
                    continue  # unreadable now, or when it was encoded
                yield store.read(key, f"image {item}")[..., :width], signed(image)

        preview = LatentPreview.fit(samples())
        preview.save(self.folder)
        log.print_line(f"linear preview of latents, fitted to {len(some)} images: PSNR {preview.psnr:.1f} dB")

    def check_space(self) -> None:
        """Print the estimated size of the cache; raise a UserError if it does not fit on the disk."""
        # latents: exact, from the values per token of one image
        images = (self.images[i][2] for i in range(len(self.images)))
        image = next(image for image in images if not isinstance(image, UserError))
        width = self.latents(["0"], [image])[0].shape[-1]
        if self.feature_encoder is not None:
            width += self.feature_encoder.feature_dim
        latents = self.images.num_tokens() * width * BYTES

        # text: estimated from a sample of captions
        some = np.unique(np.linspace(0, len(self.captions) - 1, SAMPLE).astype(int))
        captions = wanted(self.system.objective, [self.captions[i] for i in some], self.num_steps)
        cond = self.system.text_encoder(captions)
        per_caption = (cond.text.tokens.numel() + cond.pooled.numel()) * BYTES / len(some)
        text = int(per_caption * len(self.captions))

        done = sum(path.stat().st_size for path in self.folder.glob("*/*.safetensors"))
        free = shutil.disk_usage(self.folder).free
        log.print_line(
            f"{self.folder}: {len(self.images)} images take {size(latents)}, {len(self.captions)} captions about "
            f"{size(text)}; {size(done)} already encoded, {size(free)} free"
        )
        if latents + text - done > free:
            raise UserError(f"{self.folder}: the disk lacks {size(latents + text - done - free)}; use another --out")


def unpacked(entries: Packed) -> list[Tensor]:
    """B x (rows, columns, width)."""
    return [tokens.unflatten(0, grid) for tokens, grid in zip(entries.split(), entries.grids, strict=True)]


def chunks(items: Iterable, length: int) -> Iterator[list]:
    """Lists of `length` consecutive items; the last may be shorter."""
    items = iter(items)
    while chunk := list(islice(items, length)):
        yield chunk


def size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"


def claim(folder: Path, facts: dict[str, str]) -> None:
    """Record what the folder caches; if it is already a cache, check that it is one of the same data and encoders."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "fingerprint.json"
    if path.exists():
        feature_cache.check(folder, facts)
    else:
        path.write_text(json.dumps(facts, indent=1) + "\n")


def from_cache(settings: dict, folder: Path) -> dict:
    """The same training config reading from the cache: encoders and data are wrapped."""

    def wrap(module: str, name: str, wrapped: dict) -> dict:
        return {"module": f"selfe.{module}", "params": {"cache_dir": str(folder), name: wrapped}}

    system = settings["system"]
    data = wrap("data.cached.CachedData", "source", settings["data"])
    if (encoder := encoder_settings(system["objective"])) is not None:
        data["params"]["features"] = encoder
    encoders = {
        "text_encoder": wrap("encoders.cached_text.CachedText", "encoder", system["text_encoder"]),
        "autoencoder": wrap("encoders.cached_latents.CachedLatents", "autoencoder", system["autoencoder"]),
    }
    return settings | {"system": system | encoders, "data": data}


def encoder_settings(objective: dict) -> dict | None:
    """The settings of the vision encoder of an objective, or of one that it wraps; None if there is none."""
    params = objective["params"]
    if "encoder" in params:
        return params["encoder"]
    return encoder_settings(params["objective"]) if "objective" in params else None


def main(options: argparse.Namespace) -> None:
    """Entry point of `selfe precompute`."""
    settings = config.load(options.config, options.overrides)
    if options.workers is None:
        options.workers = min(4, device.usable_cores())

    with collectives.process_group(timeout_minutes=24 * 60) as world:
        lock = FolderLock(options.out, "--out", lost=partial(launch.end, 1))
        with collectives.on_main(lock, world):
            encode_all(settings, options.out, options, world)


def encode_all(settings: dict, folder: Path, options: argparse.Namespace, world: World) -> None:
    """Build the cache for a training config; called by every process."""
    with torch.device("meta"):
        system = config.build(settings, "system")
    data, trainer = config.build(settings, "data"), without_evaluation(settings)
    if not isinstance(data, BucketedDataset):
        raise UserError(f"data.module: {settings['data']['module']} does not read image files; use manifests or shards")

    # the fingerprint: everything that changes the cached features
    facts = feature_cache.describe("text_encoder", system.text_encoder)
    facts |= feature_cache.describe("autoencoder", system.autoencoder)
    if (encoder := getattr(system.objective, "feature_encoder", None)) is not None:
        facts |= feature_cache.describe("features", encoder)
    facts |= data.facts() | {
        "precompute.one_sample": str(options.one_sample),
        "precompute.captions": str(wanted(system.objective, ["PROMPT"], trainer.max_steps)),
    }
    if world.is_main:
        claim(folder, facts)
    collectives.barrier()

    Precompute(system, data, folder, world, options, trainer).run()
    if world.is_main:
        config.save(from_cache(settings, folder), folder / "config.yaml")
        log.print_line(f"done; train from the cache with ./run.sh {folder / 'config.yaml'}")
