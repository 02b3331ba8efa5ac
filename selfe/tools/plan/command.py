"""The verb `selfe plan`: estimate time, memory, communication and disk of a run before it starts.

    job.py      a config as a system on the meta device, with the schedule of the run in phases of equal cost
    step.py     FLOPs and peak memory of one micro-batch, on the meta device
    ranks.py    shards of a rank and its communication, by FSDP2 under torch's fake process group
    page.py     the plan as text

Needs neither images nor weights.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from math import inf

import torch

from selfe.device import PEAKS
from selfe.errors import UserError
from selfe.optimizers.groups import trained
from selfe.system import System
from selfe.tools.plan import page as plan_page
from selfe.tools.plan.job import Job, PhaseCost, count_words, load, phases, run
from selfe.tools.plan.ranks import Share, optimizer_cost, share, traffic
from selfe.tools.plan.step import META, networks
from selfe.tools.precompute import BYTES

GPUS = {  # key of `PEAKS`, GiB of memory
    "b200": ("B200", 180),
    "h200": ("H200", 141),
    "h100": ("H100", 80),
    "a100": ("A100", 80),
    "a100-40": ("A100", 40),
    "l40s": ("L40S", 48),
    "rtx4090": ("RTX 4090", 24),
}
USABLE = 0.9  # fraction of GPU memory; the rest goes to the driver, communication buffers and fragmentation
ENCODER_SHARE = 0.2  # of all FLOPs, above which a feature cache is recommended
EVERY = (False, 2, "selective", True)  # activation checkpointing settings to compare


def memory(job: Job, share: Share, heaviest: PhaseCost, num_words: int, gib: int, batches: set[int]) -> dict:
    """Bytes on a rank and the micro-batch sizes that fit, by activation checkpointing setting."""
    trainer, room = job.trainer, round(USABLE * gib * 2**30)
    at, own = (heaviest.shapes, num_words, heaviest.end - 1), heaviest.step
    micro = heaviest.micro_batch_size(share.size)

    # the part of the peak that does not grow with the batch (gradients in flight), by extrapolation to no images
    fixed = max(2 * own.peak - run(job, *at, trainer.activation_checkpointing, larger=2).peak, 0)

    # the encoders run before the denoiser, so their peak is a bound of its own
    encoding = 0 if job.cached else own.encode_peak / own.num_images
    variants = []
    for every in dict.fromkeys([*EVERY, trainer.activation_checkpointing]):
        configured = every == trainer.activation_checkpointing
        step = own if configured else run(job, *at, every)
        each = max(step.peak - fixed, step.saved) / step.num_images

        # largest micro-batch under both bounds: the denoiser's and the encoders'
        base = share.states + share.unsharded + fixed
        fits = min((room - base) / each, (room - share.states) / encoding if encoding else inf)
        bounds = base + each * micro, share.states + encoding * micro, share.states + share.update.transient
        variants.append(
            {
                "activation_checkpointing": every,
                "configured": configured,
                "micro_batch_size": micro,
                "activations": round(step.saved / step.num_images * micro),
                "peak": round(max(bounds)),
                **micro_batches_that_fit(int(fits), job.system.objective.batch_multiple, share.size, batches),
            }
        )

    names = ("parameters", "gradients", "optimizer", "ema", "encoders", "unsharded")
    return {name: getattr(share, name) for name in names} | {"usable": room, "variants": variants}


def micro_batches_that_fit(fits: int, multiple: int, gpus: int, batches: set[int]) -> dict[str, int]:
    """The largest micro-batch that fits, and the largest that divides all batches; 0 if there is none."""
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
    cached: bool = False,
) -> dict:
    """The plan as JSON-compatible values: bytes, FLOPs (per step over all ranks), hours and days.

    `cached`: plan for the config that `selfe precompute` writes, which reads the outputs of the encoders.
    """
    # command line values
    if gpus < 1:
        raise UserError(f"--gpus: {gpus} is too small; must be at least 1")
    if gpu.lower() not in GPUS:
        raise UserError(f"--gpu: {gpu!r} is unknown; choose one of {', '.join(GPUS)}")
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu: {mfu} is not between 0 and 1; give a fraction of the GPU's peak FLOPs, such as 0.35")
    if caption_tokens < 1:
        raise UserError(f"--caption-tokens: {caption_tokens} is too small; must be at least 1")

    # measure every phase on the meta device
    name, gib = GPUS[gpu.lower()]
    job = load(path, overrides, cached)
    ours = share(job.system, job.trainer, gpus, job.loaded, job.later)
    num_words = count_words(job.system.text_encoder, caption_tokens)
    costs = phases(job, gpus, num_words)

    # derive time from the FLOPs, and memory from the phase that needs most per image
    heaviest = max(costs, key=lambda phase: phase.step.peak / phase.step.num_images)
    rate = PEAKS[name] * 1e12 * mfu * 3600  # useful FLOPs per GPU-hour
    updates = optimizer_cost(copy.deepcopy(job.system.backbone), job.trainer)  # of all ranks together
    described = [describe(phase, job, ours, updates.flops, rate, gpus) for phase in costs]
    room = memory(job, ours, heaviest, num_words, gib, {phase.batch for phase in costs})
    start = can_start(job, gpus, costs)

    return {
        "config": path,
        "gpus": gpus,
        "gpu": {"name": name, "gib": gib, "peak_tflops": PEAKS[name]},
        "mfu": mfu,
        "can_start": start,
        "assumptions": assumptions(costs, job),
        "parameters": parameters(job.system),
        "phases": described,
        "gpu_hours": sum(phase["gpu_hours"] for phase in described),
        "days": sum(phase["days"] for phase in described),
        "memory": room,
        "storage": storage(job, costs, updates.state),
        "warnings": warnings(job, ours, costs, described, room, start),
    }


def can_start(job: Job, gpus: int, costs: list[PhaseCost]) -> dict:
    """Whether the batch of every phase can be divided over the GPUs.

    Returns:
        on: the largest number of GPUs, at most `gpus`, on which the run can start; 0 if there is none.
        micro: the sizes of the micro-batches on that number of GPUs.
        change: what to change so that the run can start; empty if it can.
    """
    trainer, multiple = job.trainer, job.system.objective.batch_multiple

    def sizes(number: int) -> list[int]:
        per_rank = {phase.batch: phase.batch // number for phase in costs}
        num_micro = {phase.batch: trainer.micro_batches(number, multiple, phase.start) for phase in costs}
        return list(dict.fromkeys(per_rank[batch] // num_micro[batch] for batch in per_rank))

    for number in range(gpus, 0, -1):
        try:
            micro = sizes(number)
        except UserError:
            continue
        return {"on": number, "micro": micro, "change": "" if number == gpus else f"{number} GPUs"}
    return {"on": 0, "micro": [], "change": "other batch sizes"}


def parameters(system: System) -> dict[str, int]:
    """Number of parameters by network."""
    parts = {"denoiser": system.backbone}
    learned = sum(p.numel() for _, p in trained(system.backbone))
    for kind, encoder in (("text_encoder", system.text_encoder), ("autoencoder", system.autoencoder)):
        parts |= {f"{kind}.{name}": network for name, network in networks(encoder).items()}
    numbers = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    return numbers | ({"denoiser, trained": learned} if learned < numbers["denoiser"] else {})


def describe(phase: PhaseCost, job: Job, share: Share, update: int, rate: float, gpus: int) -> dict:
    """One phase of the plan.

    Args:
        update: FLOPs of a step of the optimizer, on all ranks.
        rate: useful FLOPs per GPU-hour.
    """
    step, steps = phase.step, phase.end - phase.start
    encoders = phase.per_step(step.encoders)
    live = phase.per_step(step.useful) + update
    counted = live - encoders if job.cached else live

    parts = [call.part for call in step.calls]
    learned_from = next(call.part for call in step.calls if call.learns)
    learning = [call for call in step.calls if call.part == learned_from]

    return {
        "start": phase.start,
        "end": phase.end,
        "batch": phase.batch,
        "micro_batches": phase.micro_batches,
        "shapes": {f"{height}x{width}": count for (height, width), count in phase.shapes},
        "calls": {part: phase.micro_batches * parts.count(part) for part in dict.fromkeys(parts)},
        "image_tokens": phase.per_step(sum(call.image_tokens for call in learning)),
        "text_tokens": phase.per_step(sum(call.text_tokens for call in learning)),
        "flops": {part: phase.per_step(number) for part, number in step.flops.items()}
        | ({"optimizer": update} if update else {}),
        "useful_flops": live,
        "useful_flops_cached": live - encoders,
        "encoder_share": encoders / live,
        "traffic": traffic(share, step.calls, phase.micro_batches),
        "gpu_hours": steps * counted / rate,
        "days": steps * counted / rate / gpus / 24,
        "gpu_hours_cached": steps * (live - encoders) / rate,
    }


def storage(job: Job, costs: list[PhaseCost], optimizer: int) -> dict:
    """Bytes on disk: per checkpoint, per image (cached latents, by shape), per caption token and per caption.

    `optimizer`: bytes of its state.
    """
    net, system = job.system.backbone, job.system
    weights = sum(p.nbytes for _, p in trained(net))  # a checkpoint leaves out what is frozen

    # shapes of cached latents, from the autoencoder on the meta device; features are on the same grid
    latents, features = {}, {}
    encoder = getattr(system.objective, "feature_encoder", None)
    for shape in dict.fromkeys(shape for phase in costs for shape, _ in phase.shapes):
        mean, deviation = system.autoencoder.moments([torch.empty(3, *shape, device=META)])
        numbers = mean.tokens.numel() * (1 if deviation is None else 2)
        name = f"{shape[0]}x{shape[1]}"
        latents[name] = {"cached": BYTES * numbers, "one_sample": BYTES * mean.tokens.numel()}
        if encoder is not None:
            features[name] = BYTES * len(mean.tokens) * encoder.feature_dim

    return {
        "checkpoint": (1 + len(job.trainer.ema_tracks)) * weights + optimizer,  # live weights and their averages
        "latents_per_image": latents,
        "features_per_image": features,
        "text_per_token": BYTES * system.text_encoder.text_dim,
        "pooled_per_caption": BYTES * system.text_encoder.pooled_dim,
    }


def assumptions(costs: list[PhaseCost], job: Job) -> list[str]:
    """What the estimate assumes, a sentence each."""
    call = costs[-1].step.calls[0]
    return [
        f"every caption has {call.text_tokens // costs[-1].step.num_images} tokens; no prompt dropout",
        "images are square, at the pixel budgets of the data config",
        "MFU does not count recomputation (activation checkpointing)",
        "data loading, checkpoints, validation, sample grids and evaluation take no time",
        f"{1 - USABLE:.0%} of GPU memory is left free",
    ] + (["latents and text embeddings are read from a cache"] if job.cached else [])


def warnings(
    job: Job, share: Share, costs: list[PhaseCost], described: list[dict], room: dict, start: dict
) -> list[str]:
    """Problems that would stop the run or waste GPUs, a line each."""
    trainer, gpus, multiple, lines = job.trainer, share.size, job.system.objective.batch_multiple, []

    # batches that cannot be divided over the ranks, or only into small micro-batches
    for phase in costs:
        try:
            trainer.micro_batches(gpus, multiple, phase.start)
        except UserError as error:
            lines.append(f"the run cannot start: from step {phase.start}: {error}")
            continue
        micro = phase.micro_batch_size(gpus)
        if 2 * micro < min(trainer.micro_batch_size, phase.batch // gpus):
            lines.append(
                f"from step {phase.start}: micro-batches have {micro} images, because {phase.batch // gpus} per GPU "
                f"have no larger divisor up to {trainer.micro_batch_size} that is a multiple of {multiple}"
            )
    if start["change"] and start["on"]:
        lines.append(f"the largest number of GPUs on which the run can start is {start['on']}")

    # sharding and encoders
    if share.empty_ranks:
        lines.append(f"{share.empty_ranks} of {gpus} ranks hold no parameters; set trainer.shard_size to fewer ranks")
    shares = [phase["encoder_share"] for phase in described]
    if max(shares) > ENCODER_SHARE and not job.cached:
        lines.append(f"the encoders take {max(shares):.0%} of all FLOPs; cache their outputs with selfe precompute")

    # memory
    (own,) = (variant for variant in room["variants"] if variant["configured"])
    if own["peak"] > room["usable"]:
        most = own["largest_micro_batch"]
        lines.append(f"a micro-batch of {own['micro_batch_size']} does not fit in memory; the largest is {most}")
    return list(dict.fromkeys(lines))


def main(options: argparse.Namespace) -> None:
    """Entry point of `selfe plan`."""
    names = ("gpus", "gpu", "mfu", "caption_tokens", "cached")
    result = plan(options.config, options.overrides, **{name: getattr(options, name) for name in names})
    print(json.dumps(result, indent=1) if options.json else plan_page.text(result))
