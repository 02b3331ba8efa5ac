"""The rules of GenEval (arXiv 2310.11513): whether the objects of an image are those that a prompt names.

An image is correct if each class of `include` has at least `count` objects, the most confident of which have the colour
and the position that the prompt names, and no class of `exclude` has `count` objects or more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COUNTING = "counting"  # the task with a threshold of its own
CLEARANCE = 0.1  # share of both sizes by which centres have to be apart


@dataclass(frozen=True)
class Detection:
    """An object that a detector has detected."""

    score: float
    box: tuple[float, float, float, float]  # left, top, right, bottom, in pixels
    mask: Tensor | None = field(default=None, repr=False)  # (H, W), bool; None: the detector has no masks


Objects = Mapping[str, Sequence[Detection]]  # by class, the most confident first


def kept(detections: Objects, threshold: float, most: int, max_overlap: float = 1.0) -> dict[str, list[Detection]]:
    """The detections above a threshold, at most so many of a class, the most confident first.

    Below a `max_overlap` of 1, a detection is left out that overlaps a more confident one of its class by more.
    """
    objects = {}
    for name, ones in detections.items():
        above = sorted((one for one in ones if one.score > threshold), key=lambda one: -one.score)[:most]
        chosen: list[Detection] = []
        for one in above:
            if all(max_overlap == 1 or overlap(one, other) <= max_overlap for other in chosen):
                chosen.append(one)
        if chosen:
            objects[name] = chosen
    return objects


def overlap(one: Detection, other: Detection) -> float:
    """Intersection over union of the boxes."""

    def area(left: float, top: float, right: float, bottom: float) -> float:
        return max(right - left, 0) * max(bottom - top, 0)

    low = [max(one.box[side], other.box[side]) for side in (0, 1)]
    high = [min(one.box[side], other.box[side]) for side in (2, 3)]
    common = area(*low, *high)
    union = area(*one.box) + area(*other.box) - common
    return common / union if union else 0.0


def is_correct(
    prompt: Mapping[str, Any], objects: Objects, colours_of: Callable[[str, Sequence[Detection]], list[str]]
) -> bool:
    """Whether an image shows what a prompt names.

    Args:
        prompt: a line of the prompt set, with `include` and maybe `exclude`.
        objects: see `kept`.
        colours_of: the colours of objects of a class.
    """
    matches: list[Sequence[Detection]] = []
    for wanted in prompt.get("include", ()):
        name, count = wanted["class"], wanted["count"]
        best = objects.get(name, ())[:count]
        if len(best) < count:
            return False
        if "color" in wanted and colours_of(name, best).count(wanted["color"]) < count:
            return False
        if "position" in wanted:
            position, number = wanted["position"]
            if not all(position in positions(one, other) for one in best for other in matches[number]):
                return False
        matches.append(best)
    return all(len(objects.get(each["class"], ())) < each["count"] for each in prompt.get("exclude", ()))


def positions(one: Detection, other: Detection) -> set[str]:
    """Where an object is relative to another one: left of, right of, above, below; none or two of them."""
    offsets, clear = [], []
    for low, high in ((0, 2), (1, 3)):
        offset = (one.box[low] + one.box[high] - other.box[low] - other.box[high]) / 2
        sizes = abs(one.box[high] - one.box[low]) + abs(other.box[high] - other.box[low])
        distance = max(abs(offset) - CLEARANCE * sizes, 0)
        offsets.append(offset)
        clear.append(distance if offset > 0 else -distance)
    if max(map(abs, clear)) < 1e-3:
        return set()

    length = sum(offset**2 for offset in offsets) ** 0.5
    x, y = (distance / length for distance in clear)
    tests = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, is_there in tests.items() if is_there}
