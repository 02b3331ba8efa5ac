"""Benchmarks of the data path: loader, a manifest of ten million lines, feature cache."""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measure import at_least, at_most, cpu_seconds, take_turns
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from selfe import config
from selfe.data.loader import MicroBatches, make_loader
from selfe.data.manifest import ManifestData
from selfe.distributed import collectives
from selfe.distributed.collectives import World
from selfe.errors import UserError
from selfe.protocols import Data
from selfe.rng import SampleRNG
from selfe.system import System
from selfe.tools import precompute

ROOT = Path(__file__).parents[2]
PHOTOGRAPHS, SMOKE = ROOT / "debug_data" / "t2i_smoke", ROOT / "configs" / "debug" / "selfe_smoke.yaml"
SELF_EVALUATING, NUM_STEPS = 4, 4  # first self-evaluation step of the smoke config; steps timed


def data(rounds: int) -> dict:
    """One worker process that decodes, resizes and collates, against Hugging Face's imagefolder on the same files.

    Two sets of images, with sides of about 256 and 1024 pixels, all cropped and resized to 256 x 256 (Lanczos) and
    scaled to [-1, 1].
    """
    figures, checks = {}, []
    for side in (256, 1024):
        with tempfile.TemporaryDirectory() as folder:
            count = photographs(Path(folder), side)
            seconds = take_turns({"selfe": ours(folder, count), "imagefolder": peer(folder)}, rounds)
        figures |= {f"{name}, {side} px, images per CPU second": round(count / s, 1) for name, s in seconds.items()}
        checks.append(at_least(f"data, {side} px: selfe / imagefolder", seconds["imagefolder"] / seconds["selfe"], 1))
    return {"figures": figures, "checks": checks}


def photographs(folder: Path, side: int, count: int = 128) -> int:
    """Write `count` crops of the bundled photographs, upscaled to about `side` pixels with noise, and a manifest."""
    names = sorted((PHOTOGRAPHS / "images").glob("*.jpg"))
    lines, random = [], np.random.default_rng(0)

    for i in range(count):
        with Image.open(names[i % len(names)]) as image:
            pixels = ImageOps.fit(image.convert("RGB"), (side, side + 16 * (i % 5)), centering=(random.random(), 0.5))

        pixels = np.asarray(pixels) + random.normal(0, 4, (*pixels.size[::-1], 1))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:05d}.jpg", quality=90)
        lines.append(f"{i:05d}.jpg\ta photograph\n")

    (folder / "manifest.tsv").write_text("".join(lines))
    return count


def ours(folder: str, count: int) -> Callable[[], None]:
    """An epoch of selfe's loader, in batches of 16."""
    dataset = ManifestData(f"{folder}/manifest.tsv", folder, pixels=65536, max_aspect=1.0)
    part = MicroBatches(dataset, 0, lambda step: range(count), 16, 1, World(0, 1, torch.device("cpu")), "train")

    def work() -> None:
        for batch in make_loader(part, [(0, place) for place in range(count // 16)], num_workers=1):
            assert all(image.shape == (3, 256, 256) for image in batch.images)

    return work


def peer(folder: str) -> Callable[[], None]:
    """An epoch of imagefolder with a DataLoader, in batches of 16."""
    try:
        import datasets
    except ImportError as error:
        raise UserError("bench data: datasets is not installed; run scripts/setup.sh --group bench") from error
    datasets.disable_progress_bars()
    peer = datasets.load_dataset("imagefolder", data_dir=folder, split="train", cache_dir=f"{folder}/cache")

    def tensor(image: Image.Image) -> torch.Tensor:
        image = ImageOps.fit(image.convert("RGB"), (256, 256), method=Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1

    peer.set_transform(lambda rows: {"image": [tensor(image) for image in rows["image"]]})

    def work() -> None:
        for batch in DataLoader(peer, batch_size=16, shuffle=True, num_workers=1):
            assert batch["image"].shape[1:] == (3, 256, 256)

    return work


def manifest(rounds: int) -> dict:
    """A manifest of ten million lines with sizes: seconds to index and to open, memory of a process and two workers.

    Memory is relative to the same processes on a manifest of 1000 lines, after each has planned 100 global batches of
    1024. Shared pages are divided among the processes that map them (Pss).
    """
    with tempfile.TemporaryDirectory() as folder:
        small, large = lines(Path(folder), 1000), lines(Path(folder), 10_000_000)
        indexed = cpu_seconds(lambda: ManifestData(str(large)))
        opened = statistics.median(cpu_seconds(lambda: ManifestData(str(large))) for _ in range(rounds))
        before, after = (memory(ManifestData(str(path))) for path in (small, large))
        size = large.stat().st_size
    return {
        "figures": {"CPU seconds to index": round(indexed, 2), "megabytes of the file": round(size / 1e6)},
        "checks": [
            at_most("manifest: seconds to open when indexed", opened, 5),
            at_most("manifest: MB in three processes, more than for a thousand lines", (after - before) / 1e6, 200),
        ],
    }


def lines(folder: Path, count: int) -> Path:
    """Write a manifest of `count` lines with sizes; its images do not exist."""
    manifest = folder / f"{count}.tsv"
    with manifest.open("w") as file:
        for i in range(count):
            path, prompt = f"images/{i // 10000:05d}/{i:09d}.jpg", f"image {i}, with a caption of a typical length"
            file.write(f"{path}\t{prompt}\t{512 + i % 300}\t{400 + i % 200}\n")
    return manifest


class Planned(Dataset):
    """A Dataset whose item is (process id, bytes in use) after planning a global batch."""

    def __init__(self, dataset: ManifestData):
        self.dataset = dataset

    def __getitem__(self, step: int) -> tuple[int, int]:
        self.dataset.costs(0, step, range(1024 * step, 1024 * step + 1024), "train")
        self.dataset.sources["train"][0].prompt(step)
        return os.getpid(), resident()


def memory(dataset: ManifestData) -> int:
    """Bytes in this process and two workers together, after all of them have planned batches."""
    last = dict(DataLoader(Planned(dataset), sampler=range(200), batch_size=None, num_workers=2))
    for step in range(200, 300):
        dataset.costs(0, step, range(1024 * step, 1024 * step + 1024), "train")
    return sum(last.values()) + resident()


def resident() -> int:
    """Proportional set size of this process in bytes (Linux)."""
    (line,) = (line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
    return int(line.split()[1]) * 1024


def cache(rounds: int) -> dict:
    """A training step of the smoke system on the bundled photographs, from images and from the feature cache.

    The time saved is compared with the cost of decoding images and running the encoders.
    """
    with tempfile.TemporaryDirectory() as folder, collectives.process_group() as world:
        settings = config.load(SMOKE, ["system.text_encoder.params.skip_pretrained=1", "trainer.micro_batch_size=8"])
        settings["system"]["autoencoder"]["params"]["skip_pretrained"] = True

        # fill the cache, then build both systems
        options = argparse.Namespace(workers=0, batch_size=32, one_sample=False)
        precompute.encode_all(settings, Path(folder), options, world)
        live, cached = (loaded(s) for s in (settings, config.load(f"{folder}/config.yaml")))

        works = {
            "step from images": lambda: steps(*live),
            "step from the cache": lambda: steps(*cached),
            "images and encoders alone": lambda: steps(*live, encoders_only=True),
            "reading the cache alone": lambda: steps(*cached, encoders_only=True),
        }
        seconds = {name: value / NUM_STEPS for name, value in take_turns(works, rounds).items()}

    images, cache, encoders, reading = seconds.values()
    saved = (images - cache) / (encoders - reading)
    checks = [
        at_least("cache: step from images / step from the cache", images / cache, 1),
        at_least("cache: time saved / what encoding costs more than reading", saved, 0.9),
    ]
    return {"figures": {f"{name}, CPU seconds": round(s, 4) for name, s in seconds.items()}, "checks": checks}


def loaded(settings: dict) -> tuple[System, Data]:
    """System with initial weights on the CPU, and data, of a config."""
    with torch.device("meta"):
        system = config.build(settings, "system")

    system.backbone.to_empty(device="cpu")
    for name, parameter in system.backbone.named_parameters():
        parameter.data.copy_(system.backbone.initial(name, parameter.shape, 0))
    system.load_encoders(torch.device("cpu"))
    return system, config.build(settings, "data")


def steps(system: System, data: Data, encoders_only: bool = False) -> None:
    """Forward and backward of `NUM_STEPS` batches of 8, or only their encoding."""
    for step in range(SELF_EVALUATING, SELF_EVALUATING + NUM_STEPS):
        batch = data.batch(0, step, range(8 * step, 8 * step + 8), range(8), "train").to(torch.device("cpu"))
        rng = SampleRNG.of_step(0, step, batch.positions)
        if encoders_only:
            system.encode(system.objective.captions(batch.prompts, rng, step))
            system.autoencoder.encode(batch.images, rng)
        else:
            system.loss(system.backbone, system.backbone, batch, rng, step).per_sample.mean().backward()
            system.backbone.zero_grad()
