"""Measures that the studies share: Frechet distance, bootstrap intervals."""

from __future__ import annotations

import numpy as np

RESAMPLED = 400  # bootstrap samples over seeds and prompts


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance between normal distributions fitted to features (n, d) and (m, d)."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def interval(right: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of (seeds, prompts), both resampled with replacement."""
    source = np.random.default_rng(0)
    seeds, prompts = right.shape
    means = np.empty(RESAMPLED)
    for i in range(RESAMPLED):
        chosen = right[source.integers(seeds, size=seeds)]
        means[i] = np.mean([row[source.integers(prompts, size=prompts)].mean() for row in chosen])
    return tuple(np.percentile(means, [2.5, 97.5]))
