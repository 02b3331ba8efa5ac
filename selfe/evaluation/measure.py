"""Features and metrics of images on any number of processes: what `selfe evaluate` and the trainer have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from selfe import log
from selfe.distributed import collectives
from selfe.distributed.collectives import World
from selfe.errors import UserError
from selfe.evaluation import image_sets, metrics, results
from selfe.evaluation.features import Chunk, FeatureFolder, FeatureSet
from selfe.evaluation.image_sets import Cell, ImageSet
from selfe.evaluation.metrics import METRICS, Measured, Reference
from selfe.evaluation.settings import MetricSettings


@dataclass(frozen=True)
class Job:
    """What is evaluated: the images of a sampling job, their distinct captions and the reference."""

    folder: Path
    cells: list[Cell]
    captions: list[str]
    reference: ImageSet | None


@dataclass(frozen=True)
class Extracted:
    """The features of a job by one extractor."""

    cells: list[FeatureSet]
    reference: FeatureSet | None
    texts: FeatureSet | None


def chosen_metrics(evaluation: MetricSettings) -> list[str]:
    """The names of the metrics. Raises UserError for one that no extractor or no reference allows."""
    for name in evaluation.metrics:
        if name in results.WITH_REFERENCE and evaluation.reference is None:
            option = " (--reference)" if evaluation.section == "evaluation" else ""
            raise UserError(
                f"{evaluation.section}.metrics: {name} compares with real images; set {evaluation.section}.reference"
                f"{option}"
            )
        if METRICS[name].needs_texts and not any(each.has_texts for each in evaluation.extractors.values()):
            raise UserError(
                f"{evaluation.section}.metrics: {name} needs an extractor with a text encoder, such as CLIP"
            )
        if not any(metrics_of(each, [name]) for each in evaluation.extractors.values()):
            raise UserError(f"{evaluation.section}.metrics: {name} needs an extractor that has more than scores")
        if name == "map_diversity" and not any(
            getattr(each, "has_maps", False) for each in evaluation.extractors.values()
        ):
            raise UserError(
                f"{evaluation.section}.metrics: {name} needs an extractor that returns feature maps; set params.maps "
                "of HFExtractor"
            )
    return list(evaluation.metrics or (name for name, metric in METRICS.items() if not metric.on_request))


def metrics_of(extractor: Any, names: Sequence[str]) -> list[str]:
    """Those of the metrics that an extractor is meant for."""
    scores_only = getattr(extractor, "scores_only", False)
    return [name for name in names if METRICS[name].of_scores or not scores_only]


def needs_texts(extractor: Any, names: Sequence[str]) -> bool:
    return extractor.has_texts and any(METRICS[name].needs_texts for name in names)


def open_job(folder: Path, evaluation: MetricSettings) -> Job:
    """The images of a job and of the reference. Raises UserError."""
    cells = image_sets.read_job(folder)
    for cell in cells:
        if len(cell) < 2:
            raise UserError(f"{folder}: {results.label(cell.settings)} has one image; at least 2 are needed")
    return Job(folder, cells, captions_of(cells), open_reference(evaluation, image_sets.common_size(cells)))


def captions_of(cells: Sequence[Cell]) -> list[str]:
    """The distinct captions of all images."""
    return list(dict.fromkeys(image["prompt"] for cell in cells for image in cell.images))


def open_reference(evaluation: MetricSettings, size: tuple[int, int] | None) -> ImageSet | None:
    """The real images, if there are any. Raises UserError.

    Args:
        size: height and width of the generated images; None if they differ.
    """
    if evaluation.reference is None:
        return None
    size, section = evaluation.reference_size or size, evaluation.section
    most, split = evaluation.reference_images, evaluation.reference_split
    return image_sets.open_reference(evaluation.reference, evaluation.base_dir, split, size, most, section)


# ---- features ----


def extract(features: FeatureFolder, job: Job, with_texts: bool, world: World) -> Extracted:
    """Compute the features that are missing, each process a share of the files."""

    real = None if getattr(features.extractor, "scores_only", False) else job.reference

    def plan() -> list[list[Chunk]]:
        sets = [features.of_images(cell) for cell in job.cells]
        sets.append([] if real is None else features.of_images(real))
        sets.append(features.of_captions(job.captions) if with_texts else [])
        return sets

    # the first process looks at the files of images for all
    sets = collectives.broadcast(plan() if world.is_main else None, world)
    *cells, reference, texts = sets
    tasks: list[tuple[Chunk, Callable[[Chunk], None]]] = []
    for images, chunks in zip([*job.cells, real], [*cells, reference], strict=True):
        tasks += [(chunk, partial(features.compute_images, images=images)) for chunk in chunks]
    tasks += [(chunk, partial(features.compute_captions, captions=job.captions)) for chunk in texts]
    distinct = {chunk.file: (chunk, compute) for chunk, compute in tasks}
    existing = collectives.broadcast({file for file in distinct if file.is_file()} if world.is_main else None, world)
    missing = [task for file, task in distinct.items() if file not in existing]

    if missing:
        features.load(world.device)
        mine = missing[world.rank :: world.size]
        total = sum(chunk.stop - chunk.start for chunk, _ in mine)
        progress = log.Progress(f"features of {features.name}", total, quiet=not world.is_main)
        for chunk, compute in mine:
            compute(chunk)
            progress.advance(chunk.stop - chunk.start)
        progress.close()
    collectives.barrier()

    def opened(chunks: list[Chunk]) -> FeatureSet | None:
        return FeatureSet(tuple(chunks), world.device) if chunks else None

    return Extracted([FeatureSet(tuple(chunks), world.device) for chunks in cells], opened(reference), opened(texts))


# ---- metrics ----


def measure(
    extractor: str,
    names: Sequence[str],
    job: Job,
    extracted: Extracted,
    evaluation: MetricSettings,
    world: World,
    quiet: bool = False,
) -> list[results.Value]:
    """The metrics of all cells, each process a share of the cells; the same list on every process.

    `quiet`: show no progress.
    """
    names = metrics_of(evaluation.extractors[extractor], names)
    places = {caption: place for place, caption in enumerate(job.captions)}
    reference = extracted.reference and Reference(extracted.reference, evaluation.max_features)
    texts = extracted.texts and extracted.texts.all("texts")

    mine = []
    numbers = range(world.rank, len(job.cells), world.size)
    progress = log.Progress(f"metrics of {extractor}", len(numbers), quiet=quiet or not world.is_main)
    for number in numbers:
        cell, features = job.cells[number], extracted.cells[number]
        captions = [places[image["prompt"]] for image in cell.images]
        categories = [image.get("category", "") for image in cell.images]
        measured = Measured(features, captions, texts, reference, evaluation, categories)
        for metric, estimate in metrics.compute(names, measured).items():
            mine.append(results.Value(number, extractor, metric, *estimate))
        progress.advance()
    progress.close()
    return sorted((value for values in collectives.gather_on_all(mine, world) for value in values), key=results.order)


def describe(
    job: Job, extracted: Sequence[Extracted], evaluation: MetricSettings, records: dict[str, dict]
) -> dict[str, Any]:
    """What the numbers are about; `extracted`: by each extractor."""
    cells = []
    for cell, features in zip(job.cells, extracted[0].cells, strict=True):
        cells.append({"settings": cell.settings} | cell.record() | {"images": features.digest()})

    reference = None
    seen = [each.reference for each in extracted if each.reference is not None]
    if job.reference is not None and seen:
        size = job.reference.size
        resized = "unchanged" if size is None else f"resized to cover {size[0]} x {size[1]} (Lanczos), centre crop"
        reference = {"path": str(evaluation.reference), "count": len(job.reference), "resized": resized}
        reference |= {"images": seen[0].digest()}
    return {
        "folder": str(job.folder),
        "cells": cells,
        "reference": reference,
        "extractors": records,
        "settings": evaluation.record(),
        "bootstrap": evaluation.bootstrap,
    }
