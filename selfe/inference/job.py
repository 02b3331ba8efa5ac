"""A sampling job: its images and file names, batches, the split over processes, and the images that already exist.

A file name contains a digest of all settings that determine the pixels, except the step count and the weight values. A
job can therefore be extended (prompts, samples, step counts) and keeps its existing images. Files are written
atomically: a file that exists is complete and is not generated again.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import chain, count, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from selfe import config
from selfe.balance import pack_greedy
from selfe.errors import UserError
from selfe.inference.prompts import Request, sampler_name, shorten
from selfe.io import image_encode
from selfe.io.folder_lock import FolderLock
from selfe.protocols import Denoiser, Sampler
from selfe.rng import SampleRNG
from selfe.samplers.cost import num_evaluations
from selfe.samplers.guidance import Interval

if TYPE_CHECKING:
    from selfe.system import System

Weights = str  # "live" or the name of an average of the weights, such as "ema"
Layout = Literal["flat", "geneval", "npz"]
MOST = 2_000_000  # maximum number of images of a job
GROUPS = "*_steps[0-9]*_cfg*"  # the directories of layout geneval; see `ImageSpec.group`
# in the metadata of an image, besides its settings: facts of the weights, and the number of network evaluations
RESERVED = frozenset(("step", "checkpoint", "fingerprint", "nfe"))
DECODE = 2.0  # cost of encoders and files per image, in denoiser passes; used for load balancing


@dataclass(frozen=True)
class ImageSpec:
    """One image to generate: its file and all settings."""

    file: str  # relative to the output directory
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
    guidance_interval: Interval | None = None
    category: str = ""  # of the prompt; does not change the pixels, and is not in the file

    def record(self) -> dict:
        """All settings that determine the pixels, as stored in metadata; the caller adds the facts of the weights.

        `nfe` is there only if it is not that of one call per step, two with guidance.
        """
        others = ("file", "sampler", "category", "guidance_interval")
        facts = {name: value for name, value in vars(self).items() if name not in others}
        if self.guidance_interval is not None:
            facts["guidance_interval"] = list(self.guidance_interval)
        if self.nfe != self.num_steps * (1 if self.cfg_scale == 1 else 2):
            facts["nfe"] = self.nfe
        return facts | sampler_record(self.sampler)

    @property
    def nfe(self) -> int:
        """Network evaluations."""
        return num_evaluations(self.sampler, self.num_steps, self.cfg_scale, self.guidance_interval)

    @property
    def group(self) -> str:
        """Images with the same group may share a batch; also the name of their directory or array."""
        sampler = "_".join(path_text(value) for value in sampler_record(self.sampler).values())
        guidance, s_ratio = path_text(self.cfg_scale), path_text(self.s_ratio)
        if self.guidance_interval is not None:
            guidance = "_".join([guidance, "from", *map(path_text, self.guidance_interval)])
        return f"{self.weights}_steps{self.num_steps:02d}_cfg{guidance}_s{s_ratio}_{sampler}"

    def cost(self) -> float:
        """Approximate work, in pixels x denoiser passes."""
        return self.height * self.width * (self.nfe + DECODE)


def sampler_record(sampler: Sampler) -> dict:
    """The name of the sampler and its parameters, in YAML types.

    Raises:
        UserError: a parameter has the name of another key of an image's record.
    """
    settings = config.plain(sampler.output_settings())
    if taken := sorted(settings.keys() & RESERVED.union(field.name for field in fields(ImageSpec))):
        raise UserError(
            f"sampler {sampler_name(sampler)}: its parameter {taken[0]} has the name of another setting of an image; "
            "rename the parameter"
        )
    return {"sampler": sampler_name(sampler)} | settings


def path_text(value: Any) -> str:
    """A value as part of a directory name; different values have different texts."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    if re.fullmatch(r"[\w.-]{1,100}", text, re.ASCII):
        return text
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


# ---- plan ----


def plan(requests: Sequence[Request], weights: Sequence[Weights], layout: Layout, suffix: str) -> list[ImageSpec]:
    """All images of a job, prompt by prompt. A repeated line continues the sample numbers of its first occurrence.

    Raises:
        UserError: more images than the limit.
    """
    specs: dict[str, ImageSpec] = {}
    taken: Counter = Counter()
    check_number(requests, len(weights))

    for number, request in enumerate(requests):
        settings = request.settings
        same = (request.prompt, repr(vars(settings) | sampler_record(settings.sampler)))
        first = settings.first_sample

        for i, kind, variant in product(range(settings.num_samples), weights, settings.variants()):
            facts = {
                "prompt": request.prompt,
                "negative_prompt": settings.negative_prompt,
                "seed": settings.seed,
                "sample": first + taken[same] + i,
                "height": settings.height,
                "width": settings.width,
                "weights": kind,
                **variant._asdict(),
                "category": request.category,
            }

            # GenEval names files by prompt and sample number
            spec = ImageSpec(flat_name(ImageSpec("", **facts), suffix), **facts)
            if layout == "geneval":
                spec = ImageSpec(f"{spec.group}/{number:05d}/samples/{first + i:04d}{suffix}", **facts)
            specs.setdefault(spec.file, spec)

        taken[same] += settings.num_samples

    return list(specs.values())


def check_number(requests: Sequence[Request], num_weights: int) -> None:
    """Raise `UserError` at the request that exceeds the maximum number of images."""
    asked = 0
    for request in requests:
        asked += request.settings.num_samples * num_weights * request.settings.num_variants
        if asked > MOST:
            raise UserError(
                f"{request.where}: more than {MOST:,} images up to here; split the prompts into several jobs"
            )


def flat_name(spec: ImageSpec, suffix: str) -> str:
    """File name from prompt, sample number, digest and step count, so that a sweep sorts together."""
    identity = {name: value for name, value in spec.record().items() if name not in ("num_steps", "nfe")}
    digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=6).hexdigest()
    plain = unicodedata.normalize("NFKD", spec.prompt).encode("ascii", "ignore").decode().lower()
    slug = re.sub("[^a-z0-9]+", "-", plain)[:40].strip("-") or "prompt"
    return f"{slug}_{spec.sample:02d}_{digest}_steps{spec.num_steps:02d}{suffix}"


def make_batches(todo: Sequence[ImageSpec], most: int, most_pixels: int, processes: int) -> list[list[ImageSpec]]:
    """Batches of images of the same group, sorted by size, at most `most` images and `most_pixels` pixels each.

    Computed from the complete job, not from the missing images, so that a resumed job has the same batches. The number
    of processes matters only for groups too small to give each process a full batch.
    """
    place = {spec.file: i for i, spec in enumerate(todo)}
    groups = defaultdict(list)
    for spec in todo:
        groups[spec.group].append(spec)

    batches: list[list[ImageSpec]] = []
    for group in groups.values():
        limit = min(most, -(-len(group) // processes))
        pixels = most_pixels + 1  # of the current batch; the initial value starts a new one
        for spec in sorted(group, key=lambda p: (p.height * p.width, p.height)):
            pixels += spec.height * spec.width
            if pixels > most_pixels or len(batches[-1]) == limit:
                batches.append([])
                pixels = spec.height * spec.width
            batches[-1].append(spec)

    # different step counts of the same prompts follow each other, so that their text encodings are still cached
    return sorted(batches, key=lambda batch: (batch[0].weights, place[batch[0].file]))


def share(batches: Sequence[list[ImageSpec]], processes: int) -> list[list[list[ImageSpec]]]:
    """Assign batches to processes greedily: most expensive first, each to the process with the lowest load.

    Batches of the same prompts stay on one process if there are enough of them to balance the load.
    """
    batches_of = defaultdict(list)
    for number, batch in enumerate(batches):
        batches_of[tuple(spec.prompt for spec in batch)].append(number)
    groups = list(batches_of.values())
    if len(groups) < 4 * processes:
        groups = [[number] for number in range(len(batches))]

    costs = [sum(spec.cost() for number in group for spec in batches[number]) for group in groups]
    shares = []
    for indices in pack_greedy(costs, processes):
        numbers = sorted(number for index in indices for number in groups[index])
        shares.append([batches[number] for number in numbers])
    return shares


# ---- generation ----


def random_numbers(batch: Sequence[ImageSpec]) -> SampleRNG:
    """The random numbers of images, which do not depend on the rest of the batch."""
    return SampleRNG.of_images([(spec.seed, spec.prompt, spec.sample) for spec in batch])


def generate(system: System, net: Denoiser, batch: Sequence[ImageSpec]) -> list[Image.Image]:
    """Generate one batch. All its images have the same sampling settings."""
    first = batch[0]
    images = system.generate(
        net,
        [spec.prompt for spec in batch],
        [(spec.height, spec.width) for spec in batch],
        random_numbers(batch),
        sampler=first.sampler,
        num_steps=first.num_steps,
        cfg_scale=first.cfg_scale,
        s_ratio=first.s_ratio,
        guidance_interval=first.guidance_interval,
        negative_prompts=[spec.negative_prompt for spec in batch],
    )
    return [image_encode.to_image(image) for image in images]


# ---- output directory ----


@dataclass(frozen=True)
class Conflict:
    """Why the images in a directory and those of a job do not belong together."""

    message: str
    changed: dict[str, list]  # setting -> its values in this job; empty if the job lacks prompts or combinations


def choose_folder(folder: Path, facts: dict, todo: Sequence[ImageSpec], layout: Layout) -> tuple[Path, str]:
    """The directory for the images of a job: `folder`, or a sub-folder if that contains images with other settings.

    The sub-folder is named after the settings that differ, so that the same job continues in the same one. Evaluators
    expect their layouts in `folder` itself, which `opened` then refuses.

    Returns:
        The directory, and the difference to the images in `folder` ("" if there is none).
    """
    conflict = find_conflict(folder, facts, todo, layout)
    if conflict is None or layout != "flat":
        return folder, ""

    name = folder_name(conflict.changed)
    names = chain([name], (f"{name}_{number}" for number in count(2)))
    path = next(folder / name for name in names if find_conflict(folder / name, facts, todo, layout) is None)
    return path, conflict.message


def folder_name(changed: dict[str, list]) -> str:
    """`cfg_scale_3` for {"cfg_scale": [3.0]}; `prompts` without changed settings, `settings` if there are too many."""
    words = ["_".join([key.rpartition(".")[2], *map(path_text, values)]) for key, values in changed.items()]
    name = "_".join(words) or "prompts"
    return name if len(name) <= 60 else "settings"


@contextmanager
def opened(
    folder: Path, facts: dict, todo: Sequence[ImageSpec], layout: Layout, lost: Callable[[str], None]
) -> Iterator[None]:
    """Lock the output directory for this job, remove partial files and check that existing images belong to the job.

    Called on one process.

    Args:
        facts: settings shared by all images, such as the fingerprint of the weights; stored in `job.json`.
        lost: see `FolderLock`.

    Raises:
        UserError: the directory is not writable, locked, or contains images with other settings.
    """
    with FolderLock(folder, "inferencer.output_dir", lost):
        # partial files of an interrupted job
        for place in (".", "thumbs", f"{GROUPS}/*", f"{GROUPS}/*/samples"):
            for leftover in folder.glob(f"{place}/*{image_encode.PARTIAL}"):
                if leftover.is_file():  # a directory of that name is not ours
                    leftover.unlink()

        # the same weights and shared settings as before
        if conflict := find_conflict(folder, facts, todo, layout):
            raise UserError(
                f"{folder}: {conflict.message}; set another inferencer.output_dir, or revert the change "
                "(prompts and list entries can be added, not removed)"
            )
        stored = json.dumps(read_facts(folder) | facts, indent=1, ensure_ascii=False)
        image_encode.write(folder / "job.json", f"{stored}\n".encode())

        yield


def read_facts(folder: Path) -> dict:
    """What the images of a directory have in common; empty without `job.json`."""
    path = folder / "job.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def differences(there: dict, here: dict) -> dict[str, tuple]:
    """Both values of the keys that differ; keys that only one side has are ignored."""
    return {name: (there[name], here[name]) for name in there if name in here and there[name] != here[name]}


def find_conflict(folder: Path, facts: dict, todo: Sequence[ImageSpec], layout: Layout) -> Conflict | None:
    """The first image or common setting of a directory that is not part of the job, and the setting that changed."""

    def changes_text(changes: dict[str, tuple]) -> str:
        return ", ".join(f"{key} {before!r}, this job has {now!r}" for key, (before, now) in changes.items())

    # the weights and shared settings
    if changes := differences(read_facts(folder), facts):
        keys = ["step"] if "step" in changes else list(changes)
        return Conflict(f"contains images with {changes_text(changes)}", {key: [changes[key][1]] for key in keys})

    # the settings of single images
    planned = {spec.file: spec.record() for spec in todo}
    for file in existing_images(folder):
        if file in planned and layout != "geneval":
            continue  # its name contains a digest of the settings
        record = image_encode.read_record(folder / file)
        if record is None or (file in planned and not differences(record, planned[file])):
            continue

        # report the difference to the most similar image of the job
        prompt = record.get("prompt")
        changes = [differences(record, other) for other in planned.values() if other["prompt"] == prompt]
        if not changes:
            lacking = shorten(str(prompt), 60)
            return Conflict(f"{file} exists with prompt {lacking!r}, which this job lacks", {})
        nearest = min(changes, key=len)
        values = {key: list(dict.fromkeys(spec[key] for spec in planned.values() if key in spec)) for key in nearest}
        return Conflict(f"{file} exists with {changes_text(nearest) or 'other settings'}", values)

    return None


def existing_images(folder: Path) -> Iterator[str]:
    """The image files in an output directory, as relative paths."""
    for pattern in ("*_steps*", f"{GROUPS}/*/samples/*"):
        for path in folder.glob(pattern):
            if path.suffix in image_encode.SUFFIXES.values() and path.stat().st_size:
                yield path.relative_to(folder).as_posix()
