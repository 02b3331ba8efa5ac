"""What a run will cost, told before it starts, without a weight in memory.

    .venv/bin/python scripts/plan.py CONFIG --gpus N [--gpu h100] [--mfu 0.35] [--json] [key=value ...]

Operations and memory are those of the real training step, run on torch's meta device; shares of a rank are those of the
real FSDP2 under torch's fake process group. Neither pictures nor weights need to be there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import plan_page
import torch
from plan_ranks import Later, Share, optimizer_bytes, share, traffic
from plan_step import META, Step, blank_batch, measure, networks
from precompute import BYTES
from torch import nn

from selfe import config, launch
from selfe.device import PEAKS
from selfe.encoders.t5_clip import T5Clip
from selfe.feed import Feed
from selfe.system import System
from selfe.train import Trainer
from selfe.types import UserError

GPUS = {  # the name that `PEAKS` knows, GiB of memory
    "b200": ("B200", 180),
    "h200": ("H200", 141),
    "h100": ("H100", 80),
    "a100": ("A100", 80),
    "a100-40": ("A100", 40),
    "l40s": ("L40S", 48),
}
USABLE = 0.9  # of the memory; the rest is the driver's, the links' and what the allocator cannot fill
ENCODER_SHARE = 0.2  # of all operations, from which on a cache is worth its disk
EVERY = (False, 4, 2, True)  # settings of activation checkpointing that are compared
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
        shape = tuple(data.batch(settings["seed"], 0, 1, [0], "train").images[0].shape[1:])
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


def caption_of(system: System, num_tokens: int) -> str:
    """A caption of so many tokens, or of as many as the encoder takes."""
    encoder = system.text_encoder
    if not isinstance(encoder, T5Clip):
        return " ".join(["word"] * num_tokens)
    encoder.t5_tokenizer = encoder.clip_tokenizer = OneTokenPerWord()
    return " ".join(["word"] * (num_tokens - 1))


def phases(job: Job, gpus: int, caption_tokens: int) -> list[Phase]:
    """From each change of batch size, of pictures or of the objective to the next."""
    trainer, objective = job.trainer, job.system.objective
    end = min(trainer.max_steps, trainer.stop_step or trainer.max_steps)
    begins = {0, *job.starts, *(phase.step for phase in trainer.phases)}
    if start := getattr(objective, "start_step", 0):
        begins.add(start + 1)  # at start_step itself s is still t
    begins.add(getattr(objective, "aux_start_step", None) or 0)
    begins = sorted(begin for begin in begins if begin < end)
    caption = caption_of(job.system, caption_tokens)
    found = []
    for first, last in zip(begins, [*begins[1:], end], strict=True):
        batch = trainer.batch_size_at(first)
        try:
            micro_batches = trainer.micro_batches(gpus, objective.batch_multiple, first)
        except UserError:  # among the warnings
            micro_batches = ceil(batch / gpus / trainer.micro_batch_size)
        shapes = job.shapes_at(first)
        step = run(job, shapes, caption, last - 1, trainer.activation_checkpointing)
        found.append(Phase(first, last, batch, micro_batches, shapes, step))
    return found


def run(job: Job, shapes: Shapes, caption: str, step: int, activation_checkpointing: bool | int) -> Step:
    """The smallest micro-batch in which every shape has its share."""
    multiple = job.system.objective.batch_multiple
    rows = [shape for shape, count in shapes for _ in range(count * multiple)]
    setting = {"precision": job.trainer.precision, "activation_checkpointing": activation_checkpointing}
    return measure(job.system, *blank_batch(rows, caption), step, **setting)


def memory(job: Job, share: Share, heaviest: Phase, caption_tokens: int, gib: int, batches: set[int]) -> dict:
    """Bytes of a rank, by setting of activation checkpointing, and the micro-batches that fit."""
    trainer, multiple = job.trainer, job.system.objective.batch_multiple
    encode_peak = 0 if job.cached else heaviest.step.encode_peak
    caption, room = caption_of(job.system, caption_tokens), USABLE * gib * 2**30
    variants = []
    for every in dict.fromkeys([*EVERY, trainer.activation_checkpointing]):
        own = every == trainer.activation_checkpointing
        step = heaviest.step if own else run(job, heaviest.shapes, caption, heaviest.end - 1, every)
        per_picture = max(step.peak, encode_peak) / step.pictures
        fits = max(int((room - share.states - share.whole) / per_picture / multiple), 0) * multiple
        dividing = [m for m in range(multiple, fits + 1, multiple) if all(b % (m * share.size) == 0 for b in batches)]
        variants.append(
            {
                "activation_checkpointing": every,
                "configured": own,
                "activations": round(step.saved * trainer.micro_batch_size / step.pictures),
                "peak": round(per_picture * trainer.micro_batch_size),
                "total": round(share.states + share.whole + per_picture * trainer.micro_batch_size),
                "largest_micro_batch": fits,
                "largest_that_divides": dividing[-1] if dividing else 0,
            }
        )
    names = ("parameters", "gradients", "optimizer", "ema", "encoders", "whole")
    return {name: getattr(share, name) for name in names} | {"usable": round(room), "variants": variants}


def plan(path: str, overrides: Sequence[str], gpus: int, gpu: str, mfu: float, caption_tokens: int) -> dict:
    """All that is told, numbers in bytes, FLOPs (of a step over all ranks), hours and days."""
    if gpus < 1:
        raise UserError(f"--gpus: {gpus} is not a number of at least 1")
    if gpu.lower() not in GPUS:
        raise UserError(f"--gpu: {gpu!r} is not known; choose one of {', '.join(GPUS)}")
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu: {mfu} does not lie between 0 and 1; it is a share of the GPU's peak, such as 0.35")
    if caption_tokens < 1:
        raise UserError(f"--caption-tokens: {caption_tokens} is not a number of at least 1")
    name, gib = GPUS[gpu.lower()]
    job = load(path, overrides)
    ours = share(job.system, job.trainer, gpus, job.loaded, job.later)
    found = phases(job, gpus, caption_tokens)
    heaviest = max(found, key=lambda phase: phase.step.peak / phase.step.pictures)
    rate = PEAKS[name] * 1e12 * mfu * 3600  # useful operations in a GPU-hour
    told = [describe(phase, job, ours, rate, gpus) for phase in found]
    room = memory(job, ours, heaviest, caption_tokens, gib, {phase.batch for phase in found})
    return {
        "config": path,
        "gpus": gpus,
        "gpu": {"name": name, "gib": gib, "peak_tflops": PEAKS[name]},
        "mfu": mfu,
        "assumptions": assumptions(found, job),
        "parameters": parameters(job.system),
        "phases": told,
        "gpu_hours": sum(phase["gpu_hours"] for phase in told),
        "days": sum(phase["days"] for phase in told),
        "memory": room,
        "storage": storage(job, found),
        "warnings": warnings(job, ours, found, told, room),
    }


def parameters(system: System) -> dict[str, int]:
    parts = {"denoiser": system.backbone}
    for kind, encoder in (("text_encoder", system.text_encoder), ("autoencoder", system.autoencoder)):
        parts |= {f"{kind}.{name}": network for name, network in networks(encoder).items()}
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def describe(phase: Phase, job: Job, share: Share, rate: float, gpus: int) -> dict:
    step, steps = phase.step, phase.end - phase.start
    encoders = phase.per_step(step.encoders)
    live = phase.per_step(step.useful)
    counted = live - encoders if job.cached else live
    parts = [call.part for call in step.calls]
    learning = [call for call in step.calls if call.part == "flow matching"]
    return {
        "start": phase.start,
        "end": phase.end,
        "batch": phase.batch,
        "micro_batches": phase.micro_batches,
        "pictures": {f"{height}x{width}": count for (height, width), count in phase.shapes},
        "calls": {part: phase.micro_batches * parts.count(part) for part in dict.fromkeys(parts)},
        "picture_tokens": phase.per_step(sum(call.picture_tokens for call in learning)),
        "text_tokens": phase.per_step(sum(call.text_tokens for call in learning)),
        "flops": {part: phase.per_step(number) for part, number in step.flops.items()},
        "useful_flops": live,
        "useful_flops_cached": live - encoders,
        "encoder_share": encoders / live,
        "traffic": traffic(share, step.calls, phase.micro_batches),
        "gpu_hours": steps * counted / rate,
        "days": steps * counted / rate / gpus / 24,
        "gpu_hours_cached": steps * (live - encoders) / rate,
    }


def storage(job: Job, found: list[Phase]) -> dict:
    """Bytes on disk: of a checkpoint, of a picture's latents by shape, of a caption's tokens."""
    net, system = job.system.backbone, job.system
    weights = sum(p.nbytes for p in net.parameters())
    latents = {}
    if hasattr(system.autoencoder, "moments"):
        for shape in dict.fromkeys(shape for phase in found for shape, _ in phase.shapes):
            mean, deviation = system.autoencoder.moments([torch.empty(3, *shape, device=META)])
            numbers = mean.tokens.numel() * (1 if deviation is None else 2)
            latents[f"{shape[0]}x{shape[1]}"] = {"cached": BYTES * numbers, "one_sample": BYTES * mean.tokens.numel()}
    return {
        "checkpoint": 2 * weights + optimizer_bytes(net),  # live, EMA, optimizer
        "latents_per_picture": latents,
        "text_per_token": BYTES * system.text_encoder.text_dim,
        "pooled_per_caption": BYTES * system.text_encoder.pooled_dim,
    }


def assumptions(found: list[Phase], job: Job) -> list[str]:
    call = found[-1].step.calls[0]
    return [
        f"every caption has {call.text_tokens // found[-1].step.pictures} tokens, none is dropped",
        "pictures are the squares of the data's pixel budgets",
        "all operations that are not repeated to save memory run at this share of the peak; loading, saving, validation "
        "and samples take no time",
        f"{1 - USABLE:.0%} of the memory is left free",
    ] + (["latents and text come from a cache"] if job.cached else [])


def warnings(job: Job, share: Share, found: list[Phase], told: list[dict], room: dict) -> list[str]:
    trainer, gpus, lines = job.trainer, share.size, []
    for phase in found:
        try:
            trainer.micro_batches(gpus, job.system.objective.batch_multiple, phase.start)
        except UserError as error:
            lines.append(f"from step {phase.start}: {error}")
        if (busy := phase.batch // trainer.micro_batch_size) < gpus:
            lines.append(
                f"from step {phase.start}: {gpus - busy} of {gpus} GPUs are idle: a batch of {phase.batch} has only "
                f"{busy} micro-batches of {trainer.micro_batch_size}"
            )
    if share.empty_ranks:
        lines.append(f"{share.empty_ranks} of {gpus} ranks hold no parameter; set trainer.shard_size to fewer ranks")
    shares = [phase["encoder_share"] for phase in told]
    if max(shares) > ENCODER_SHARE and not job.cached:
        lines.append(
            f"the encoders do {max(shares):.0%} of all operations; cache what they give: scripts/precompute.py"
        )
    (own,) = (variant for variant in room["variants"] if variant["configured"])
    if own["total"] > room["usable"]:
        lines.append(
            f"a micro-batch of {trainer.micro_batch_size} does not fit the memory; at most {own['largest_micro_batch']} do"
        )
    return list(dict.fromkeys(lines))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--gpus", type=int, required=True, metavar="N")
    parser.add_argument("--gpu", default="h100", help=f"{', '.join(GPUS)} (default %(default)s)")
    parser.add_argument("--mfu", type=float, default=0.35, help="share of the peak that training reaches")
    parser.add_argument("--caption-tokens", type=int, default=77, metavar="N", help="of T5 (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    options = vars(parser.parse_intermixed_args(arguments))
    as_json, path = options.pop("json"), options.pop("config")
    found = plan(path, **options)
    print(json.dumps(found, indent=1) if as_json else plan_page.text(found))


if __name__ == "__main__":
    launch.worker(main)
