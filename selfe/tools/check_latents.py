"""The verb `selfe check-latents`: are the tokens of an autoencoder about standard normal, and does it reconstruct?

A scale or shift in the wrong place leaves every shape as it is, and training runs, but on latents that noise does not
match. This encodes some images of a training config and compares.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from selfe import compare, config, device
from selfe.data.cached import CachedData
from selfe.errors import UserError
from selfe.log import Progress
from selfe.protocols import Autoencoder, Data
from selfe.types import signed

MEAN, STD = 0.5, (0.5, 2.0)  # bounds for autoencoders that normalise their latents
PIXEL_STD = (0.1, 10.0)  # for those that do not, such as pixels
PSNR = 15.0  # dB; VAEs reach 25 to 35
CLOSE = 0.3  # relative difference up to which a value is taken for another one


@dataclass(frozen=True)
class LatentStatistics:
    """Of the tokens of some images, and of their reconstructions."""

    num_images: int
    mean: Tensor  # (token_dim,)
    std: Tensor  # (token_dim,)
    psnr: tuple[float, ...]  # dB, of each image

    @property
    def total_mean(self) -> float:
        return self.mean.mean().item()

    @property
    def total_std(self) -> float:
        """Over all values: the deviations within channels and the differences of their means."""
        return (self.std.square().mean() + self.mean.var(correction=0)).sqrt().item()


def main(options: argparse.Namespace) -> None:
    """Entry point of `selfe check-latents`."""
    settings = config.load(options.config, options.overrides)
    for section in ("system", "data"):
        if section not in settings:
            raise UserError(f"{options.config}: has no section {section}; give a training config")
    with torch.device("meta"):
        autoencoder = config.build_part(compare.uncached(settings["system"])["autoencoder"], "system.autoencoder")
    data = config.build(settings, "data")
    data = data.source if isinstance(data, CachedData) else data
    if data.multiple % autoencoder.multiple:
        raise UserError(
            f"data: image sides are multiples of {data.multiple}, but system.autoencoder needs multiples of "
            f"{autoencoder.multiple}; make the first a multiple of the second"
        )

    autoencoder.load(device.choose_device(0))
    measured = measure(autoencoder, data, settings["seed"], options.images, options.batch_size)
    constants = getattr(autoencoder, "constants", {})
    print(describe(measured, constants))
    if problem := diagnose(measured, constants):
        raise UserError(f"{options.config}: system.autoencoder: {problem}")
    print("these latents can be trained on")


@torch.no_grad()
def measure(autoencoder: Autoencoder, data: Data, seed: int, num_images: int, batch_size: int) -> LatentStatistics:
    """Encode and decode the first images of an epoch, at most `num_images`."""
    num_images = min(num_images, getattr(data, "num_images", None) or num_images)
    samples, psnr = range(num_images), []
    total, squares, num_tokens = 0.0, 0.0, 0

    progress = Progress("images", num_images)
    for first in range(0, num_images, batch_size):
        positions = samples[first : first + batch_size]
        images = [signed(image) for image in data.batch(seed, 0, samples, positions, "train").images]

        # moments of the tokens that training sees: of their distribution, not of one sample
        mean, deviation = autoencoder.moments(images)
        values = mean.tokens.double()
        variances = torch.zeros_like(values) if deviation is None else deviation.double().square()
        total = total + values.sum(dim=0)
        squares = squares + (values.square() + variances).sum(dim=0)
        num_tokens += len(values)

        for image, decoded in zip(images, autoencoder.decode(mean), strict=True):
            error = (decoded.float().cpu().clamp(-1, 1) - image.cpu()).square().mean().item()
            psnr.append(10 * math.log10(4 / max(error, 1e-12)))
        progress.advance(len(positions))
    progress.close()

    mean = total / num_tokens
    std = (squares / num_tokens - mean.square()).clamp_min(0).sqrt()
    return LatentStatistics(num_images, mean.cpu(), std.cpu(), tuple(psnr))


def describe(measured: LatentStatistics, constants: Mapping[str, float]) -> str:
    """The figures as text."""
    mean, std, psnr = measured.mean, measured.std, sorted(measured.psnr)
    lines = [
        f"{measured.num_images} images, tokens of {len(mean)} channels",
        f"mean:  {measured.total_mean:.3f} of all values, {mean.min():.3f} to {mean.max():.3f} by channel",
        f"std:   {measured.total_std:.3f} of all values, {std.min():.3f} to {std.max():.3f} by channel",
        f"PSNR:  {statistics.median(psnr):.1f} dB in the median, {psnr[0]:.1f} to {psnr[-1]:.1f} by image",
    ]
    if constants:
        lines.append("constants: " + ", ".join(f"{name} {value:.6g}" for name, value in constants.items()))
    return "\n".join(lines)


def diagnose(measured: LatentStatistics, constants: Mapping[str, float]) -> str:
    """What is wrong and the constant that is the likely cause; empty if nothing is."""
    mean, std = measured.total_mean, measured.total_std
    if not math.isfinite(mean) or not math.isfinite(std):
        return "its tokens are infinite or NaN; set its params.dtype=fp32"

    # the deviation
    scale = constants.get("scaling_factor")
    low, high = STD if constants else PIXEL_STD
    if not low <= std <= high:
        problem = f"its tokens have a standard deviation of {std:.3g} instead of about 1"
        return f"{problem}; {wrong_scale(std, scale)}" if scale else problem

    # the mean
    if constants and abs(mean) > MEAN:
        problem = f"its tokens have a mean of {mean:.3g} instead of about 0"
        shift = constants.get("shift_factor", 0.0)
        return f"{problem}; {wrong_shift(mean, shift, scale)}" if scale else problem

    psnr = statistics.median(measured.psnr)
    if psnr < PSNR:
        return (
            f"its reconstructions have a PSNR of {psnr:.1f} dB, although the tokens are normalised; decoding does not "
            "undo the scale and shift of encoding, or the decoder's weights are not those of the encoder"
        )
    return ""


def wrong_scale(std: float, scale: float) -> str:
    """Why latents with this deviation after scaling do not have the scale that they need."""
    raw = std / scale
    advice = f"scaling_factor is {scale:.6g}, the latents of these images need about {1 / raw:.4g}"
    if is_close(scale, raw):
        return f"{advice}: it is the inverse"
    if is_close(raw, 1):
        return f"{advice}: they are normalised before it, so it is applied twice"
    if scale == 1:
        return f"{advice}: it is missing from the config.json"
    return advice


def wrong_shift(mean: float, shift: float, scale: float) -> str:
    """Why latents with this mean after shift and scale do not have the shift that they need."""
    raw = mean / scale + shift
    advice = f"shift_factor is {shift:.6g}, the latents of these images need about {raw:.4g}"
    if shift and is_close(raw, -shift):
        return f"{advice}: its sign is wrong"
    return f"{advice}: it is missing from the config.json" if shift == 0 else advice


def is_close(value: float, other: float) -> bool:
    return abs(value - other) <= CLOSE * abs(other)
