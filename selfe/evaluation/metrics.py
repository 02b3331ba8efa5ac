"""The metrics of evaluation, computed from the features of generated and reference images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from selfe.errors import UserError
from selfe.evaluation import statistics
from selfe.evaluation.features import FeatureSet
from selfe.evaluation.image_sets import evenly_spaced
from selfe.evaluation.results import BY_NEIGHBOURS, WITH_REFERENCE
from selfe.evaluation.statistics import Bootstrap, Estimate, Frechet, Moments, Neighbours

if TYPE_CHECKING:
    from selfe.evaluation.settings import MetricSettings

FEWEST_PROMPTS = 20  # with fewer, images are resampled one by one, because intervals of few groups are too narrow
OWN = ("features", "aligned", "maps")  # outputs of an extractor that are not scores
CATEGORY_MEAN = "category_mean"
BY_CATEGORY = ("clip_score", "retrieval", "scores")  # metrics that are also averaged over each category of prompts

Values = dict[str, Estimate]


class Reference:
    """The features of the real images, with what all sampling settings are compared to."""

    def __init__(self, features: FeatureSet, most: int):
        self.features, self.most = features, most

    @cached_property
    def moments(self) -> Moments:
        return Moments.of(self.features)

    @cached_property
    def root(self) -> Tensor:
        return statistics.root(self.moments.covariance)

    @cached_property
    def rows(self) -> Tensor:
        """At most `most` rows, of which all pairs are compared."""
        return self.features.some(self.most)[0]


@dataclass(frozen=True)
class Measured:
    """What metrics are computed from: the images of a sampling setting, as one extractor sees them."""

    features: FeatureSet
    captions: Sequence[int]  # the number of each image's caption
    texts: Tensor | None  # features of all captions of the job (C, e); None: the extractor has no text encoder
    reference: Reference | None
    settings: MetricSettings
    categories: Sequence[str] = ()  # that of each image's prompt, "" for none

    @cached_property
    def bootstrap(self) -> Bootstrap:
        return self.bootstrap_of(range(len(self.features)))

    def bootstrap_of(self, indices: Sequence[int]) -> Bootstrap:
        """Resamples the prompts of these images; if there are too few, or as `resample` asks, the images."""
        places: dict[int, int] = {}
        groups = [places.setdefault(self.captions[index], len(places)) for index in indices]
        by_prompt = self.settings.resample == "prompts" and len(places) >= FEWEST_PROMPTS
        return Bootstrap(groups if by_prompt else range(len(groups)), self.settings.bootstrap)

    @cached_property
    def by_category(self) -> dict[str, list[int]]:
        """The images of each category, in the order of their first images."""
        images: dict[str, list[int]] = {}
        for index, category in enumerate(self.categories):
            if category:
                images.setdefault(category, []).append(index)
        return images

    def means(self, name: str, values: Tensor) -> Values:
        """The mean of a value per image (n,), and as NAME/CATEGORY those over the images of each category."""
        values = values.cpu()
        estimates = {name: self.bootstrap.mean(values)}
        for category, indices in self.by_category.items():
            estimates[f"{name}/{category}"] = self.bootstrap_of(indices).mean(values[indices])
        return estimates

    @cached_property
    def frechet(self) -> Frechet:
        reference = self.reference
        return statistics.frechet_distance(self.features, reference.moments, reference.root, self.bootstrap)

    @cached_property
    def rows(self) -> tuple[Tensor, Bootstrap]:
        """At most `max_features` rows, of which all pairs are compared."""
        rows, indices = self.features.some(self.settings.max_features)
        return rows, self.bootstrap_of(indices.tolist())

    @cached_property
    def neighbours(self) -> Neighbours:
        k = self.settings.nearest_k
        if min(len(self.rows[0]), len(self.reference.rows)) <= k:
            raise UserError(
                f"{self.settings.section}.nearest_k: {k} neighbours need more than {k} images in each set, got "
                f"{len(self.rows[0])} generated and {len(self.reference.rows)} reference images"
            )
        return statistics.neighbours(self.rows[0], self.reference.rows, k)


# ---- distances to the reference ----


def fd(measured: Measured) -> Values:
    """Frechet distance of the features: FID with Inception features, FD-DINOv2 with those of DINOv2."""
    return {"fd": measured.frechet.distance}


def fd_of_means(measured: Measured) -> Values:
    """The part of `fd` that is due to the means of the features; the rest is due to their covariances."""
    return {"fd_of_means": measured.frechet.of_means}


def extent(measured: Measured) -> Values:
    """Total variance of the features, relative to the reference: below 1, images vary less than real ones."""
    return {"extent": measured.frechet.extent}


def kid(measured: Measured) -> Values:
    """Kernel distance, polynomial kernel."""
    rows, bootstrap = measured.rows
    return {"kid": statistics.kid(rows, measured.reference.rows, bootstrap)}


def cmmd(measured: Measured) -> Values:
    """Kernel distance of unit features, Gaussian kernel."""
    rows, bootstrap = measured.rows
    return {"cmmd": statistics.cmmd(rows, measured.reference.rows, bootstrap)}


def neighbour_metric(name: str) -> Callable[[Measured], Values]:
    """One of the metrics of nearest neighbours.

    Precision and density are means over generated images, recall and coverage over reference images: these are
    resampled, with the balls around all images as they are.
    """

    def metric(measured: Measured) -> Values:
        values = getattr(measured.neighbours, name)
        of_reference = Bootstrap(range(len(values)), measured.settings.bootstrap)
        return {name: (of_reference if name in ("recall", "coverage") else measured.rows[1]).mean(values.cpu())}

    return metric


# ---- captions ----


def clip_score(measured: Measured) -> Values:
    """100 x cosine similarity of image and caption, mean over images; CLIPScore as in torchmetrics with CLIP."""
    texts = F.normalize(measured.texts, dim=1)
    cosines, start = [], 0
    for block in measured.features.blocks("aligned"):
        own = texts[torch.tensor(measured.captions[start : start + len(block)], device=texts.device)]
        cosines.append((F.normalize(block, dim=1) * own).sum(dim=1))
        start += len(block)
    return measured.means("clip_score", 100 * torch.cat(cosines))


def retrieval(measured: Measured) -> Values:
    """retrieval@k: how often an image's own caption is among the k most similar of all captions of the job.

    Captions with equal features count as one.
    """
    candidates, places = torch.unique(F.normalize(measured.texts, dim=1), dim=0, return_inverse=True)
    ranks, start = [], 0
    for block in measured.features.blocks("aligned"):
        own = places[torch.tensor(measured.captions[start : start + len(block)], device=places.device)]
        similarities = F.normalize(block, dim=1) @ candidates.T
        ranks.append((similarities > similarities.gather(1, own[:, None])).sum(dim=1))
        start += len(block)
    rank, values = torch.cat(ranks), {}
    for k in measured.settings.retrieval_k:
        values |= measured.means(f"retrieval@{k}", rank < k)
    return values


def diversity(measured: Measured) -> Values:
    """Mean cosine distance between the features of two images of one prompt; prompts with one image are left out."""
    return within_prompts("diversity", "features", measured)


def map_diversity(measured: Measured) -> Values:
    """As `diversity`, of feature maps: position by position, as in LPIPS, without its learned weights."""
    return within_prompts("map_diversity", "maps", measured) if "maps" in measured.features.names() else {}


def within_prompts(name: str, output: str, measured: Measured) -> Values:
    """Mean cosine distance between the outputs of two images of one prompt.

    Over at most `max_features` / 2 prompts, evenly spaced.
    """
    counts = Counter(measured.captions)
    several = [caption for caption, count in counts.items() if count > 1]
    kept = evenly_spaced(len(several), max(measured.settings.max_features // 2, 1))
    distances: dict[int, float] = {several[i]: 0.0 for i in kept}
    if not distances:
        return {}

    # the sum of the unit outputs of a prompt's images gives the mean cosine of all pairs
    sums: dict[int, Tensor | float] = {}
    left = {caption: counts[caption] for caption in distances}
    captions = iter(measured.captions)
    for block in measured.features.blocks(output):
        for row, caption in zip(F.normalize(block, dim=1), captions, strict=False):
            if caption not in left:
                continue
            sums[caption] = sums.get(caption, 0.0) + row
            left[caption] -= 1
            if left[caption] == 0:
                n = counts[caption]
                distances[caption] = 1 - (sums.pop(caption).square().sum().item() - n) / (n * (n - 1))
    return {
        name: Bootstrap(range(len(distances)), measured.settings.bootstrap).mean(torch.tensor([*distances.values()]))
    }


def scores(measured: Measured) -> Values:
    """The extractor's own scores: means over images."""
    values: Values = {}
    for name in sorted(measured.features.names() - set(OWN)):
        values |= measured.means(name, measured.features.all(name))
    return values


def category_mean(measured: Measured) -> Values:
    """The extractor's own scores, as NAME/category_mean: the mean of their means over the categories of prompts."""
    values: Values = {}
    for name in sorted(measured.features.names() - set(OWN)):
        scores = measured.features.all(name)
        means = [
            measured.bootstrap_of(indices).mean(scores[indices].cpu()) for indices in measured.by_category.values()
        ]
        if means:
            values[f"{name}/{CATEGORY_MEAN}"] = statistics.mean_of(means)
    return values


def deviations(measured: Measured) -> Values:
    """Standard deviations over images of the extractor's own scores, as NAME_std."""
    names = sorted(measured.features.names() - set(OWN))
    return {f"{name}_std": measured.bootstrap.deviation(measured.features.all(name).cpu()) for name in names}


@dataclass(frozen=True)
class Metric:
    """How a metric is computed and what it needs."""

    compute: Callable[[Measured], Values]
    needs_texts: bool = False
    of_scores: bool = False  # computed from the extractor's own scores
    on_request: bool = False  # not among those that are computed without `evaluation.metrics`


METRICS = {
    "fd": Metric(fd),
    "fd_of_means": Metric(fd_of_means, on_request=True),
    "extent": Metric(extent, on_request=True),
    "kid": Metric(kid),
    "cmmd": Metric(cmmd),
    **{name: Metric(neighbour_metric(name)) for name in BY_NEIGHBOURS},
    "clip_score": Metric(clip_score, needs_texts=True),
    "retrieval": Metric(retrieval, needs_texts=True),
    "diversity": Metric(diversity),
    "map_diversity": Metric(map_diversity, on_request=True),
    "scores": Metric(scores, of_scores=True),
    CATEGORY_MEAN: Metric(category_mean, of_scores=True, on_request=True),
    "deviations": Metric(deviations, of_scores=True, on_request=True),
}


def compute(names: Sequence[str], measured: Measured) -> Values:
    """The metrics of these names that the extractor and the reference allow."""
    values: Values = {}
    for name in names:
        if is_possible(name, measured.reference is not None, measured.texts is not None):
            values |= METRICS[name].compute(measured)
    return values


def is_possible(name: str, has_reference: bool, has_texts: bool) -> bool:
    """Whether a metric can be computed with or without a reference and features of captions."""
    return (has_reference or name not in WITH_REFERENCE) and (has_texts or not METRICS[name].needs_texts)


def value_names(
    names: Sequence[str], outputs: Iterable[str], categories: Iterable[str], settings: MetricSettings
) -> list[str]:
    """The names of the values of these metrics.

    Args:
        outputs: names of what the extractor returns.
        categories: those of the prompts.
    """
    own_scores, categories = sorted(set(outputs) - set(OWN)), list(categories)
    several = {
        CATEGORY_MEAN: [f"{score}/{CATEGORY_MEAN}" for score in own_scores] if categories else [],
        "retrieval": [f"retrieval@{k}" for k in settings.retrieval_k],
        "scores": own_scores,
        "deviations": [f"{score}_std" for score in own_scores],
    }
    values = []
    for name in names:
        for value in several.get(name, [name]):
            values.append(value)
            if name in BY_CATEGORY:
                values += [f"{value}/{category}" for category in categories]
    return values
