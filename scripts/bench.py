"""Measure, against a peer or a bound, and say in one JSON object whether it holds.

    .venv/bin/python scripts/bench.py data

One thread; CPU seconds, those of worker processes included; contenders take turns, medians count. Exit code 1 if a
bound is missed. `data` needs a peer: scripts/setup.sh --group bench.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from selfe import launch
from selfe.data.manifest import ManifestData
from selfe.dist import World
from selfe.train import MicroBatches
from selfe.types import UserError

PHOTOGRAPHS = Path(__file__).parents[1] / "debug_data" / "t2i_smoke"


def cpu_seconds(work: Callable[[], None]) -> float:
    """Of this process and of those that it started and saw end."""

    def now() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    start = now()
    work()
    return now() - start


def take_turns(contenders: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each, after one round that does not count."""
    seconds = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, work in contenders.items():
            seconds[name].append(cpu_seconds(work))
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def at_least(name: str, value: float, bound: float) -> dict:
    return {"name": name, "value": round(value, 3), "bound": f">= {bound}", "pass": value >= bound}


def data(rounds: int) -> dict:
    """One worker that decodes, resizes and collates: ours against Hugging Face's imagefolder on the same files.

    Two sets of pictures, of 256 and of 1024 pixels a side or so, all cut to 256 x 256 by Lanczos and scaled to [-1, 1].
    """
    figures, verdicts = {}, []
    for side in (256, 1024):
        with tempfile.TemporaryDirectory() as folder:
            count = photographs(Path(folder), side)
            seconds = take_turns({"selfe": ours(folder, count), "imagefolder": peer(folder)}, rounds)
        figures |= {f"{name}, {side} px, pictures per CPU second": round(count / s, 1) for name, s in seconds.items()}
        verdicts.append(at_least(f"data, {side} px: selfe / imagefolder", seconds["imagefolder"] / seconds["selfe"], 1))
    return {"figures": figures, "verdicts": verdicts}


def photographs(folder: Path, side: int, count: int = 128) -> int:
    """Crops of the bundled photographs, enlarged to about this size with a little grain, and a manifest of them."""
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
    feed = ManifestData(f"{folder}/manifest.tsv", folder, pixels=65536, max_aspect=1.0)
    part = MicroBatches(feed, 0, count, 16, 1, World(0, 1, torch.device("cpu")), "train")

    def work() -> None:
        for batch in DataLoader(part, sampler=range(count // 16), batch_size=None, num_workers=1):
            assert all(image.shape == (3, 256, 256) for image in batch.images)

    return work


def peer(folder: str) -> Callable[[], None]:
    try:
        import datasets
    except ImportError as error:
        raise UserError("bench data: the peer is not installed; run scripts/setup.sh --group bench") from error
    datasets.disable_progress_bars()
    pictures = datasets.load_dataset("imagefolder", data_dir=folder, split="train", cache_dir=f"{folder}/cache")

    def tensor(image: Image.Image) -> torch.Tensor:
        image = ImageOps.fit(image.convert("RGB"), (256, 256), method=Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1

    pictures.set_transform(lambda rows: {"image": [tensor(image) for image in rows["image"]]})

    def work() -> None:
        for batch in DataLoader(pictures, batch_size=16, shuffle=True, num_workers=1):
            assert batch["image"].shape[1:] == (3, 256, 256)

    return work


VERBS = {"data": data}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    result = VERBS[options.verb](options.rounds)
    machine = {"machine": f"{platform.machine()}, {platform.system()}", "torch": torch.__version__}
    print(json.dumps({"verb": options.verb} | machine | result, indent=1))
    if not all(verdict["pass"] for verdict in result["verdicts"]):
        sys.exit(1)


if __name__ == "__main__":
    launch.worker(main)
