"""Evaluation during training: images of fixed prompts from fixed noise, measured as `selfe evaluate` does.

Every process generates a share of the images with the EMA weights, and computes their features; images are not kept.
The values do not depend on the number of processes, and training does not depend on the evaluation: nothing is drawn
from a generator that has a state.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from selfe import config
from selfe.checkpoint import state
from selfe.distributed import collectives
from selfe.distributed.collectives import World
from selfe.errors import UserError
from selfe.evaluation import image_sets, measure, metrics, results
from selfe.evaluation.features import Chunk, FeatureFolder, FeatureSet
from selfe.evaluation.image_sets import PER_IMAGE, Cell, ImageSet
from selfe.evaluation.measure import Extracted, Job
from selfe.evaluation.results import BY_NEIGHBOURS, NEITHER, WITHIN_PROMPTS, Evaluation, Value
from selfe.evaluation.settings import MetricSettings
from selfe.inference import job, prompts
from selfe.inference.job import ImageSpec
from selfe.inference.prompts import Request, SamplingDefaults
from selfe.io import image_encode
from selfe.protocols import Sampler
from selfe.samplers.renoise import Renoise
from selfe.system import System
from selfe.types import MOST_SAMPLES, check_period, check_range

# sub-folders for features: of the reference and the captions, and of generated images during an evaluation
CONSTANT, GENERATED = "features", "generated"


@dataclass(frozen=True)
class TrainingEvaluation(MetricSettings):
    """Evaluation of the EMA weights during training, always with the same prompts and the same noise."""

    section: ClassVar[str] = "trainer.evaluate"
    # how messages call the number of images and the prompts
    images_key: ClassVar[str] = "trainer.evaluate.num_images"
    prompts_key: ClassVar[str] = "trainer.evaluate.prompt_file"

    every: int = 5000  # steps between evaluations
    num_images: int = 1000  # images for each number of sampling steps
    # prompts, evenly spaced over a file (.txt, .tsv, .jsonl); default: the captions of the reference
    prompt_file: Path | None = None
    num_samples: int = 1  # images per prompt; diversity needs 2
    seed: int = 0  # of the noise, together with the prompt and the number of the sample
    size: tuple[int, int] = (256, 256)  # height, width
    num_steps: tuple[int, ...] = (1, 2, 4, 8, 32)  # numbers of sampling steps, each evaluated
    cfg_scale: float = 5.0  # guidance; 1 is none
    s_ratio: float = 0.0  # second time of a sampling step: 0 for few steps, 1 as in flow matching
    # times between which guidance applies, as shares of the steps: 1 is the first step; null: at all times
    guidance_interval: tuple[float, float] | None = None
    # how the images are sampled
    sampler: Sampler = Renoise()  # noqa: RUF009 - stateless
    batch_size: int = 16  # images that a process generates and measures at once
    bootstrap: int = 0  # replicates of a 95 % interval; 0: no intervals
    # a value by its name in metrics.jsonl, such as eval/dino/fd/steps_4: the checkpoint with the best one is kept as
    # checkpoints/best
    keep_best: str | None = None

    def __post_init__(self):
        super().__post_init__()
        check_period("every", self.every, off="trainer.evaluate=null")
        check_range("num_images", self.num_images, 2, MOST_SAMPLES)
        check_range("batch_size", self.batch_size, 1, MOST_SAMPLES)
        self.sampling()  # checks the ranges of its settings
        if self.num_images % self.num_samples:
            raise ValueError(f"num_images: {self.num_images} is not a multiple of num_samples, {self.num_samples}")
        for name in set(WITHIN_PROMPTS) & set(self.metrics) if self.num_samples == 1 else ():
            raise ValueError(f"metrics: {name} compares images of one prompt; set num_samples to 2 or more")

    def sampling(self) -> SamplingDefaults:
        """The sampling settings of all images. Raises ValueError for values out of range."""
        names = ("num_samples", "seed", "num_steps", "cfg_scale", "s_ratio", "guidance_interval", "sampler")
        height, width = self.size
        return SamplingDefaults(**{name: getattr(self, name) for name in names}, height=height, width=width)


class Evaluator:
    """Evaluates the EMA weights of a run. Exists on every rank, and all ranks must call its methods."""

    def __init__(self, cfg: TrainingEvaluation, system: System, run: Path, world: World):
        """Check the settings and choose the prompts; loads nothing. Raises UserError.

        Args:
            run: output directory of the run.
        """
        self.cfg, self.system, self.world = cfg, system, world
        self.folder = run / results.DURING_TRAINING
        self.names = measure.chosen_metrics(cfg)

        # every process reads the same files
        system.check_sampling(cfg.sampler, cfg.s_ratio)
        self.reference = measure.open_reference(cfg, cfg.size)
        check_neighbours(cfg, self.names, self.reference)
        self.requests = choose_prompts(cfg, self.reference, system.autoencoder.multiple)
        self.captions = list(dict.fromkeys(request.prompt for request in self.requests))
        self.categories = list(dict.fromkeys(request.category for request in self.requests if request.category))
        self.specs = self.plan(cfg.sampling())

        # by extractor
        self.records: dict[str, dict[str, Any]] = {}
        self.constant: dict[str, Extracted] = {}  # features of the reference and of the captions
        self.generated: dict[str, FeatureFolder] = {}
        self.keys: list[str] = []  # the values by which a checkpoint or a setting can be chosen

    def plan(self, settings: SamplingDefaults, weights: str = "ema") -> list[list[ImageSpec]]:
        """The images of all prompts with these settings, a list for each number of steps."""
        requests = [replace(request, settings=settings) for request in self.requests]
        specs = job.plan(requests, (weights,), "flat", image_encode.SUFFIXES["png"])
        counts = sorted({spec.num_steps for spec in specs})
        return [[spec for spec in specs if spec.num_steps == count] for count in counts]

    def prepare(self) -> None:
        """Load the extractors, and compute the features of reference and captions that are missing.

        What would fail in an evaluation fails here, before the first step. Raises UserError.
        """
        cfg, world = self.cfg, self.world
        if getattr(self.system.autoencoder, "is_preview", False):
            raise UserError(
                f"{cfg.section}: the autoencoder is not loaded when training from a cache, and a linear preview cannot "
                "be evaluated; set system.autoencoder.params.decode=true, or remove this section"
            )
        self.system.autoencoder.noise([cfg.size], job.random_numbers(self.specs[0][:1]))
        for first in range(0, len(self.captions), cfg.batch_size):
            self.system.encode({"cond": self.captions[first : first + cfg.batch_size], "null": [""]})

        measured: list[str] = []
        for name, extractor in cfg.extractors.items():
            record = collectives.broadcast(extractor.record() if world.is_main else None, world)
            constant, generated = (
                FeatureFolder(self.folder / folder, name, extractor, record, cfg.batch_size, cfg.section)
                for folder in (CONSTANT, GENERATED)
            )
            self.records[name], self.generated[name] = record, generated
            constant.load(world.device)
            outputs = constant.extract([torch.zeros(3, *cfg.size)], self.captions[:1])

            with_texts = measure.needs_texts(extractor, self.names)
            known = Job(self.folder, [], self.captions, self.reference)
            self.constant[name] = measure.extract(constant, known, with_texts, world)
            possible = [
                metric
                for metric in measure.metrics_of(extractor, self.names)
                if metrics.is_possible(metric, self.reference is not None, with_texts)
                and (metric not in WITHIN_PROMPTS or cfg.num_samples > 1)
                and (metric != "map_diversity" or "maps" in outputs)
            ]
            ordered = [metric for metric in possible if metric not in NEITHER]
            measured += possible
            for value in metrics.value_names(ordered, outputs, self.categories, cfg):
                self.keys += [key_of(name, value, count) for count in cfg.num_steps]

        if not measured:
            raise UserError(
                f"{cfg.section}.metrics: none can be computed; set a reference, or num_samples to 2 or more"
            )
        if cfg.keep_best is not None and cfg.keep_best not in self.keys:
            hint = config.suggest(cfg.keep_best, self.keys)
            raise UserError(f"{cfg.section}.keep_best: {cfg.keep_best!r} is no value to choose by{hint}")

    def is_missing(self, done: int) -> bool:
        """Whether an evaluation is due after `done` training steps and has not been recorded."""
        is_due = done > 0 and done % self.cfg.every == 0
        return collectives.broadcast(is_due and not self.file(done).is_file(), self.world)

    def remove_later(self, done: int) -> None:
        """Remove the records of steps after `done`, which will be trained again."""
        if self.world.is_main:
            for path in self.folder.glob("step_*.json"):
                if path > self.file(done):
                    path.unlink()

    def file(self, done: int) -> Path:
        """The record of the evaluation after `done` training steps."""
        return self.folder / f"step_{done:08d}.json"

    def run(self, net: nn.Module, done: int) -> Evaluation | None:
        """Evaluate the weights `net` after `done` training steps. The result is on rank 0."""
        return self.evaluate(net, self.specs, {"step": done, "fingerprint": state.fingerprint(net)})

    def evaluate(
        self, net: nn.Module, groups: Sequence[Sequence[ImageSpec]], weights: dict[str, Any]
    ) -> Evaluation | None:
        """Evaluate images, each group of one sampling setting. The result is on rank 0.

        Args:
            weights: facts about `net` for the record: step and fingerprint.
        """
        world = self.world
        self.remove_generated()
        collectives.barrier()

        # generate the images, and keep the features of each batch in a file
        cells = [cell_of(specs, weights, self.folder) for specs in groups]
        chunks = {name: [self.chunks(name, cell) for cell in cells] for name in self.generated}
        for number, specs in enumerate(groups):
            self.generate(net, specs, {name: of_cells[number] for name, of_cells in chunks.items()})
        collectives.barrier()

        values, all_extracted = [], []
        evaluated = Job(self.folder, cells, self.captions, self.reference)
        for name, of_cells in chunks.items():
            generated = [FeatureSet(tuple(of_cell), world.device) for of_cell in of_cells]
            extracted = replace(self.constant[name], cells=generated)
            all_extracted.append(extracted)
            values += measure.measure(name, self.names, evaluated, extracted, self.cfg, world, quiet=True)
        if not world.is_main:
            return None
        facts = measure.describe(evaluated, all_extracted, self.cfg, self.records)
        self.remove_generated()
        return Evaluation(**facts, values=values)

    def generate(self, net: nn.Module, specs: Sequence[ImageSpec], chunks: dict[str, list[Chunk]]) -> None:
        """Generate this rank's share of the images of one number of steps, and write their features.

        Args:
            chunks: the files by extractor, one for each batch.
        """
        size = self.cfg.batch_size
        batches = [specs[first : first + size] for first in range(0, len(specs), size)]
        for first in range(0, len(batches), self.world.size):
            # calls of a sharded denoiser are collective: a rank without a batch generates one again
            number = first + self.world.rank
            is_own = number < len(batches)
            batch = batches[number if is_own else first]
            images = [image_sets.as_tensor(image) for image in job.generate(self.system, net, batch)]
            if is_own:
                pairs = list(zip(images, [spec.prompt for spec in batch], strict=True))
                for name, features in self.generated.items():
                    features.compute(chunks[name][number], iter(pairs))

    def chunks(self, extractor: str, cell: Cell) -> list[Chunk]:
        """The files of the features of generated images, a batch in each."""
        keys = ([cell.settings, image["prompt"], image["seed"], image["sample"]] for image in cell.images)
        return self.generated[extractor].chunks("generated", keys, self.cfg.batch_size)

    def remove_generated(self) -> None:
        if self.world.is_main:
            shutil.rmtree(self.folder / GENERATED, ignore_errors=True)

    def best(self, evaluation: Evaluation, before: dict[str, Any] | None) -> dict[str, Any] | None:
        """What `keep_best` names, if it is better than the best value `before`; None if it is not.

        A value that was measured in another way (another reference, other prompts) is not compared with.
        """
        (value,) = [value for value in evaluation.values if key_of_value(evaluation, value) == self.cfg.keep_best]
        step = evaluation.cells[value.cell]["settings"]["step"]
        entry = {"name": self.cfg.keep_best, "value": value.value, "step": step, "record": evaluation.record(value)}
        comparable = before is not None and all(before.get(key) == entry[key] for key in ("name", "record"))
        if comparable and not results.is_better(value.metric, value.value, before["value"]):
            return None
        return entry

    def write(self, evaluation: Evaluation) -> Path:
        """Record an evaluation."""
        path = self.file(evaluation.cells[0]["settings"]["step"])
        image_encode.write(path, evaluation.to_json().encode())
        return path


def key_of(extractor: str, metric: str, num_steps: int) -> str:
    """The name of a value in `metrics.jsonl`."""
    return f"eval/{extractor}/{metric}/steps_{num_steps}"


def key_of_value(evaluation: Evaluation, value: Value) -> str:
    return key_of(value.extractor, value.metric, evaluation.cells[value.cell]["settings"]["num_steps"])


def logged(evaluation: Evaluation) -> dict[str, float]:
    """The values of an evaluation by their names in `metrics.jsonl`."""
    return {key_of_value(evaluation, value): value.value for value in evaluation.values}


def cell_of(specs: Sequence[ImageSpec], weights: dict[str, Any], folder: Path) -> Cell:
    """Images that differ in prompt and noise only, as the cell of a sampling job."""
    images = [spec.record() | {"category": spec.category} for spec in specs]
    settings = {name: value for name, value in images[0].items() if name not in PER_IMAGE}
    return Cell(folder, settings | weights, images)


def check_neighbours(cfg: TrainingEvaluation, names: Sequence[str], reference: ImageSet | None) -> None:
    """Raise UserError if there are too few images for the metrics of nearest neighbours."""
    if reference is None or not set(names) & set(BY_NEIGHBOURS):
        return
    for what, count in (("generated", cfg.num_images), ("reference", len(reference))):
        if count <= cfg.nearest_k:
            raise UserError(
                f"{cfg.section}.nearest_k: {cfg.nearest_k} neighbours need more than {cfg.nearest_k} images in each "
                f"set, got {count} {what} images; lower it, or leave {', '.join(BY_NEIGHBOURS)} out of metrics"
            )


def choose_prompts(cfg: TrainingEvaluation, reference: ImageSet | None, multiple: int) -> list[Request]:
    """The prompts of the images, evenly spaced over the prompt file, otherwise over the captions of the reference.

    Raises UserError if there are too few or an invalid one.
    """
    defaults, section = cfg.sampling(), cfg.section
    num_prompts = cfg.num_images // cfg.num_samples
    if cfg.prompt_file is None and reference is None:
        raise UserError(f"{cfg.prompts_key}: missing; without a reference, the prompts are read from a file")

    source = cfg.prompt_file or cfg.reference
    if cfg.prompt_file is None:
        indices = image_sets.evenly_spaced(len(reference), num_prompts)
        captions = {index: reference.caption(index) for index in indices}
        if not any(captions.values()):
            raise UserError(f"{cfg.prompts_key}: missing; the images of {source} have no captions")
        lines = ((f"{source}, image {index + 1}", {"prompt": caption}) for index, caption in captions.items())
        requests = prompts.collect(lines, defaults, multiple)
    else:
        if not source.is_file():
            raise UserError(f"{cfg.prompts_key}: {source}: no such file; relative paths start from the current folder")
        requests = prompts.from_file(source, defaults, multiple)
        requests = [requests[index] for index in image_sets.evenly_spaced(len(requests), num_prompts)]

    for request in requests:
        if request.settings != defaults:
            raise UserError(
                f"{request.where}: sets its own sampling settings; the keys of {section} hold for all prompts"
            )
    if len(requests) < num_prompts:
        raise UserError(
            f"{cfg.images_key}: {cfg.num_images} images, {cfg.num_samples} of a prompt, need {num_prompts} "
            f"prompts, but {source} has {len(requests)}; ask for fewer images, or for more of a prompt"
        )
    return requests
