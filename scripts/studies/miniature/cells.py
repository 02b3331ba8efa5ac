"""Sampling settings evaluated for each model of the miniature, and their rules for the secondary time s."""

from __future__ import annotations

from models import Cell

STEPS = (1, 2, 4, 8, 32)
SWEEP = (0.75, 1.0, 1.25, 1.5, 2.0, 3.0)  # guidance scales; below 1 the prompt is weakened
ONE_STEP = 0.75  # r at N = 1 in the paper's form: at s = 0 the evaluator is the identity and gives no training signal
MILD = {2: (0.85,), 4: (0.8, 0.85)}  # by steps: r close to 1 (s = t) reduces the effect of self-evaluation
RATIOS = (0.0, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 1.0)


def own_ratio(config: str, steps: int) -> float:
    """Default r of a model: s = t for flow matching, `ONE_STEP` for the paper's form at N = 1, else s = t_{k+1}."""
    if "flow_matching" in config:
        return 1.0
    return ONE_STEP if steps == 1 and "floor" not in config else 0.0


def cells(config: str, full: bool) -> tuple[Cell, ...]:
    """Sampling settings of a model; `full` adds sweeps over guidance, eta and r."""
    own = {n: own_ratio(config, n) for n in STEPS}

    # every model: steps by guidance
    chosen = [Cell(n, w, 0.0, own[n]) for n in STEPS for w in (1.0, 2.0, 3.0)]
    if "flow_matching" not in config:
        chosen += [Cell(n, w, 0.0, r) for n, ratios in MILD.items() for r in ratios for w in (1.0, 2.0, 3.0)]

    if full:
        chosen += [Cell(n, w, 0.0, own[n]) for n in (2, 4, 8) for w in SWEEP]
        chosen += [Cell(n, w, 1.0, own[n]) for n in (2, 4, 8) for w in (1.0, 2.0)]
    if full and "flow_matching" not in config:
        chosen += [Cell(n, 1.0, 0.0, r) for n in (1, 2, 4) for r in RATIOS]

    return tuple(dict.fromkeys(chosen))
