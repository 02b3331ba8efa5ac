"""What a configuration asks for, without weights, pictures or cache: a system on the meta device, and its schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from plan_ranks import Later
from plan_step import META, Step, blank_batch, measure, networks
from torch import nn

from selfe import config
from selfe.blocks import Recompute
from selfe.encoders.t5_clip import T5Clip
from selfe.feed import Feed
from selfe.system import System
from selfe.train import Trainer
from selfe.types import UserError

Shapes = list[tuple[tuple[int, int], int]]  # (height, width) of a picture, and how many of the sum of these have it


@dataclass(frozen=True)
class Job:
    """A configuration without weights, pictures or cache."""

    system: System  # on the meta device
    trainer: Trainer
    cached: tuple[str, ...]  # encoders that training does not load, because a cache holds what they give
    loaded: tuple[nn.Module, ...]  # networks that it does load
    later: Later  # how the text encoder is cut, if it is
    shapes_at: Callable[[int], Shapes]
    starts: tuple[int, ...]  # steps at which a phase of the data begins


@dataclass(frozen=True)
class Phase:
    """Steps that cost the same."""

    start: int
    end: int
    batch: int  # pictures in a step, over all ranks
    micro_batches: int  # of a rank in a step
    shapes: Shapes
    step: Step  # of a micro-batch with these shapes

    def per_step(self, number: float) -> int:
        """A number of the measured micro-batch, for a step over all ranks."""
        return round(number * self.batch / self.step.pictures)


def load(path: str, overrides: Sequence[str] = ()) -> Job:
    settings = config.load(path, overrides)
    trainer = config.build(settings, "trainer")
    if "system" not in settings or "data" not in settings:
        raise UserError(f"{path}: a plan needs the sections system, data and trainer")
    parts, cached, loads = dict(settings["system"]), [], {}
    for name, inner in (("text_encoder", "encoder"), ("autoencoder", "autoencoder")):
        loads[name] = inner not in parts[name]["params"] or parts[name]["params"].get("decode", False)
        while inner in parts[name]["params"]:
            parts[name] = parts[name]["params"][inner]
            cached.append(name)
    with META:
        system = config.build({"system": parts}, "system")
    later = Later()
    system.load_encoders(META, later if trainer.shard_text_encoder else None)
    encoders = {"text_encoder": system.text_encoder, "autoencoder": system.autoencoder}
    loaded = [net for name, encoder in encoders.items() if loads[name] for net in networks(encoder).values()]
    return Job(system, trainer, tuple(cached), tuple(loaded), later, *shapes_of(settings))


def shapes_of(settings: dict) -> tuple[Callable[[int], Shapes], tuple[int, ...]]:
    """The shapes of a step's pictures, by step, and where they change; of each pixel budget the square."""
    part = settings["data"]
    while "source" in part["params"]:
        part = part["params"]["source"]
    kind = config.named(part["module"], "data.module")
    if not (isinstance(kind, type) and issubclass(kind, Feed)):
        data = config.build({"data": part}, "data")
        shape = tuple(data.batch(settings["seed"], 0, range(1), [0], "train").images[0].shape[1:])
        return lambda step: [(shape, 1)], (0,)
    unopened = type(kind.__name__, (kind,), {"open": lambda self, path, base_dir: None})
    feed = config.call(unopened, part["params"], "data.params", build=True)

    def at(step: int) -> Shapes:
        phase = feed.phase(step, "train")
        squares = [tuple(feed.buckets[pixels].nearest(np.array([[1, 1]]))[0].tolist()) for pixels in phase.pixels]
        return list(zip(squares, phase.shares or [1] * len(squares), strict=True))

    return at, tuple(phase.step for phase in feed.phases)


class OneTokenPerWord:
    """A tokenizer that needs no file: a token for each word, and one that ends the caption."""

    def __call__(
        self, captions: Sequence[str], truncation: bool = False, max_length: int | None = None, verbose: bool = True
    ) -> dict[str, list[list[int]]]:
        return {"input_ids": [([0] * (len(caption.split()) + 1))[:max_length] for caption in captions]}


def count_words(system: System, num_tokens: int) -> int:
    """How many words make a caption of so many tokens; from here on a word is a token for the text encoder."""
    encoder = system.text_encoder
    if not isinstance(encoder, T5Clip):
        return num_tokens
    encoder.t5_tokenizer = encoder.clip_tokenizer = OneTokenPerWord()
    return num_tokens - 1


def phases(job: Job, gpus: int, num_words: int) -> list[Phase]:
    """From each change of batch size, of pictures or of the objective to the next."""
    trainer, objective = job.trainer, job.system.objective
    end = min(trainer.max_steps, trainer.stop_step or trainer.max_steps)
    begins = {0, *job.starts, *(phase.step for phase in trainer.phases)}
    if start := getattr(objective, "start_step", 0):
        begins.add(start + 1)  # at start_step itself s is still t
    begins.add(getattr(objective, "aux_start_step", None) or 0)
    begins = sorted(begin for begin in begins if begin < end)
    found = []
    for first, last in zip(begins, [*begins[1:], end], strict=True):
        batch = len(trainer.samples_at(first))
        try:
            micro_batches = trainer.micro_batches(gpus, objective.batch_multiple, first)
        except UserError:  # among the warnings
            micro_batches = ceil(batch / gpus / trainer.micro_batch_size)
        shapes = job.shapes_at(first)
        step = run(job, shapes, num_words, last - 1, trainer.activation_checkpointing)
        found.append(Phase(first, last, batch, micro_batches, shapes, step))
    return found


def run(job: Job, shapes: Shapes, num_words: int, step: int, every: Recompute, larger: int = 1) -> Step:
    """A micro-batch about as large as configured, or so many times larger, in which every shape has its share.

    `every`: activation checkpointing.
    """
    smallest = job.system.objective.batch_multiple * sum(count for _, count in shapes)
    times = larger * max(job.trainer.micro_batch_size // smallest, 1) * job.system.objective.batch_multiple
    rows = [shape for shape, count in shapes for _ in range(count * times)]
    setting = {"precision": job.trainer.precision, "activation_checkpointing": every}
    return measure(job.system, *blank_batch(rows, num_words), step, **setting)
