"""The models of the comparison of objectives, and the sampling settings evaluated for each."""

from __future__ import annotations

from models import Cell

STEPS = (1, 2, 4, 8, 32)
GUIDANCE = (1.0, 1.5, 2.0)
FEW = (1, 2, 4)  # numbers of steps at which rules for s are compared
COST = {
    "smooth_flow_matching": 1.0,
    "smooth_selfe": 1.25,
    "smooth_selfe_floor": 1.25,
    "smooth_floor_late": 1.1,
    "so_flow": 1.08,
    "so_flow_selfe": 1.21,
    "mean_flow": 1.5,
    "alpha_flow": 1.17,
    "transition_model": 1.33,
    "any_flow": 1.33,
    "terminal_velocity": 3.33,
}
"""FLOPs of a step by config, relative to flow matching, by `selfe plan`; of the late floor, the mean over the run."""
LABELS = {
    "smooth_flow_matching": "flow matching",
    "smooth_selfe": "Self-E",
    "smooth_selfe_floor": "Self-E, floor",
    "smooth_floor_late": "Self-E late, floor",
    "so_flow": "SoFlow",
    "so_flow_selfe": "SoFlow, Self-E",
    "mean_flow": "iMF",
    "alpha_flow": "alpha-Flow",
    "transition_model": "TiM",
    "any_flow": "AnyFlow",
    "terminal_velocity": "TVM",
}


FLOW_MATCHING = "smooth_flow_matching"
SELF_E = ("smooth_selfe", "smooth_selfe_floor", "smooth_floor_late")


def ratios(config: str, steps: int) -> tuple[float, ...]:
    """The s ratios that are compared, the default first: s = t_{k+1}, but for the paper's form in one step."""
    if config == FLOW_MATCHING:
        return (1.0,)
    if steps not in FEW:
        return (0.0,)
    if config not in SELF_E:
        return (0.0, 0.25)
    return (0.75, 0.5, 0.0) if (config, steps) == ("smooth_selfe", 1) else (0.0, 0.5, 0.75)


def cells(config: str, full: bool) -> tuple[Cell, ...]:
    """Steps by guidance, and in few steps other rules for s: `full` at every guidance, otherwise at guidance 1."""
    scales = GUIDANCE if full else (1.0, 2.0)
    chosen = [Cell(n, w, 0.0, ratios(config, n)[0]) for n in STEPS for w in (scales if n < 32 or full else (1.0,))]
    others = [Cell(n, w, 0.0, r) for n in FEW for w in (scales if full else (1.0,)) for r in ratios(config, n)]
    return tuple(dict.fromkeys([*chosen, *others]))
