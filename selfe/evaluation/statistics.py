"""Distances between sets of features and their bootstrap intervals, in float64.

The rows of a set are read in blocks, so that memory does not grow with their number where the definition allows it: a
Frechet distance needs means and covariances only. The other distances compare all pairs of rows, also in blocks; their
callers bound the number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from selfe.rng import philox

BLOCK = 1024  # rows of a matrix of all pairs that are in memory at once
CONFIDENCE = 95  # percent
NORMAL = 1.96  # half the width of that interval of a normal distribution, in standard deviations

Kernel = Callable[[Tensor, Tensor], Tensor]  # (n, d), (m, d) -> (n, m)


class Rows(Protocol):
    """A set of features that may be larger than memory."""

    def __len__(self) -> int: ...

    def blocks(self) -> Iterator[Tensor]:
        """All rows in order, float64 (n, d) each."""
        ...


class Estimate(NamedTuple):
    """A number with its bootstrap interval; None without one."""

    value: float
    low: float | None = None
    high: float | None = None


# ---- bootstrap ----


class Bootstrap:
    """Resamples groups of images with replacement; all images of a group stay together.

    The same groups are drawn for every sampling setting of the same images, so that settings are compared in pairs.
    """

    def __init__(self, groups: Sequence[int], count: int):
        """
        Args:
            groups: the group of each image, numbered from 0.
            count: number of replicates; 0 for no intervals.
        """
        self.groups, self.count = np.asarray(groups, dtype=np.int64), count
        self.num_groups = int(self.groups.max()) + 1 if len(self.groups) else 0

    def weights(self, replicate: int) -> Tensor:
        """How often each image (n,) is in a replicate, float64."""
        drawn = philox("bootstrap", replicate).integers(self.num_groups, size=self.num_groups)
        counts = np.bincount(drawn, minlength=self.num_groups)
        return torch.from_numpy(counts[self.groups].astype(np.float64))

    def all_weights(self) -> Tensor:
        """Ones, then the weights of each replicate: (1 + count, n)."""
        ones = torch.ones(len(self.groups), dtype=torch.float64)
        return torch.stack([ones, *(self.weights(replicate) for replicate in range(self.count))])

    def mean(self, values: Tensor) -> Estimate:
        """The mean of a value per image (n,), all images weighted equally."""
        values = values.double()
        weights = (self.weights(replicate) for replicate in range(self.count))
        return interval(values.mean().item(), [(w @ values / w.sum()).item() for w in weights])

    def deviation(self, values: Tensor) -> Estimate:
        """The standard deviation of a value per image (n,), that of the images and not of what they are drawn from."""
        centred = values.double() - values.double().mean()

        def deviation(w: Tensor) -> float:
            mean, square = w @ centred / w.sum(), w @ centred.square() / w.sum()
            return (square - mean.square()).clamp_min(0).sqrt().item()

        weights = (self.weights(replicate) for replicate in range(self.count))
        return interval(deviation(torch.ones_like(centred)), [deviation(w) for w in weights])


def interval(value: float, replicates: Sequence[float]) -> Estimate:
    """The percentiles of the replicates, moved so that their mean is the value.

    A replicate contains images several times, which moves distances such as FD upwards; the width of the interval does
    not depend on this shift.
    """
    if not len(replicates):
        return Estimate(value)
    tail = (100 - CONFIDENCE) / 2
    low, high = np.percentile(replicates, [tail, 100 - tail]) - np.mean(replicates)
    return Estimate(value, value + float(low), value + float(high))


def pooled(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of one number over several runs, such as training seeds, with an interval over runs and images.

    Its width is that of a bootstrap that draws runs with replacement, and images within each: the variance of the mean
    of k runs is (variance of the k values + mean of their own variances) / k. Each side has its own width.
    """
    count, mean = len(estimates), sum(each.value for each in estimates) / len(estimates)
    if any(each.low is None for each in estimates):
        return Estimate(mean)

    between = NORMAL**2 * sum((each.value - mean) ** 2 for each in estimates)
    below = math.sqrt(between + sum((each.value - each.low) ** 2 for each in estimates)) / count
    above = math.sqrt(between + sum((each.high - each.value) ** 2 for each in estimates)) / count
    return Estimate(mean, mean - below, mean + above)


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of independent numbers; the squares of the widths of their intervals add up."""
    count, value = len(estimates), sum(each.value for each in estimates) / len(estimates)
    if any(each.low is None for each in estimates):
        return Estimate(value)
    below = sum((each.value - each.low) ** 2 for each in estimates) ** 0.5 / count
    above = sum((each.high - each.value) ** 2 for each in estimates) ** 0.5 / count
    return Estimate(value, value - below, value + above)


# ---- Frechet distance ----


@dataclass(frozen=True)
class Moments:
    """Mean (d,) and unbiased covariance (d, d) of features."""

    count: float
    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, rows: Rows, weights: Tensor | None = None) -> Moments:
        """In one pass over the rows; `weights` (n,): how often each row counts."""
        count, start = 0.0, 0
        origin = total = outer = None
        for block in rows.blocks():
            if origin is None:
                origin = block.mean(dim=0)  # close to the mean, so that nothing cancels
                total, outer = torch.zeros_like(origin), block.new_zeros(block.shape[1], block.shape[1])
            w = block.new_ones(len(block)) if weights is None else weights[start : start + len(block)].to(block.device)
            start += len(block)

            centred = block - origin
            weighted = centred * w[:, None]
            count += w.sum().item()
            total += weighted.sum(dim=0)
            outer += centred.T @ weighted

        mean = total / count
        return cls(count, origin + mean, (outer - count * torch.outer(mean, mean)) / (count - 1))


def root(matrix: Tensor) -> Tensor:
    """The square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def frechet(a: Moments, b: Moments, root_b: Tensor) -> float:
    """Squared Frechet distance between normal distributions (Dowson and Landau 1982); `root_b`: root of b's covariance.

    As FID in pytorch-fid, clean-fid and torch-fidelity, for any features.
    """
    cross = torch.linalg.eigvalsh(root_b @ a.covariance @ root_b).clamp_min(0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return distance.item()


class Frechet(NamedTuple):
    """A Frechet distance, and what explains it."""

    distance: Estimate
    of_means: Estimate  # the part of the distance that is due to the means
    extent: Estimate  # total variance of the generated features, relative to that of the reference


def frechet_distance(generated: Rows, reference: Moments, root_b: Tensor, bootstrap: Bootstrap) -> Frechet:
    """FD of generated images; a pass over their features per replicate."""

    def numbers(weights: Tensor | None) -> tuple[float, float, float]:
        moments = Moments.of(generated, weights)
        of_means = (moments.mean - reference.mean).square().sum().item()
        extent = (moments.covariance.trace() / reference.covariance.trace()).item()
        return frechet(moments, reference, root_b), of_means, extent

    values = numbers(None)
    replicates = [numbers(bootstrap.weights(replicate)) for replicate in range(bootstrap.count)]
    return Frechet(*(interval(values[i], [each[i] for each in replicates]) for i in range(3)))


# ---- maximum mean discrepancy ----


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """(x . y / d + 1)^3, the kernel of KID."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x: Tensor, y: Tensor, sigma: float = 10) -> Tensor:
    """exp(-|x - y|^2 / (2 sigma^2)), the kernel of CMMD."""
    return (squared_distances(x, y) / (-2 * sigma**2)).exp()


def quadratic_forms(kernel: Kernel, x: Tensor, y: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """sum_ij left[r, i] kernel(x_i, y_j) right[r, j] for every r: (R, n), (R, m) -> (R,)."""
    total = left.new_zeros(len(left))
    for rows, weights in zip(x.split(BLOCK), left.split(BLOCK, dim=1), strict=True):
        total += ((right @ kernel(rows, y).T) * weights).sum(dim=1)
    return total


def kid(x: Tensor, y: Tensor, bootstrap: Bootstrap) -> Estimate:
    """Kernel inception distance (Binkowski et al. 2018): unbiased estimate of the squared MMD over all pairs.

    As torch-fidelity and torchmetrics with a single subset of all images; n and m rows are generated and reference.
    """
    weights = bootstrap.all_weights().to(x.device)
    ones, counts, m = y.new_ones(1, len(y)), weights.sum(dim=1), len(y)

    # without the pairs of an image with itself
    diagonal_x, diagonal_y = (((rows * rows).mean(dim=1) + 1) ** 3 for rows in (x, y))
    xx = quadratic_forms(polynomial, x, x, weights, weights) - weights @ diagonal_x
    yy = quadratic_forms(polynomial, y, y, ones, ones) - diagonal_y.sum()
    xy = quadratic_forms(polynomial, x, y, weights, ones.expand(len(weights), -1))

    values = xx / (counts * (counts - 1)) + yy / (m * (m - 1)) - 2 * xy / (counts * m)
    value, *replicates = values.tolist()
    return interval(value, replicates)


def cmmd(x: Tensor, y: Tensor, bootstrap: Bootstrap) -> Estimate:
    """CMMD (Jayasumana et al. 2024): 1000 x the squared MMD of unit features, Gaussian kernel, over all pairs.

    As google-research/cmmd, which takes CLIP ViT-L/14 at 336 pixels for features.
    """
    x, y = torch.nn.functional.normalize(x, dim=1), torch.nn.functional.normalize(y, dim=1)
    weights = bootstrap.all_weights().to(x.device)
    ones, counts, m = y.new_ones(1, len(y)), weights.sum(dim=1), len(y)

    xx = quadratic_forms(gaussian, x, x, weights, weights) / counts.square()
    yy = quadratic_forms(gaussian, y, y, ones, ones) / m**2
    xy = quadratic_forms(gaussian, x, y, weights, ones.expand(len(weights), -1)) / (counts * m)
    value, *replicates = (1000 * (xx + yy - 2 * xy)).tolist()
    return interval(value, replicates)


# ---- nearest neighbours ----


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x - y|^2 of all pairs: (n, d), (m, d) -> (n, m)."""
    squares = x.square().sum(dim=1, keepdim=True) + y.square().sum(dim=1)
    return (squares - 2 * x @ y.T).clamp_min(0)


def squared_radii(x: Tensor, k: int) -> Tensor:
    """The squared distance (n,) of each row to its k-th nearest other row."""
    return torch.cat([squared_distances(rows, x).kthvalue(k + 1, dim=1).values for rows in x.split(BLOCK)])


class Neighbours(NamedTuple):
    """Precision and density per generated row (n,), recall and coverage per reference row (m,)."""

    precision: Tensor
    recall: Tensor
    density: Tensor
    coverage: Tensor


def neighbours(x: Tensor, y: Tensor, k: int) -> Neighbours:
    """Improved precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    As clovaai/generative-evaluation-prdc. The means over the rows are the metrics.

    Args:
        x: generated features (n, d).
        y: reference features (m, d).
        k: the ball of a row reaches to its k-th nearest other row.
    """
    radii_x, radii_y = squared_radii(x, k), squared_radii(y, k)
    density, covered = [], y.new_zeros(len(y), dtype=torch.bool)
    recalled = covered.clone()
    for rows, radii in zip(x.split(BLOCK), radii_x.split(BLOCK), strict=True):
        distances = squared_distances(rows, y)
        inside = distances < radii_y
        density.append(inside.sum(dim=1).double() / k)
        covered |= inside.any(dim=0)
        recalled |= (distances < radii[:, None]).any(dim=0)

    densities = torch.cat(density)
    return Neighbours((densities > 0).double(), recalled.double(), densities, covered.double())
