"""Evaluation: `python -m selfe.evaluate CONFIG_OR_JOB SETTINGS [key=value ...]`, started by `selfe evaluate`.

A config is sampled first: what is missing of its sampling job is generated. Every process then computes its share of
the features, and the metrics of its share of the sampling settings. The results do not depend on the number of
processes; features that exist are kept.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from selfe import config, errors, infer, launch, log
from selfe.distributed import collectives
from selfe.distributed.collectives import World
from selfe.errors import UserError
from selfe.evaluation import image_sets, metrics, results, tables
from selfe.evaluation.features import Chunk, FeatureFolder, FeatureSet
from selfe.evaluation.image_sets import Cell, ImageSet
from selfe.evaluation.metrics import METRICS, Measured, Reference
from selfe.evaluation.settings import EvaluationConfig
from selfe.io import image_encode
from selfe.io.folder_lock import FolderLock


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


def run(settings: dict, folder: Path, world: World) -> None:
    """Evaluate the sampling job in a folder and write `evaluation.json` there. Raises UserError."""
    begun = time.monotonic()
    evaluation: EvaluationConfig = config.build(settings, "evaluation")
    names = chosen_metrics(evaluation)
    lock = FolderLock(folder, "inferencer.output_dir", partial(launch.end, 1))
    with errors.writing_to(folder), collectives.on_main(lock, world):
        # raised on every process, which reads the same files
        job = open_job(folder, evaluation)

        values, records = [], {}
        for name, extractor in evaluation.extractors.items():
            records[name] = collectives.broadcast(extractor.record() if world.is_main else None, world)
            place = evaluation.feature_dir or folder / "features"
            features = FeatureFolder(place, name, extractor, records[name], evaluation.batch_size)
            extracted = extract(features, job, needs_texts(extractor, names), world)
            values += measure(name, names, job, extracted, evaluation, world)

        if world.is_main:
            facts = describe(job, extracted, evaluation, records)
            evaluated = results.Evaluation(**facts, values=values)
            image_encode.write(folder / results.FILE, evaluated.to_json().encode())
            for path in evaluation.table:
                image_encode.write(path, tables.written([evaluated], path.suffix).encode())
            log.print_line(tables.plain([evaluated]))
            images = log.count(sum(map(len, job.cells)), "image", "images")
            log.print_line(f"{folder / results.FILE}: {images} evaluated in {log.duration(time.monotonic() - begun)}")


def chosen_metrics(evaluation: EvaluationConfig) -> list[str]:
    """The names of the metrics. Raises UserError for one that no extractor or no reference allows."""
    for name in evaluation.metrics:
        if name in results.WITH_REFERENCE and evaluation.reference is None:
            raise UserError(f"evaluation.metrics: {name} compares with real images; set --reference")
        if METRICS[name].needs_texts and not any(each.has_texts for each in evaluation.extractors.values()):
            raise UserError(f"evaluation.metrics: {name} needs an extractor with a text encoder, such as CLIP")
    return list(evaluation.metrics or (name for name, metric in METRICS.items() if not metric.on_request))


def needs_texts(extractor: Any, names: Sequence[str]) -> bool:
    return extractor.has_texts and any(METRICS[name].needs_texts for name in names)


def open_job(folder: Path, evaluation: EvaluationConfig) -> Job:
    """The images of a job and of the reference. Raises UserError."""
    cells = image_sets.read_job(folder)
    for cell in cells:
        if len(cell) < 2:
            raise UserError(f"{folder}: {results.label(cell.settings)} has one image; at least 2 are needed")
    captions = list(dict.fromkeys(image["prompt"] for cell in cells for image in cell.images))

    reference = None
    if evaluation.reference is not None:
        size = evaluation.reference_size or image_sets.common_size(cells)
        most, split = evaluation.reference_images, evaluation.reference_split
        reference = image_sets.open_reference(evaluation.reference, evaluation.base_dir, split, size, most)
    return Job(folder, cells, captions, reference)


# ---- features ----


def extract(features: FeatureFolder, job: Job, with_texts: bool, world: World) -> Extracted:
    """Compute the features that are missing, each process a share of the files."""

    def plan() -> list[list[Chunk]]:
        sets = [features.of_images(cell) for cell in job.cells]
        sets.append([] if job.reference is None else features.of_images(job.reference))
        sets.append(features.of_captions(job.captions) if with_texts else [])
        return sets

    # the first process looks at the files of images for all
    sets = collectives.broadcast(plan() if world.is_main else None, world)
    *cells, reference, texts = sets
    works: list[tuple[Chunk, Callable[[Chunk], None]]] = []
    for images, chunks in zip([*job.cells, job.reference], [*cells, reference], strict=True):
        works += [(chunk, partial(features.compute_images, images=images)) for chunk in chunks]
    works += [(chunk, partial(features.compute_captions, captions=job.captions)) for chunk in texts]
    distinct = {chunk.file: (chunk, compute) for chunk, compute in works}
    existing = collectives.broadcast({file for file in distinct if file.is_file()} if world.is_main else None, world)
    missing = [work for file, work in distinct.items() if file not in existing]

    if missing:
        features.extractor.load(world.device)
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
    extractor: str, names: Sequence[str], job: Job, extracted: Extracted, evaluation: EvaluationConfig, world: World
) -> list[results.Value]:
    """The metrics of all cells, each process a share of the cells; the same list on every process."""
    places = {caption: place for place, caption in enumerate(job.captions)}
    reference = extracted.reference and Reference(extracted.reference, evaluation.max_features)
    texts = extracted.texts and extracted.texts.all("texts")

    mine = []
    numbers = range(world.rank, len(job.cells), world.size)
    progress = log.Progress(f"metrics of {extractor}", len(numbers), quiet=not world.is_main)
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


def describe(job: Job, extracted: Extracted, evaluation: EvaluationConfig, records: dict[str, dict]) -> dict[str, Any]:
    """What the numbers are about."""
    cells = []
    for cell, features in zip(job.cells, extracted.cells, strict=True):
        cells.append({"settings": cell.settings} | cell.record() | {"images": features.digest()})

    reference = None
    if job.reference is not None:
        size = job.reference.size
        resized = "unchanged" if size is None else f"resized to cover {size[0]} x {size[1]} (Lanczos), centre crop"
        reference = {"path": str(evaluation.reference), "count": len(job.reference), "resized": resized}
        reference |= {"images": extracted.reference.digest()}
    return {
        "folder": str(job.folder),
        "cells": cells,
        "reference": reference,
        "extractors": records,
        "settings": evaluation.record(),
        "bootstrap": evaluation.bootstrap,
    }


def main(arguments: list[str]) -> None:
    """CONFIG_OR_JOB SETTINGS [key=value ...]; SETTINGS: a file with the section evaluation of a job, or -."""
    path, file, *overrides = arguments
    is_job = Path(path).is_dir()
    settings = config.load((None if file == "-" else file) if is_job else path, overrides)
    generate = None if is_job else infer.prepare(settings)

    # long timeout: as in `infer`
    with collectives.process_group(timeout_minutes=24 * 60) as world:
        folder = Path(path) if generate is None else generate(world)
        run(settings, folder, world)


if __name__ == "__main__":
    launch.worker(lambda: main(sys.argv[1:]))
