"""Benchmark of the denoiser: forward and backward against diffusers' FLUX. No data, random weights."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from measure import at_least, at_most, flops, take_turns
from torch import Tensor, nn

from selfe.backbones.mmdit import SINUSOID, MMDiT
from selfe.data.buckets import Buckets
from selfe.device import has_fast_bf16
from selfe.distributed import activation_checkpoint
from selfe.errors import UserError
from selfe.types import Packed, TextCond, packed

BATCH, BATCHES = 8, 3  # samples per batch; batches per round, of different lengths
PATCH_DIM, TEXT_DIM, POOLED_DIM, WIDTH, HEAD_DIM, DOUBLE, SINGLE = 64, 512, 64, 256, 64, 2, 4
Inputs = tuple[Packed, Tensor, Tensor, TextCond]
Shapes = tuple[list[tuple[int, int]], list[int]]  # grids in patches, caption lengths in tokens


def step(rounds: int) -> dict:
    """Forward and backward on packed tokens, against a FluxTransformer2DModel of equal size on padded tokens.

    FluxTransformer2DModel has no padding mask, so each batch is padded to its longest sample and run without a mask:
    its fastest case.
    """
    ours = {"eager": denoiser(), "compiled": denoiser()}
    theirs = {"eager": flux(), "compiled": flux()}
    activation_checkpoint.compile(ours["compiled"])
    theirs["compiled"].compile_repeated_blocks(fullgraph=True, dynamic=True)  # diffusers' counterpart

    figures, checks = {}, []
    for name, lengths, bounds in (("wide", wide, (1.40, 1.50, 2.1)), ("aspect", aspect, (1.05,))):
        shapes = [lengths(seed) for seed in range(BATCHES)]
        batches = [inputs(*shape) for shape in shapes]
        padded_batches = [padded(*batch) for batch in batches]
        works = {}
        for who, nets, calls in (("selfe", ours, batches), ("flux", theirs, padded_batches)):
            for how, net in nets.items():
                works[f"{who} {how}"] = turn(net, calls, autocast=False)
                works[f"{who} {how}, bf16 autocast"] = turn(net, calls, autocast=True)

        counted = {who: flops(works[f"{who} eager"]) / BATCHES for who in ("selfe", "flux")}
        least = sum(ideal(*shape) for shape in shapes) / BATCHES
        seconds = {who: value / BATCHES for who, value in take_turns(works, rounds).items()}
        figures |= {f"{name}, {who}: GFLOP": round(value / 1e9, 2) for who, value in counted.items()}
        figures |= {f"{name}, {who}: CPU milliseconds": round(1000 * value, 1) for who, value in seconds.items()}

        checks.append(at_most(f"{name}: executed / ideal FLOPs", counted["selfe"] / least, 1.005))
        for who, bound in zip(("eager", "compiled", "compiled, bf16 autocast"), bounds, strict=False):
            speed = seconds["flux eager"] / seconds[f"selfe {who}"]
            figures[f"{name}: flux eager / selfe {who}"] = round(speed, 2)
            if "bf16" in who and not has_fast_bf16(torch.device("cpu")):
                continue  # emulated, so there is no bound to hold
            checks.append(at_least(f"{name}: flux eager / selfe {who}", speed, bound))
    return {"figures": figures, "checks": checks}


def turn(net: nn.Module, calls: Sequence[tuple], autocast: bool) -> Callable[[], None]:
    """Forward and backward for each tuple of arguments in `calls`."""

    def work() -> None:
        for arguments in calls:
            with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                out = net(*arguments)
            (out if isinstance(out, Tensor) else out.sample).square().mean().backward()
            net.zero_grad()

    return work


def denoiser(seed: int = 0, width: int = WIDTH) -> MMDiT:
    """An MMDiT of benchmark size; random weights instead of zero initialization, so that no gradient vanishes."""
    sizes = PATCH_DIM, TEXT_DIM, POOLED_DIM, width, width // HEAD_DIM, DOUBLE, SINGLE
    net = MMDiT(*sizes, rope_axes=(8, 28, 28))
    return randomised(net, seed)


def flux() -> nn.Module:
    """diffusers' FLUX transformer of the same size as `denoiser()`."""
    try:
        from diffusers import FluxTransformer2DModel
    except ImportError as error:
        raise UserError("bench step: the package diffusers is not installed; run scripts/setup.sh") from error

    net = FluxTransformer2DModel(
        in_channels=PATCH_DIM,
        num_layers=DOUBLE,
        num_single_layers=SINGLE,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=WIDTH // HEAD_DIM,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM,
        axes_dims_rope=(8, 28, 28),
    )
    return randomised(net, 0)


def randomised(net: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return net


def wide(seed: int) -> Shapes:
    """Images with sides of 8 to 16 patches; captions of 5 to 77 tokens, median 22."""
    draw = random.Random(seed)
    grids = [(draw.randint(8, 16), draw.randint(8, 16)) for _ in range(BATCH)]
    return grids, [min(max(round(draw.lognormvariate(math.log(22), 0.6)), 5), 77) for _ in range(BATCH)]


def aspect(seed: int) -> Shapes:
    """Images of about 256 patches, from the buckets of 256 x 256 pixels up to 1 : 2; the captions of `wide`."""
    shapes = Buckets(256, 1, 2.0).shapes.tolist()
    return [tuple(shape) for shape in random.Random(seed).choices(shapes, k=BATCH)], wide(seed)[1]


def inputs(grids: Sequence[tuple[int, int]], captions: Sequence[int]) -> Inputs:
    """Random arguments of the denoiser, with s = t / 2."""
    x = packed(torch.randn(sum(rows * columns for rows, columns in grids), PATCH_DIM), grids)
    t = torch.rand(len(grids))
    return x, t, t / 2, texts(captions)


def texts(captions: Sequence[int]) -> TextCond:
    """Random text conditioning for captions of these lengths."""
    text = packed(torch.randn(sum(captions), TEXT_DIM), [(1, n) for n in captions])
    return TextCond(text, torch.randn(len(captions), POOLED_DIM))


def padded(x: Packed, t: Tensor, s: Tensor, cond: TextCond, captions_to: int = 0) -> tuple:
    """The same arguments for `flux()`: captions padded to the longest of the batch, or to at least `captions_to`."""
    image, text = (nn.utils.rnn.pad_sequence(part.split(), batch_first=True) for part in (x, cond.text))
    text = nn.functional.pad(text, (0, 0, 0, max(captions_to - text.shape[1], 0)))

    # FLUX takes one table of positions for all images; its values do not change the cost
    places = torch.zeros(image.shape[1], 3)
    places[:, 1] = torch.arange(len(places))
    return image, text, cond.pooled, t, places, torch.zeros(text.shape[1], 3)


def ideal(
    grids: Sequence[tuple[int, int]],
    captions: Sequence[int],
    width: int = WIDTH,
    double: int = DOUBLE,
    single: int = SINGLE,
    text_dim: int = TEXT_DIM,
    pooled_dim: int = POOLED_DIM,
    learns: bool = True,
) -> int:
    """FLOPs of forward (and backward, if `learns`) by formula, for the true lengths without padding.

    The backward pass of a matrix product costs one product for each of its two gradients; the input projections need
    only one, for their weights. Attention: two products of n x n x width forward, five backward (scores are
    recomputed).
    """
    images, words, samples = sum(rows * columns for rows, columns in grids), sum(captions), len(captions)
    squares = sum((rows * columns + n) ** 2 for (rows, columns), n in zip(grids, captions, strict=True))

    # multiply-adds in units of the width
    inputs = images * PATCH_DIM + words * text_dim + samples * (2 * SINUSOID + pooled_dim)
    per_token = (images + words) * (double + single) * 12 * width + images * PATCH_DIM
    per_sample = samples * (3 + 12 * double + 3 * single + 2) * width
    attention = 2 * squares * (double + single)

    # backward
    if learns:
        inputs, per_token, per_sample, attention = 2 * inputs, 3 * per_token, 3 * per_sample, 3.5 * attention
    return int(2 * width * (inputs + per_token + per_sample + attention))
