"""Benchmarks of the method: objective, sampling, optimizer and EMA. No data, random weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from measure import at_least, at_most, flops, peak_bytes, take_turns
from model import BATCH, BATCHES, aspect, denoiser, flux, ideal, padded, texts, wide
from torch import Tensor, nn

from selfe import flow
from selfe.objectives.alpha_flow import AlphaFlow
from selfe.objectives.any_flow import AnyFlow
from selfe.objectives.flow_matching import FlowMatching
from selfe.objectives.mean_flow import MeanFlow
from selfe.objectives.self_evaluation import SelfEvaluation
from selfe.objectives.so_flow import SoFlow
from selfe.objectives.terminal_velocity import TerminalVelocity
from selfe.objectives.transition_model import TransitionModel
from selfe.protocols import Objective
from selfe.rng import SampleRNG
from selfe.samplers.euler import Euler
from selfe.samplers.guidance import guided
from selfe.training import ema
from selfe.types import Packed, TextCond, packed

NUM_STEPS, GUIDANCE, PADDED_TO = 4, 5.0, 512
# of a step, relative to flow matching, and its calls of the denoiser
BOUNDS = {
    "selfe": {"FLOPs": 1.32, "time": 1.35, "peak memory": 1.02, "calls": 3},
    "selfe with auxiliary term": {"FLOPs": 1.83, "time": 1.93, "peak memory": 1.30, "calls": 4},
}
# FLOPs of a step relative to flow matching, and calls of the denoiser, of the objectives of flow maps
FLOW_MAPS = {
    "iMF": (MeanFlow(), 1.5, 3),
    "MeanFlow": (MeanFlow(tangent="data"), 1.34, 2),
    "alpha-Flow": (AlphaFlow(alpha_end_step=1), 1.17, 2),
    "SoFlow": (SoFlow(), 1.09, 2),
    "SoFlow with Self-E's score": (SoFlow(k_cls=1.0), 1.26, 4),
    "TiM": (TransitionModel(), 1.34, 2),
    "AnyFlow": (AnyFlow(), 1.34, 2),
    "TVM": (TerminalVelocity(), 3.34, 3),
}
TWO_B = {"width": 2048, "double": 8, "single": 16, "text_dim": 4096, "pooled_dim": 768}


class Counted:
    """Wraps a denoiser and counts its calls."""

    def __init__(self, net: nn.Module):
        self.net, self.calls = net, 0

    def __call__(self, *arguments: Packed | Tensor | TextCond) -> Tensor:
        self.calls += 1
        return self.net(*arguments)


def selfe(rounds: int) -> dict:
    """Loss and backward of Self-E, with and without the auxiliary term, relative to flow matching on the same batches.
    Of the objectives of flow maps, operations and calls alone.

    Lengths from `wide`; the null prompt is one token, "fake image" two. Memory is the training total: weights, EMA, the
    optimizer's two moments, and a step's activations and gradients without activation checkpointing.
    """
    objectives = {
        "flow matching": FlowMatching(),
        "selfe": SelfEvaluation(aux_start_step=None),
        "selfe with auxiliary term": SelfEvaluation(aux_start_step=0),
    }
    net, average = Counted(denoiser()), Counted(denoiser(1).requires_grad_(False))
    works = {name: learn(objective, net, average, step=300_000) for name, objective in objectives.items()}

    # FLOPs, calls and memory in one run each; time in interleaved rounds
    state = 4 * sum(parameter.nbytes for parameter in net.net.parameters())
    counted, calls, memory = {}, {}, {}
    for name, work in works.items():
        net.calls = average.calls = 0
        counted[name] = flops(work)
        calls[name] = (net.calls + average.calls) / BATCHES
        memory[name] = peak_bytes(work) + state
    seconds = take_turns(works, rounds)

    figures = {f"{name}: GFLOP": round(value / BATCHES / 1e9, 2) for name, value in counted.items()}
    figures |= {f"{name}: CPU milliseconds": round(1000 * value / BATCHES, 1) for name, value in seconds.items()}
    figures |= {f"{name}: peak MB": round(value / 1e6, 1) for name, value in memory.items()}

    checks = []
    measured = {"FLOPs": counted, "time": seconds, "peak memory": memory}
    for name, bounds in BOUNDS.items():
        for what, values in measured.items():
            ratio = values[name] / values["flow matching"]
            checks.append(at_most(f"{name} / flow matching: {what}", ratio, bounds[what]))
        checks.append(at_most(f"{name}: denoiser calls", calls[name], bounds["calls"]))

    for name, (objective, most_flops, most_calls) in FLOW_MAPS.items():
        net.calls = average.calls = 0
        operations = flops(learn(objective, net, average, step=300_000))
        figures |= {f"{name}: GFLOP": round(operations / BATCHES / 1e9, 2)}
        ratio, num_calls = operations / counted["flow matching"], (net.calls + average.calls) / BATCHES
        checks.append(at_most(f"{name} / flow matching: FLOPs", ratio, most_flops))
        checks.append(at_most(f"{name}: denoiser calls", num_calls, most_calls))
    return {"figures": figures, "checks": checks}


def learn(objective: Objective, net: Counted, average: Counted, step: int) -> Callable[[], None]:
    """Forward and backward over all batches.

    Each shape occurs twice in a row, so that self-evaluated rows (s < t) have as many tokens as the others.
    """
    batches = []
    for seed in range(BATCHES):
        grids, captions = (twice(values[: BATCH // 2]) for values in wide(seed))
        x0 = packed(torch.randn(sum(rows * columns for rows, columns in grids), net.net.patch_dim), grids)
        rng = SampleRNG.of_step(seed, step, range(BATCH))
        wanted = objective.captions(["word " * n for n in captions], rng, step)
        conds = {name: texts([max(len(text.split()), 1) for text in texts_of]) for name, texts_of in wanted.items()}
        batches.append((x0, conds, rng, step))

    def work() -> None:
        for batch in batches:
            objective(net, average, *batch).per_sample.mean().backward()
            net.net.zero_grad()

    return work


def twice(values: list) -> list:
    """Every value twice in a row."""
    return [value for value in values for _ in range(2)]


@torch.no_grad()
def sample(rounds: int) -> dict:
    """Four Euler steps for eight images of about 256 x 256 pixels: with guidance, and at guidance 1.

    The peer is a loop as in usual pipelines: captions padded to 512 tokens, and FLUX called twice per step.
    """
    grids, captions = aspect(0)
    cond, null = texts(captions), texts([1] * BATCH)
    noise = packed(torch.randn(sum(rows * columns for rows, columns in grids), denoiser().patch_dim), grids)
    t, s = flow.sampling_times(NUM_STEPS, 0.0, noise)
    net, peer, rng = Counted(denoiser()), Counted(flux()), SampleRNG.of_step(0, 0, range(BATCH))

    def draw(cfg_scale: float) -> Callable[[], Tensor]:
        return lambda: Euler()(guided(net, cond, null, cfg_scale), noise, t, s, rng)

    def pad() -> None:
        for k in range(NUM_STEPS):
            for text in (cond, null):
                peer(*padded(noise, t[k], s[k], text, PADDED_TO))

    works = {"guided": draw(GUIDANCE), "guidance 1": draw(1), "padded": pad}

    calls = {}
    for name, work in works.items():
        net.calls = 0
        work()
        calls[name] = net.calls
    counted, seconds = {name: flops(work) for name, work in works.items()}, take_turns(works, rounds)

    figures = {f"{name}: GFLOP": round(value / 1e9, 2) for name, value in counted.items()}
    figures |= {f"{name}: CPU seconds": round(value, 3) for name, value in seconds.items()}

    # the 2B model by formula: unpadded and padded captions
    true = ideal(grids * 2, [*captions, *[1] * BATCH], **TWO_B, learns=False)
    full = ideal(grids * 2, [PADDED_TO] * 2 * BATCH, **TWO_B, learns=False)
    figures |= {"padded / guided: FLOPs of the 2B model, by formula": round(full / true, 2)}
    checks = [
        at_most("guidance 1 / guided: FLOPs", counted["guidance 1"] / counted["guided"], 0.53),
        at_most("guidance 1 / guided: time", seconds["guidance 1"] / seconds["guided"], 0.53),
        at_most("guided: denoiser calls", calls["guided"], NUM_STEPS),
        at_most("guidance 1: denoiser calls", calls["guidance 1"], NUM_STEPS),
        at_least("padded / guided: FLOPs", counted["padded"] / counted["guided"], 2.9),
        at_least("padded / guided: time", seconds["padded"] / seconds["guided"], 2.9),
    ]
    return {"figures": figures, "checks": checks}


def optim(rounds: int) -> dict:
    """A step of torch's AdamW (fused, foreach, loop), and an update of the EMA against a loop over the parameters."""
    net, average = denoiser(), denoiser(1).requires_grad_(False)
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)

    ways = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}
    works = {f"AdamW, {name}": torch.optim.AdamW(net.parameters(), **way).step for name, way in ways.items()}
    works |= {
        "EMA, selfe": lambda: ema.update(average, net, 0.9999),
        "EMA, loop": lambda: one_by_one(average, net, 0.9999),
    }

    seconds = take_turns(works, rounds)
    checks = [
        at_least("AdamW: loop / fused", seconds["AdamW, loop"] / seconds["AdamW, fused"], 2),
        at_least("AdamW: foreach / fused", seconds["AdamW, foreach"] / seconds["AdamW, fused"], 2),
        at_least("EMA: loop / selfe", seconds["EMA, loop"] / seconds["EMA, selfe"], 0.95),
    ]
    figures = {f"{name}: CPU milliseconds": round(1000 * value, 2) for name, value in seconds.items()}
    return {"figures": figures, "checks": checks}


@torch.no_grad()
def one_by_one(average: nn.Module, net: nn.Module, decay: float) -> None:
    """Reference EMA update, parameter by parameter."""
    for mean, weight in zip(average.parameters(), net.parameters(), strict=True):
        mean.mul_(decay).add_(weight, alpha=1 - decay)
