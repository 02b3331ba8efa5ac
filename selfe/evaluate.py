"""Evaluation: `python -m selfe.evaluate CONFIG_OR_JOB SETTINGS [key=value ...]`, started by `selfe evaluate`.

A config is sampled first: what is missing of its sampling job is generated. Every process then computes its share of
the features, and the metrics of its share of the sampling settings. The results do not depend on the number of
processes; features that exist are kept.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

from selfe import config, errors, infer, launch, log
from selfe.distributed import collectives
from selfe.distributed.collectives import World
from selfe.evaluation import measure, results, tables
from selfe.evaluation.features import FeatureFolder
from selfe.evaluation.settings import EvaluationConfig
from selfe.io import image_encode
from selfe.io.folder_lock import FolderLock


def run(settings: dict, folder: Path, world: World) -> None:
    """Evaluate the sampling job in a folder and write `evaluation.json` there. Raises UserError."""
    begun = time.monotonic()
    evaluation: EvaluationConfig = config.build(settings, "evaluation")
    names = measure.chosen_metrics(evaluation)
    lock = FolderLock(folder, "inferencer.output_dir", partial(launch.end, 1))
    with errors.writing_to(folder), collectives.on_main(lock, world):
        # raised on every process, which reads the same files
        job = measure.open_job(folder, evaluation)

        values, records, extracted = [], {}, []
        for name, extractor in evaluation.extractors.items():
            records[name] = collectives.broadcast(extractor.record() if world.is_main else None, world)
            place = evaluation.feature_dir or folder / "features"
            features = FeatureFolder(place, name, extractor, records[name], evaluation.batch_size, evaluation.section)
            extracted.append(measure.extract(features, job, measure.needs_texts(extractor, names), world))
            values += measure.measure(name, names, job, extracted[-1], evaluation, world)

        if world.is_main:
            facts = measure.describe(job, extracted, evaluation, records)
            evaluated = results.Evaluation(**facts, values=values)
            image_encode.write(folder / results.FILE, evaluated.to_json().encode())
            for path in evaluation.table:
                image_encode.write(path, tables.written([evaluated], path.suffix).encode())
            log.print_line(tables.plain([evaluated]))
            images = log.count(sum(map(len, job.cells)), "image", "images")
            log.print_line(f"{folder / results.FILE}: {images} evaluated in {log.duration(time.monotonic() - begun)}")


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
