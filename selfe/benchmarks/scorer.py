"""What the official scorers of benchmarks have in common: the files they read, their command, and what they write."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from selfe.benchmarks.prompt_sets import Prompt
from selfe.errors import UserError
from selfe.evaluation.image_sets import Cell
from selfe.evaluation.metrics import FEWEST_PROMPTS
from selfe.evaluation.statistics import Bootstrap, Estimate


@dataclass(frozen=True)
class Sample:
    """A generated image and its prompt."""

    path: Path
    prompt: Prompt
    number: int  # among the images of the prompt, from 0
    size: tuple[int, int]  # height and width


class Scorer(Protocol):
    """The official scorer of a benchmark, which runs in an environment of its own."""

    title: str
    repository: str
    prompt_set: str | None  # name of the prompt set; None: images of any prompts
    variables: dict[str, str]  # of the shell, besides SCORER and PYTHON: what each has to name
    suffix: str  # of the file with the results
    setup: str  # shell commands before the first call; `same FILE FACT NAME` records a fact and refuses another one
    command: str  # writes "results/$1.partial" + suffix from the files in "images/$1"; "$2" are `options`

    def write(self, folder: Path, samples: Sequence[Sample]) -> str:
        """Write what the scorer reads into an empty folder; returns options of the command. Raises UserError."""
        ...

    def read(self, path: Path, prompts: Sequence[Prompt], count: int, replicates: int) -> dict[str, Estimate]:
        """The values in a file of results.

        Args:
            prompts: those that images were written of, in their order.
            count: number of images that were written.
            replicates: of the intervals.

        Raises:
            UserError: the file is not complete, or not one of this scorer.
        """
        ...


def samples_of(cell: Cell, prompts: Sequence[Prompt] | None) -> list[Sample]:
    """The images of a sampling setting with their prompts, in the order of the prompts and of the images.

    Without a prompt set, every caption is a prompt. Raises UserError for a caption that the set does not have, or a
    file that is missing.
    """
    if prompts is None:
        captions = dict.fromkeys(image["prompt"] for image in cell.images)
        prompts = [Prompt(f"{number:05d}", caption) for number, caption in enumerate(captions)]

    by_text = {prompt.text: prompt for prompt in prompts}
    images: dict[str, list[Sample]] = {prompt.text: [] for prompt in prompts}
    for index, image in enumerate(cell.images):
        text = image["prompt"]
        if text not in by_text:
            raise UserError(
                f"{cell.folder}: the prompt {text[:60]!r} is not one of the benchmark; sample the prompts of selfe "
                "benchmark prompts"
            )
        cell.stamp(index)  # raises UserError if the file is missing
        size = image["height"], image["width"]
        images[text].append(Sample(cell.path(index), by_text[text], len(images[text]), size))
    return [sample for samples in images.values() for sample in samples]


def link(source: Path, target: Path) -> None:
    """Make a file available under another name, without a copy where the file system can do that."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def one_size(samples: Sequence[Sample], title: str) -> tuple[int, int]:
    """Height and width of all images. Raises UserError if they differ."""
    sizes = sorted({sample.size for sample in samples})
    if len(sizes) > 1:
        (height, width), (other_height, other_width) = sizes[:2]
        raise UserError(
            f"{samples[0].path.parent}: {title} needs images of one size, the job has {len(sizes)}, such as {height} x "
            f"{width} and {other_height} x {other_width}; sample all prompts with one size"
        )
    return sizes[0]


def broken(path: Path, problem: str) -> UserError:
    return UserError(f"{path}: {problem}; remove it and run the scorer again")


def bootstrap_of(groups: Sequence[str], replicates: int) -> Bootstrap:
    """Resamples prompts, each with its images; if there are too few, images, as in `selfe evaluate`."""
    places: dict[str, int] = {}
    numbers = [places.setdefault(group, len(places)) for group in groups]
    return Bootstrap(numbers if len(places) >= FEWEST_PROMPTS else range(len(numbers)), replicates)
