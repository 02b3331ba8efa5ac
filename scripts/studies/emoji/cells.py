"""Sampling settings of the emoji study, and the captions that are sampled."""

from __future__ import annotations

from functools import lru_cache

import torch
from emoji import judge
from emoji.judge import Images
from models import ROOT, Cell
from scoring import Prompts

from selfe.rng import philox

LABELS = {
    "flow_matching": "flow matching",
    "selfe": "Self-E",
    "selfe_floor": "Self-E, floor",
    "floor_late": "Self-E late, floor",
}
STEPS = (1, 2, 4, 8, 32)
SWEEP = (1.5, 2.0, 3.0)  # guidance scales
RATIOS = (0.0, 0.5, 0.75, 1.0)  # of s, at few steps
DATA = ROOT / "runs/emoji"  # the unpacked shards


def own_ratio(config: str) -> float:
    """s = t for flow matching, s = t_{k+1} for Self-E."""
    return 1.0 if config == "flow_matching" else 0.0


def cells(config: str, full: bool) -> tuple[Cell, ...]:
    """Sampling settings of a model; `full` adds sweeps over guidance and r."""
    ratio = own_ratio(config)
    chosen = [Cell(n, 1.0, 0.0, ratio) for n in STEPS]
    if full:
        chosen += [Cell(n, w, 0.0, ratio) for n in STEPS for w in SWEEP if n < 32 or w == 2]
        chosen += [Cell(n, 1.0, 0.0, r) for n in (1, 2, 4) for r in RATIOS if config != "flow_matching"]
    return tuple(dict.fromkeys(chosen))


@lru_cache(maxsize=1)
def asked(count: int) -> dict[str, Images]:
    """Real images whose captions are sampled: all held-out emoji, the others half trained, half held-out pairs."""
    splits = {split: judge.real_images(DATA, split) for split in judge.SPLITS}
    concepts = min(len(splits["held_out_concepts"]), count // 4)
    counts = {"train": (count - concepts + 1) // 2, "held_out_pairs": (count - concepts) // 2}
    counts["held_out_concepts"] = concepts

    chosen = {}
    for split, images in splits.items():
        rows = torch.from_numpy(philox("emoji", split).permutation(len(images))[: counts[split]])
        chosen[split] = images.select(rows)
    return chosen


@lru_cache(maxsize=1)
def prompts(count: int) -> Prompts:
    """Their captions, with the splits as categories."""
    sets = asked(count)
    categories = tuple(split for split, images in sets.items() for _ in range(len(images)))
    return Prompts(judge.joined(sets.values()).captions, categories)
