"""Benchmark of `selfe evaluate`: peak memory of the process for 1,000 and for 10,000 images.

Jobs of small random images are evaluated against as many others, with 512 features and a `max_features` of 1,000. The
peak is that of the process's own memory, without the pages of files, above that after its imports, in MiB; a thread
reads it every few milliseconds (Linux). The first evaluation of a job computes the features; the second one has other
metrics, and reads them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import at_most
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
COUNTS = (1000, 10_000)  # images
SIDE = 32  # pixels
WIDTH = 512  # features
DISTINCT = 500  # images; all further files are links to these
PAIRS = "kid,cmmd,precision,recall,density,coverage"  # metrics that compare all pairs of `max_features` images
INTERVAL = 0.003  # seconds between two readings of the memory
MOST_GROWTH = 32  # MiB from the smaller to the larger number of images: files and lines of ten times as many


class Projection:
    """An extractor without weights: a random projection of the pixels."""

    has_texts = False

    def record(self) -> dict[str, Any]:
        return {"width": WIDTH}

    def load(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.matrix = torch.randn(3 * SIDE * SIDE, WIDTH, generator=generator).to(device) / SIDE

    def __call__(self, images: Sequence[Tensor], captions: Sequence[str]) -> dict[str, Tensor]:
        return {"features": torch.stack(list(images)).to(self.matrix.device).flatten(1) @ self.matrix}


def write_images(folder: Path, count: int, seed: int) -> None:
    """Random images with the metadata of a sampling job, a prompt for each."""
    folder.mkdir(parents=True)
    source = np.random.default_rng(seed)
    facts = {"negative_prompt": "", "seed": 0, "sample": 0, "height": SIDE, "width": SIDE, "weights": "ema"}
    facts |= {"num_steps": 1, "cfg_scale": 1.0, "s_ratio": 0.0, "sampler": "euler"}
    lines = []
    for number in range(count):
        file = folder / f"{number:05d}.png"
        if number < DISTINCT:
            Image.fromarray(source.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(file)
        else:
            file.hardlink_to(folder / f"{number % DISTINCT:05d}.png")
        lines.append(json.dumps({"file": file.name, "prompt": f"image {number}"} | facts) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))


def own_memory() -> float:
    """Resident memory of this process that is no page of a file, in MiB."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1024


def peak_of(arguments: list[str]) -> float:
    """The largest own memory during an evaluation in this process, above that before it."""
    from selfe import evaluate

    peak = before = own_memory()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(INTERVAL):
            peak = max(peak, own_memory())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    evaluate.main(arguments)
    done.set()
    watcher.join()
    return peak - before


def in_process(arguments: list[str]) -> float:
    """`peak_of` in a process of its own."""
    places = [str(Path(__file__).parent), str(ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def evaluate(rounds: int) -> dict[str, Any]:
    """Peaks by metrics and number of images. One round, whatever `rounds` is: memory is the same in each."""
    peaks: dict[str, dict[int, float]] = {"fd": {}, "pairs": {}}
    with tempfile.TemporaryDirectory() as folder:
        for count in COUNTS:
            job, reference = Path(folder) / f"job_{count}", Path(folder) / f"real_{count}"
            write_images(job, count, seed=0)
            write_images(reference, count, seed=1)
            for name, metrics in (("fd", "fd"), ("pairs", PAIRS)):
                given = {"extractors": {"projection": {"module": "evaluation.Projection"}}, "bootstrap": 4}
                given |= {"reference": str(reference), "metrics": metrics.split(","), "max_features": 1000}
                arguments = [str(job), "-", f"evaluation={json.dumps(given)}"]
                peaks[name][count] = round(in_process(arguments), 1)

    few, many = COUNTS
    checks = [at_most(f"growth of {name}, MiB", by[many] - by[few], MOST_GROWTH) for name, by in peaks.items()]
    return {"peaks": peaks, "checks": checks}


if __name__ == "__main__":
    print(peak_of(sys.argv[1:]))
