"""A sampling job: its pictures and their names, the batches they are drawn in, who draws which, what is there already.

A picture's name holds a digest of everything that decides its pixels but the step count and the weights' numbers, so a
job may grow (more prompts, samples, step counts), and what is drawn stays. A file that is there is whole and is done.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

from selfe.inference.prompts import Request, SamplingDefaults, shorten, sweep
from selfe.io import image_encode
from selfe.protocols import Sampler
from selfe.types import UserError

Weights = Literal["ema", "live"]
Layout = Literal["flat", "geneval", "npz"]
MOST = 2_000_000  # pictures of a job
DECODE = 2.0  # cost of encoders and files per picture, in passes of the denoiser; only for sharing work out


@dataclass(frozen=True)
class ImageSpec:
    """One file to draw."""

    file: str  # relative to the job's folder
    prompt: str
    negative_prompt: str
    seed: int
    sample: int
    height: int
    width: int
    num_steps: int
    cfg_scale: float
    s_ratio: float
    sampler: Sampler
    weights: Weights

    def record(self) -> dict:
        """All that decides the pixels, for people and machines; the weights' own facts are added by who loads them."""
        facts = {name: value for name, value in vars(self).items() if name not in ("file", "sampler")}
        return facts | sampler_record(self.sampler)

    @property
    def group(self) -> str:
        """Pictures that may share a batch; also the name of their folder or array."""
        sampler = "_".join(f"{value:g}" if isinstance(value, float) else str(value) for value in self.sampler_values)
        return f"{self.weights}_steps{self.num_steps:02d}_cfg{self.cfg_scale:g}_s{self.s_ratio:g}_{sampler}"

    @property
    def sampler_values(self) -> tuple:
        return tuple(sampler_record(self.sampler).values())

    def cost(self) -> float:
        """Work, in pixels through the denoiser; guidance 1 is at half."""
        return self.height * self.width * (self.num_steps * (1 if self.cfg_scale == 1 else 2) + DECODE)


def sampler_record(sampler: Sampler) -> dict:
    """The sampler as the file of selfe/samplers that holds it, and its parameters."""
    return {"sampler": type(sampler).__module__.rpartition(".")[2]} | vars(sampler)


# ---- what to draw ----


def plan(requests: Sequence[Request], weights: Sequence[Weights], layout: Layout, suffix: str) -> list[ImageSpec]:
    """Every picture of a job, prompt by prompt. A line that is given twice goes on counting samples."""
    found: dict[str, ImageSpec] = {}
    taken: Counter = Counter()
    check_number(requests, len(weights))
    for number, request in enumerate(requests):
        settings = request.settings
        same = (request.prompt, repr(vars(settings) | sampler_record(settings.sampler)))
        first = settings.first_sample
        for i, kind, cfg_scale, s_ratio, num_steps in product(range(settings.num_samples), weights, *sweeps(settings)):
            facts = {
                "prompt": request.prompt,
                "negative_prompt": settings.negative_prompt,
                "seed": settings.seed,
                "sample": first + taken[same] + i,
                "height": settings.height,
                "width": settings.width,
                "num_steps": num_steps,
                "cfg_scale": cfg_scale,
                "s_ratio": s_ratio,
                "sampler": settings.sampler,
                "weights": kind,
            }
            picture = ImageSpec(flat_name(ImageSpec("", **facts), suffix), **facts)
            if layout == "geneval":
                picture = ImageSpec(f"{picture.group}/{number:05d}/samples/{first + i:04d}{suffix}", **facts)
            found.setdefault(picture.file, picture)
        taken[same] += settings.num_samples
    return list(found.values())


def sweeps(settings: SamplingDefaults) -> tuple[tuple, tuple, tuple]:
    return sweep(settings.cfg_scale), sweep(settings.s_ratio), sweep(settings.num_steps)


def check_number(requests: Sequence[Request], num_weights: int) -> None:
    asked = 0
    for request in requests:
        asked += request.settings.num_samples * num_weights * math.prod(map(len, sweeps(request.settings)))
        if asked > MOST:
            raise UserError(f"{request.where}: more than {MOST:,} pictures up to here; share the prompts among jobs")


def flat_name(picture: ImageSpec, suffix: str) -> str:
    """Prompt, sample number, digest, step count: files sort so that a sweep lies together."""
    identity = {name: value for name, value in picture.record().items() if name != "num_steps"}
    digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=6).hexdigest()
    plain = unicodedata.normalize("NFKD", picture.prompt).encode("ascii", "ignore").decode().lower()
    slug = re.sub("[^a-z0-9]+", "-", plain)[:40].strip("-") or "prompt"
    return f"{slug}_{picture.sample:02d}_{digest}_steps{picture.num_steps:02d}{suffix}"


def batches(todo: Sequence[ImageSpec], most: int, most_pixels: int, processes: int) -> list[list[ImageSpec]]:
    """All pictures of a job in batches of one group, similar sizes side by side.

    Made of the whole job, not of what is missing, so that a job that goes on has the batches that it had. The number of
    processes matters only for groups too small to give each process a full batch.
    """
    place = {picture.file: i for i, picture in enumerate(todo)}
    groups = defaultdict(list)
    for picture in todo:
        groups[picture.group].append(picture)
    made: list[list[ImageSpec]] = []
    for group in groups.values():
        limit = min(most, -(-len(group) // processes))
        pixels = most_pixels + 1  # of the batch being filled; so that the first picture opens one
        for picture in sorted(group, key=lambda p: (p.height * p.width, p.height)):
            pixels += picture.height * picture.width
            if pixels > most_pixels or len(made[-1]) == limit:
                made.append([])
                pixels = picture.height * picture.width
            made[-1].append(picture)
    # the step counts of the same prompts one after the other, so that their text is still at hand
    return sorted(made, key=lambda batch: (batch[0].weights, place[batch[0].file]))


def share(made: Sequence[list[ImageSpec]], processes: int) -> list[list[list[ImageSpec]]]:
    """Batches for each process: the costliest first, each to who has least. Batches of the same prompts stay together
    where there are enough others to balance."""
    units = defaultdict(list)
    for number, batch in enumerate(made):
        units[tuple(picture.prompt for picture in batch)].append(number)
    parts = list(units.values())
    if len(parts) < 4 * processes:
        parts = [[number] for number in range(len(made))]

    def cost(part: list[int]) -> float:
        return sum(picture.cost() for number in part for picture in made[number])

    shares: list[list[int]] = [[] for _ in range(processes)]
    loads = [0.0] * processes
    for part in sorted(parts, key=cost, reverse=True):
        least = loads.index(min(loads))
        loads[least] += cost(part)
        shares[least] += part
    return [[made[number] for number in sorted(numbers)] for numbers in shares]


# ---- what is there ----


@contextmanager
def opened(folder: Path, facts: dict, todo: Sequence[ImageSpec], layout: Layout) -> Iterator[None]:
    """Keep a folder for this job, on one process: nobody else draws into it, no half-written file is left, and all that
    it holds belongs to the job.

    Args:
        facts: what all pictures share, weights' fingerprints and the like; `job.json` keeps them.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror}); set inferencer.output_dir") from error
    with lock:  # let go of when the process ends, however it ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another process draws into it; wait, or set inferencer.output_dir") from error
        for place in (".", "thumbs", "*_steps*/*", "*_steps*/*/samples"):
            for leftover in folder.glob(f"{place}/*{image_encode.PARTIAL}"):
                if leftover.is_file():  # a folder of that name is somebody else's
                    leftover.unlink()
        path = folder / "job.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if changed := differences(known, facts):
            raise UserError(f"{folder}: was drawn with {changed}; set another inferencer.output_dir, or go back")
        check_leftovers(folder, todo, layout)
        image_encode.write(path, (json.dumps(known | facts, indent=1, ensure_ascii=False) + "\n").encode())
        yield


def differences(there: dict, here: dict) -> str:
    """What two descriptions say differently; what only one of them says is no difference."""
    names = [name for name in there if name in here and there[name] != here[name]]
    return ", ".join(f"{name} {there[name]!r}, this job has {here[name]!r}" for name in names)


def check_leftovers(folder: Path, todo: Sequence[ImageSpec], layout: Layout) -> None:
    """A picture in the folder that the job would not draw is a changed setting, and the line says which."""
    planned = {picture.file: picture.record() for picture in todo}
    for file in drawn(folder):
        if file in planned and layout != "geneval":
            continue  # its name holds its settings
        record = image_encode.read_record(folder / file)
        if record is None or (file in planned and not differences(record, planned[file])):
            continue
        alike = [differences(record, other) for other in planned.values() if other["prompt"] == record.get("prompt")]
        change = min(alike, key=len, default=f"prompt {shorten(str(record.get('prompt')), 60)!r}, which this job lacks")
        raise UserError(
            f"{folder}: {file} is there with {change}; set another inferencer.output_dir, or go back "
            "(prompts and list entries may be added, not taken away)"
        )


def drawn(folder: Path) -> Iterator[str]:
    """The picture files of a job's folder."""
    for pattern in ("*_steps*", "*_steps*/*/samples/*"):
        for path in folder.glob(pattern):
            if path.suffix in image_encode.SUFFIXES.values() and path.stat().st_size:
                yield path.relative_to(folder).as_posix()
