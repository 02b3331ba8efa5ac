"""Which rows of a micro-batch have s < t: a fixed share, the same for every split of a batch over ranks."""

from __future__ import annotations

from fractions import Fraction
from math import floor


def share_of_pairs(p_equal: float) -> Fraction:
    """The share 1 - p_equal of rows with s < t, as a fraction.

    Every micro-batch that is a multiple of its denominator contains exactly this share.

    Raises:
        ValueError: it is not a fraction with a small denominator.
    """
    share = Fraction(1 - p_equal).limit_denominator(64)
    if abs(share - (1 - p_equal)) > 1e-3 or (share == 0) != (p_equal == 1):
        raise ValueError(f"p_equal must be a fraction with a denominator of at most 64, such as 0.5, got {p_equal}")
    return share


def spread_rows(share: Fraction, batch_size: int) -> list[int]:
    """Indices of `share` of the rows, evenly spaced over the batch.

    Deterministic rather than random, so that every rank makes the same network calls.
    """
    return [i for i in range(batch_size) if floor((i + 1) * share) > floor(i * share)]
