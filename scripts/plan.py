"""What a run will cost, told before it starts, without a weight in memory.

    .venv/bin/python scripts/plan.py CONFIG --gpus N [--gpu h100] [--mfu 0.35] [--json] [key=value ...]

Operations and memory are those of the real training step, run on torch's meta device; shares of a rank are those of the
real FSDP2 under torch's fake process group. Neither pictures nor weights need to be there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from math import inf

import plan_page
import torch
from plan_job import Job, Phase, count_words, load, phases, run
from plan_ranks import Share, optimizer_bytes, share, traffic
from plan_step import META, networks
from precompute import BYTES

from selfe import launch
from selfe.device import PEAKS
from selfe.system import System
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
EVERY = (False, 2, "selective", True)  # settings of activation checkpointing that are compared


def memory(job: Job, share: Share, heaviest: Phase, num_words: int, gib: int, batches: set[int]) -> dict:
    """Bytes of a rank, by setting of activation checkpointing, and the micro-batches that fit."""
    trainer, room = job.trainer, round(USABLE * gib * 2**30)
    at, micro, own = (heaviest.shapes, num_words, heaviest.end - 1), trainer.micro_batch_size, heaviest.step
    # what is there whatever the number of pictures: gradients of weights on their way
    fixed = max(2 * own.peak - run(job, *at, trainer.activation_checkpointing, larger=2).peak, 0)
    encoding = 0 if job.cached else own.encode_peak / own.pictures
    variants = []
    for every in dict.fromkeys([*EVERY, trainer.activation_checkpointing]):
        configured = every == trainer.activation_checkpointing
        step = own if configured else run(job, *at, every)
        each = max(step.peak - fixed, step.saved) / step.pictures
        base = share.states + share.whole + fixed
        fits = min((room - base) / each, (room - share.states) / encoding if encoding else inf)
        variants.append(
            {
                "activation_checkpointing": every,
                "configured": configured,
                "activations": round(step.saved / step.pictures * micro),
                "peak": round(max(base + each * micro, share.states + encoding * micro)),
                **micro_batches_that_fit(int(fits), job.system.objective.batch_multiple, share.size, batches),
            }
        )
    names = ("parameters", "gradients", "optimizer", "ema", "encoders", "whole")
    return {name: getattr(share, name) for name in names} | {"usable": room, "variants": variants}


def micro_batches_that_fit(fits: int, multiple: int, gpus: int, batches: set[int]) -> dict[str, int]:
    """The largest, and the largest that all batches are multiples of; 0 if there is none."""
    possible = range(multiple, fits + 1, multiple)
    dividing = [micro for micro in possible if all(batch % (micro * gpus) == 0 for batch in batches)]
    return {"largest_micro_batch": max(possible, default=0), "largest_that_divides": max(dividing, default=0)}


def plan(
    path: str,
    overrides: Sequence[str] = (),
    *,
    gpus: int,
    gpu: str = "h100",
    mfu: float = 0.35,
    caption_tokens: int = 77,
) -> dict:
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
    num_words = count_words(job.system, caption_tokens)
    found = phases(job, gpus, num_words)
    heaviest = max(found, key=lambda phase: phase.step.peak / phase.step.pictures)
    rate = PEAKS[name] * 1e12 * mfu * 3600  # useful operations in a GPU-hour
    told = [describe(phase, job, ours, rate, gpus) for phase in found]
    room = memory(job, ours, heaviest, num_words, gib, {phase.batch for phase in found})
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
        "the share of the peak does not count what is recomputed to save memory",
        "loading, saving, validation and samples take no time",
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
    if own["peak"] > room["usable"]:
        most = own["largest_micro_batch"]
        lines.append(f"a micro-batch of {trainer.micro_batch_size} does not fit the memory; the largest is {most}")
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
