"""A training config without weights, images or cache: its system on the meta device, and its schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
from torch import nn

from selfe import config
from selfe.data.dataset import BucketedDataset
from selfe.distributed.activation_checkpoint import ActivationCheckpointing
from selfe.encoders.composed_text import ComposedText
from selfe.encoders.hf_text import HFText
from selfe.encoders.t5_clip import T5Clip
from selfe.errors import UserError
from selfe.objectives.wrapper import Wrapper
from selfe.protocols import Objective, TextEncoder
from selfe.system import System
from selfe.tools.plan.ranks import Later
from selfe.tools.plan.step import META, Step, blank_batch, measure, networks, with_features
from selfe.training.settings import TrainerConfig, without_evaluation

Shapes = list[tuple[tuple[int, int], int]]  # (height, width) of images, and their relative frequency


@dataclass(frozen=True)
class Job:
    """A training config, built without weights, images or cache."""

    system: System  # on the meta device
    trainer: TrainerConfig
    cached: tuple[str, ...]  # encoders whose outputs are read from a cache
    loaded: tuple[nn.Module, ...]  # encoder networks that training loads
    later: Later  # how the text encoder is sharded, if it is
    shapes_at: Callable[[int], Shapes]
    starts: tuple[int, ...]  # first steps of the phases of the data


@dataclass(frozen=True)
class PhaseCost:
    """A range of steps of equal cost."""

    start: int
    end: int
    batch: int  # images per step, over all ranks
    micro_batches: int  # per rank and step
    shapes: Shapes
    step: Step  # cost of one micro-batch with these shapes

    def micro_batch_size(self, gpus: int) -> int:
        """Images of a micro-batch."""
        return ceil(self.batch / gpus / self.micro_batches)

    def per_step(self, number: float) -> int:
        """Scale a value of the measured micro-batch to a step over all ranks."""
        return round(number * self.batch / self.step.num_images)


def load(path: str, overrides: Sequence[str] = (), cached: bool = False) -> Job:
    """Build a config for planning; encoders behind a cache are unwrapped, so that their cost is known too.

    `cached`: treat encoders that are not behind a cache as if they were.
    """
    settings = config.load(path, overrides)
    trainer = without_evaluation(settings)
    if trainer.precision == "auto":
        trainer = replace(trainer, precision="bf16")  # the GPU to plan for, not this machine
    if "system" not in settings or "data" not in settings:
        raise UserError(f"{path}: sections system, data and trainer are required")

    # unwrap cached encoders; training loads such an encoder only to decode, or to fill the cache
    parts, behind_cache, loads = dict(settings["system"]), [], {}
    for name, inner in (("text_encoder", "encoder"), ("autoencoder", "autoencoder")):
        wrapper = parts[name]["module"]
        loads[name] = inner not in parts[name]["params"] or parts[name]["params"].get("decode", False)
        loads[name] |= wrapper == "selfe.encoders.remembered_text.RememberedText"
        while inner in parts[name]["params"]:
            parts[name] = parts[name]["params"][inner]
            behind_cache.append(name)
        if cached and name not in behind_cache:
            loads[name] = False
            behind_cache.append(name)

    # meta device: networks without weights
    with META:
        system = config.build({"system": parts}, "system")
    if trainer.adapt is not None:
        trainer.adapt.apply(system.backbone)
    objective = innermost(system.objective)
    if hasattr(objective, "p_drop"):
        objective.p_drop = 0.0  # every caption at its full length
    later = Later()
    system.load_encoders(META, later if trainer.shard_text_encoder else None)

    encoders = {"text_encoder": system.text_encoder, "autoencoder": system.autoencoder}
    loaded = [net for name, encoder in encoders.items() if loads[name] for net in networks(encoder).values()]
    return Job(system, trainer, tuple(behind_cache), tuple(loaded), later, *shapes_of(settings))


def innermost(objective: Objective) -> Objective:
    """The objective inside of training aids."""
    for aid in aids(objective):
        objective = aid.objective
    return objective


def aids(objective: Objective) -> Iterator[Wrapper]:
    """The training aids around an objective, the outermost first."""
    while isinstance(objective, Wrapper):
        yield objective
        objective = objective.objective


def shapes_of(settings: dict) -> tuple[Callable[[int], Shapes], tuple[int, ...]]:
    """A function from step to image shapes (the square of each pixel budget), and the steps at which they change."""
    part = settings["data"]
    while "source" in part["params"]:
        part = part["params"]["source"]

    # data without buckets: the shape of one image
    kind = config.named(part["module"], "data.module")
    if not (isinstance(kind, type) and issubclass(kind, BucketedDataset)):
        data = config.build({"data": part}, "data")
        shape = tuple(data.batch(settings["seed"], 0, range(1), [0], "train").images[0].shape[1:])
        return lambda step: [(shape, 1)], (0,)

    # bucketed data: buckets and phases, without opening a manifest
    unopened = type(kind.__name__, (kind,), {"open": lambda self, path, base_dir: None})
    dataset = config.call(unopened, part["params"], "data.params", build=True)

    def at(step: int) -> Shapes:
        phase = dataset.phase(step, "train")
        squares = [tuple(dataset.buckets[pixels].nearest(np.array([[1, 1]]))[0].tolist()) for pixels in phase.pixels]
        return list(zip(squares, phase.shares or [1] * len(squares), strict=True))

    return at, tuple(phase.step for phase in dataset.phases)


class OneTokenPerWord:
    """A tokenizer without files: one token per word, and one at the end."""

    def __call__(
        self, captions: Sequence[str], truncation: bool = False, max_length: int | None = None, verbose: bool = True
    ) -> dict[str, list[list[int]]]:
        return {"input_ids": [([0] * (len(caption.split()) + 1))[:max_length] for caption in captions]}


def count_words(encoder: TextEncoder, num_tokens: int) -> int:
    """Number of words in a caption of `num_tokens` tokens; makes the text encoder take each word for a token."""
    if isinstance(encoder, ComposedText):
        numbers = [count_words(part, num_tokens) for part in encoder.encoders.values()]
        return numbers[0]  # of the encoder of the tokens
    if isinstance(encoder, HFText):
        encoder.count_words = True
    if not isinstance(encoder, T5Clip):
        return num_tokens
    encoder.t5_tokenizer = encoder.clip_tokenizer = OneTokenPerWord()
    return num_tokens - 1


def phases(job: Job, gpus: int, num_words: int) -> list[PhaseCost]:
    """Split the run where batch size, image shapes or objective change, and measure each phase."""
    trainer, objective = job.trainer, job.system.objective
    end = min(trainer.max_steps, trainer.max_steps if trainer.stop_step is None else trainer.stop_step)

    # steps at which the cost changes
    schedule = innermost(objective)
    begins = {0, *job.starts, *(phase.step for phase in trainer.phases)}
    if start := getattr(schedule, "start_step", 0):
        begins.add(start + 1)  # at start_step itself s is still equal to t
    begins.add(getattr(schedule, "aux_start_step", None) or 0)
    begins.update(getattr(schedule, "starts", ()))
    begins.update(stop for aid in aids(objective) if (stop := getattr(aid, "stop_step", None)) is not None)
    begins = sorted(begin for begin in begins if begin < end)

    costs = []
    for first, last in zip(begins, [*begins[1:], end], strict=True):
        batch = len(trainer.samples_at(first))
        try:
            micro_batches = trainer.micro_batches(gpus, objective.batch_multiple, first)
        except UserError:  # reported by `warnings`
            micro_batches = max(ceil(batch / gpus / trainer.micro_batch_size), 1)

        # the last step of the phase: its schedules are the furthest along
        shapes = job.shapes_at(first)
        step = run(job, shapes, num_words, last - 1, trainer.activation_checkpointing)
        costs.append(PhaseCost(first, last, batch, micro_batches, shapes, step))
    return costs


def run(job: Job, shapes: Shapes, num_words: int, step: int, every: ActivationCheckpointing, larger: int = 1) -> Step:
    """Measure a micro-batch of about the configured size, with all shapes at their relative frequency.

    Args:
        num_words: words per caption.
        every: activation checkpointing setting.
        larger: factor on the size of the micro-batch.
    """
    smallest = job.system.objective.batch_multiple * sum(count for _, count in shapes)
    times = larger * max(job.trainer.micro_batch_size // smallest, 1) * job.system.objective.batch_multiple
    rows = [shape for shape, count in shapes for _ in range(count * times)]
    setting = {"precision": job.trainer.precision, "activation_checkpointing": every}
    batch, rng = blank_batch(rows, num_words)
    return measure(job.system, with_features(job.system, batch), rng, step, **setting)
