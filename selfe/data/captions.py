"""Several captions of an image: how files hold them, and which of them a sample uses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from selfe.errors import BadSample
from selfe.types import MOST_STEPS, check_range

LIST, WEIGHTS = "captions", "caption_weights"  # columns or keys: a list of texts, a number for each
MOST_WEIGHT = 10**6
MOST_CAPTIONS = 1000  # of an image
SPACES = re.compile("[\t\n\x0b\x0c\r\x85\u2028\u2029]+")  # cannot be in a line of TSV; become one space


@dataclass(frozen=True)
class CaptionPhase:
    """Weights of the captions of every training image from `step` on."""

    step: int  # first step of the phase
    weights: tuple[float, ...]  # by position in the list of captions; []: as the file states, or the first caption

    def __post_init__(self):
        check_range("step", self.step, 0, MOST_STEPS)
        check_range("weights", self.weights, 0, MOST_WEIGHT)
        if self.weights and not any(self.weights):
            raise ValueError(f"weights: at least one must be above 0, got {list(self.weights)}")


class Captions(NamedTuple):
    """The captions of an image. At least one is not empty."""

    texts: tuple[str, ...]  # by position; empty where the image has none
    weights: tuple[float, ...] = ()  # that the file states, one for each text; () if it states none

    @property
    def first(self) -> str:
        return self.texts[0] or next(text for text in self.texts if text)

    @property
    def mean_bytes(self) -> int:
        """Bytes of a caption, rounded down."""
        lengths = [len(text.encode()) for text in self.texts if text]
        return sum(lengths) // len(lengths)

    def shares(self, weights: Sequence[float] = ()) -> tuple[float, ...]:
        """The probability of each text, for weights by position.

        Weights of positions that the image does not have are ignored. Without weights, those of the file count. Without
        those, or if no caption has a weight above 0, the first caption is certain.
        """
        weights = weights or self.weights
        used = [weight if text else 0.0 for text, weight in zip(self.texts, weights, strict=False)]
        used += [0.0] * (len(self.texts) - len(used))
        total = sum(used)
        if not total:
            first = self.texts.index(self.first)
            return tuple(float(position == first) for position in range(len(self.texts)))
        return tuple(weight / total for weight in used)

    def choose(self, weights: Sequence[float], uniform: float) -> str:
        """The text that a number in [0, 1) selects, for weights by position as in `shares`."""
        shares, end = self.shares(weights), 0.0
        for text, share in zip(self.texts, shares, strict=True):
            end += share
            if uniform < end:
                return text
        return [text for text, share in zip(self.texts, shares, strict=True) if share][-1]  # rounding errors of `end`


def read(caption: Any, texts: Any, weights: Any, clean: Callable[[Any], str]) -> Captions:
    """The captions of a record.

    Args:
        caption: a text or a list of texts.
        texts: a list of further texts. `caption` comes first, and is moved there if it is one of them.
        weights: a list of numbers, one for each text.
        clean: makes a text of a value: `stripped` or `one_line`.

    Raises:
        BadSample: kind `not a text`, `too many captions` or `caption weights`. Empty captions are not checked here.
    """
    if texts is None and isinstance(caption, list):
        caption, texts = None, caption
    if not isinstance(texts, list | None):
        raise BadSample("not a text", f"{LIST} is not a list of texts but {type(texts).__name__} {str(texts)[:60]!r}")

    if texts and len(texts) > MOST_CAPTIONS:
        raise BadSample("too many captions", f"{len(texts)} captions; an image has at most {MOST_CAPTIONS}")

    first, lines = clean(caption), [clean(text) for text in texts or ()]
    numbers = check_weights(weights, len(lines) if texts is not None else 1)
    if first and first in lines:
        place = lines.index(first)
        lines.insert(0, lines.pop(place))
        if numbers:
            numbers.insert(0, numbers.pop(place))
    elif first or not lines:
        if numbers and lines:
            message = f"{WEIGHTS} is for {LIST}, which do not have the caption {first[:60]!r}; add it to them"
            raise BadSample("caption weights", message)
        lines.insert(0, first)

    return Captions(tuple(lines), tuple(numbers)) if numbers else without_weights(lines)


def without_weights(texts: Iterable[str]) -> Captions:
    """The captions in these columns; empty ones at the end are left out."""
    texts = list(texts)
    while len(texts) > 1 and not texts[-1]:
        texts.pop()
    return Captions(tuple(texts))


def stripped(value: Any) -> str:
    """A caption without spaces around it; empty for None. Raises BadSample unless it is a text."""
    if value is not None and not isinstance(value, str):
        raise BadSample("not a text", f"the caption is not a text but {type(value).__name__} {str(value)[:60]!r}")
    return (value or "").strip()


def one_line(value: Any) -> str:
    """As `stripped`, with a space in place of line breaks and tabs."""
    return SPACES.sub(" ", stripped(value))


def check_weights(weights: Any, count: int) -> list[float]:
    """The weights of a record. Raises BadSample unless they are `count` numbers >= 0, not all 0; None is []."""
    if weights is None or weights == []:
        return []
    numbers = isinstance(weights, list) and all(
        isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number <= MOST_WEIGHT
        for number in weights
    )
    if not numbers or len(weights) != count or not any(weights):
        message = f"{WEIGHTS} must be {count} numbers from 0 to {MOST_WEIGHT}, one for each caption and not all 0"
        raise BadSample("caption weights", f"{message}, got {str(weights)[:60]}")
    return [float(number) for number in weights]


def from_json(text: str | None) -> Any:
    """A list that a column of text holds; None if the field is empty. Raises BadSample if it is not JSON."""
    if not (text or "").strip():
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSample("not a text", f'not a list in JSON, such as ["one", "two"]: {text[:60]!r}') from error


def to_record(captions: Captions) -> Mapping[str, Any]:
    """The keys and values that hold these captions in JSON; `read` reads them back."""
    if captions.weights:
        return {LIST: list(captions.texts), WEIGHTS: list(captions.weights)}
    if len(captions.texts) > 1:
        return {LIST: list(captions.texts)}
    return {"caption": captions.first}
