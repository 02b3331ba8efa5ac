"""The miniature's plots and its page, filled in from what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from miniature.cells import MILD, RATIOS, STEPS, SWEEP, own_ratio
from models import Cell
from tables import number, pyplot, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELS = {
    "flow_matching": "flow matching",
    "selfe": "Self-E",
    "selfe_floor": "Self-E, floor",
    "floor_late": "Self-E late, floor",
}
FORMS = tuple(LABELS)[1:]  # of Self-E
COLOURS = {"flow_matching": "#777777", "selfe": "#1f77b4", "selfe_floor": "#d62728", "floor_late": "#2ca02c"}
ABLATIONS = {
    "short_flow_matching": "flow matching",
    "short_selfe": "Self-E (the paper's form)",
    "short_floor": "Self-E with the floor",
    "no_self_evaluation": "floor, score difference set to 0 (negative control)",
    "wrong_sign": "floor, sign of the classifier score reversed (negative control)",
    "selfe_late": "Self-E late, after flow matching",
    "floor_aux": "floor, auxiliary term late (weights 1, 0.3; loss weight 0.1)",
    "aux_late": "Self-E, auxiliary term late (weights 0.9, 0.1)",
    "aux_from_start": "Self-E, auxiliary term from the start",
    "no_normalisation": "Self-E without target normalisation",
    "lambda_1": "Self-E, lambda at most 1",
}
ABLATION_MEASURES = (  # steps, guidance, measure, digits
    (2, 1.0, "fd", 0),
    (4, 1.0, "fd", 0),
    (4, 1.0, "extent", 2),
    (4, 2.0, "fd", 0),
    (4, 2.0, "held_out", 2),
    (1, 1.0, "place", 2),
    (1, 1.0, "gamut", 3),
    (4, 1.0, "log_norm", 2),
)
CONTRAST = {
    "contrast_flow_matching": "flow matching",
    "contrast_selfe": "Self-E (the paper's form)",
    "contrast_floor": "Self-E with the floor",
}


class Study:
    """The rows of results.json by model and sampling setting."""

    def __init__(self, results: dict[str, Any]):
        self.rows = {(row["model"], row["cell"]): row for row in results["rows"]}

    def row(self, config: str, steps: int, guidance: float, eta: float = 0, ratio: float | None = None) -> dict | None:
        """All measures of a sampling setting; without a ratio, the config's own rule for the secondary time."""
        cell = Cell(steps, guidance, eta, own_ratio(config, steps) if ratio is None else ratio)
        return self.rows.get((config, cell.name))

    def best(self, config: str, steps: int) -> dict | None:
        """The row of the guidance that scores best."""
        rows = [row for w in SWEEP if (row := self.row(config, steps, w))]
        rows = [row for row in rows if row["seeds"] == max(r["seeds"] for r in rows)]
        return max(rows, key=lambda row: row["ok"], default=None)

    def seeds(self, config: str) -> int:
        """The number of seeds of a model."""
        return max((row["seeds"] for row in self.rows.values() if row["model"] == config), default=0)


# ---- tables ----


def main_table(study: Study) -> str:
    """ok at guidance 1 and 2, all models, with intervals."""
    lines = []
    for steps in STEPS:
        cells = [str(steps)]
        for guidance in (1.0, 2.0):
            for config in LABELS:
                row = study.row(config, steps, guidance)
                cells.append(f"{row['ok']:.2f} ({row['ok_low']:.2f}-{row['ok_high']:.2f})" if row else "-")
        lines.append(cells)
    return table(["N", *(f"{label}, guidance {w}" for w in (1, 2) for label in LABELS.values())], lines)


def readme_table(study: Study) -> str:
    """The small table: ok at the best guidance of each."""
    lines = []
    for steps in STEPS:
        rows = [study.best(config, steps) for config in LABELS]
        plain = [study.row(config, steps, 1.0) for config in LABELS]
        lines.append([str(steps), *(number(r and r["ok"]) for r in plain), *(number(r and r["ok"]) for r in rows)])
    head = ["steps", *LABELS.values(), *(f"{label}, best guidance" for label in LABELS.values())]
    return table(head, lines)


def measure_table(study: Study, guidance: float) -> str:
    """Everything else that was measured, at one guidance."""
    lines = []
    for steps in STEPS:
        for config, label in LABELS.items():
            if row := study.row(config, steps, guidance):
                names = ("shape", "foreground", "background", "held_out", "fd", "extent", "place", "spread", "gamut")
                digits = (2, 2, 2, 2, 0, 2, 2, 3, 3)
                lines.append([str(steps), label, *(number(row[n], d) for n, d in zip(names, digits, strict=True))])
    head = ["N", "model", "shape", "foreground", "background", "held-out ok", "FD", "extent", "place", "colour spread"]
    return table([*head, "gamut"], lines)


def ablation_table(study: Study, labels: dict[str, str]) -> str:
    lines = []
    for config, label in labels.items():
        if not study.seeds(config):
            continue

        cells = [label]
        for guidance in (1.0, 2.0):
            for steps in STEPS[:-1]:
                row = study.row(config, steps, guidance)
                cells.append(number(row and row["ok"]))

        for steps, guidance, name, digits in ABLATION_MEASURES:
            row = study.row(config, steps, guidance)
            cells.append(number(row and row[name], digits))
        lines.append(cells)

    head = ["", *(f"N={n}, w={w}" for w in (1, 2) for n in STEPS[:-1]), "FD N=2, w=1", "FD N=4, w=1"]
    head += ["extent N=4, w=1", "FD N=4, w=2", "held-out ok N=4, w=2", "place N=1, w=1", "gamut N=1, w=1"]
    return table([*head, "log norm N=4, w=1"], lines)


def equal_compute_table(study: Study, seconds: dict[str, float]) -> str:
    """Flow matching with as many CPU-seconds as Self-E beside Self-E, seed 1 of each."""
    lines = []
    for config in ("flow_matching", "flow_matching_long", *FORMS):
        if not study.seeds(config):
            continue
        label = LABELS.get(config, "flow matching, longer")
        cells = [label, number(seconds.get(config), 0)]
        for guidance in (1.0, 2.0):
            for steps in STEPS:
                row = study.row(config, steps, guidance)
                cells.append(number(row and row["ok_seeds"][0]))
        lines.append(cells)
    return table(["model", "CPU-s", *(f"N={n}, w={w}" for w in (1, 2) for n in STEPS)], lines)


def s_table(study: Study) -> str:
    """ok / FD at guidance 1 by the s ratio, at few steps (seed 1)."""
    lines = []
    for config in FORMS:
        for steps in (1, 2, 4):
            rows = [study.row(config, steps, 1.0, 0, r) for r in RATIOS]
            cells = [f"{r['ok_seeds'][0]:.2f} / {r['fd_seeds'][0]:.0f}" if r else "-" for r in rows]
            lines.append([LABELS[config], str(steps), *cells])
    return table(["model", "N", *(f"r = {r:g}" for r in RATIOS)], lines)


def mild_table(study: Study) -> str:
    """ok and FD at the milder s ratios, all seeds."""
    lines = []
    for steps, ratios in MILD.items():
        for config, r in (("flow_matching", 1.0), *((config, r) for r in ratios for config in FORMS)):
            rows = [study.row(config, steps, w, 0, r) for w in (1.0, 2.0, 3.0)]
            cells = [number(row and row[name], digits) for row in rows for name, digits in (("ok", 2), ("fd", 0))]
            lines.append([str(steps), f"{r:g}", LABELS[config], *cells])
    return table(["N", "r", "model", *(f"{name}, w={w}" for w in (1, 2, 3) for name in ("ok", "FD"))], lines)


def eta_table(study: Study) -> str:
    lines = []
    for config, label in LABELS.items():
        for eta in (0, 1):
            rows = [study.row(config, n, w, eta) for w in (1.0, 2.0) for n in STEPS[1:]]
            lines.append([label, str(eta), *(number(r and r["ok_seeds"][0]) for r in rows)])
    return table(["model", "eta", *(f"N={n}, w={w}" for w in (1, 2) for n in STEPS[1:])], lines)


def trade_table(study: Study) -> str:
    """ok / FD by guidance, seed 1 of each."""
    lines = []
    for config, label in LABELS.items():
        for steps in (2, 4, 8):
            cells = [label, str(steps)]
            for w in SWEEP:
                row = study.row(config, steps, w)
                cells.append(f"{row['ok_seeds'][0]:.2f} / {row['fd_seeds'][0]:.0f}" if row else "-")
            lines.append(cells)
    return table(["model", "N", *(f"w = {w:g}" for w in SWEEP)], lines)


def cost_table(seconds: dict[str, float], labels: dict[str, str]) -> str:
    """CPU-seconds by model; empty if none was trained."""
    lines = [[label, f"{seconds[config]:.0f}"] for config, label in labels.items() if seconds.get(config)]
    return table(["model", "CPU-seconds of one training run, one thread"], lines) if lines else ""


def claim_table(claims: list[dict]) -> str:
    lines = [[c["name"], number(c["value"], 3), c["bound"], "yes" if c["pass"] else "**no**"] for c in claims]
    return table(["claim", "value", "bound", "holds"], lines)


# ---- plots ----


def plots(results: dict[str, Any], target: Path) -> None:
    """One sheet: ok and FD over steps, ok against FD, the rule for s, and the two terms over (t, s)."""
    plt, study = pyplot(), Study(results)
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.4), layout="constrained")

    # above: over steps, and by guidance
    for config, label in LABELS.items():
        if study.seeds(config):
            curves(study, config, label, axes)
    titles = ("guidance 1", "guidance 1", "N = 4, by guidance")
    for axis, title, y in zip(axes[0], titles, ("ok", "FD", "FD"), strict=True):
        axis.set(title=title, ylabel=y)
    for axis in axes[0, :2]:
        axis.set(xscale="log", xlabel="steps", xticks=STEPS, xticklabels=STEPS)
        axis.minorticks_off()
    axes[0, 1].set_yscale("log")
    axes[0, 2].set(xlabel="ok")
    axes[0, 0].legend(fontsize=8)

    # below: the rule for s, first seed, and the two terms of Self-E
    for config in FORMS:
        rows = [(r, study.row(config, 1, 1.0, 0, r)) for r in RATIOS]
        points = [(r, row["ok_seeds"][0]) for r, row in rows if row]
        if points:
            axes[1, 0].plot(*zip(*points, strict=True), "o-", color=COLOURS[config], label=LABELS[config])
    axes[1, 0].set(title="one step, by secondary time s", xlabel="s", ylabel="ok")
    if results.get("terms"):
        heat(results["terms"], axes[1, 1:], figure)

    figure.savefig(target / "miniature_plots.png", dpi=80)
    plt.close(figure)


def curves(study: Study, config: str, label: str, axes: np.ndarray) -> None:
    rows = [row for n in STEPS if (row := study.row(config, n, 1.0))]
    steps, colour = [row["steps"] for row in rows], COLOURS[config]
    axes[0, 0].plot(steps, [row["ok"] for row in rows], "o-", color=colour, label=label)
    axes[0, 0].fill_between(steps, *([row[k] for row in rows] for k in ("ok_low", "ok_high")), color=colour, alpha=0.2)
    axes[0, 1].plot(steps, [row["fd"] for row in rows], "o-", color=colour)
    trade = [row for w in SWEEP if (row := study.row(config, 4, w))]
    axes[0, 2].plot([r["ok_seeds"][0] for r in trade], [r["fd_seeds"][0] for r in trade], "o-", color=colour)
    for row in trade:
        axes[0, 2].annotate(f"{row['guidance']:g}", (row["ok_seeds"][0], row["fd_seeds"][0]), fontsize=7)


def heat(terms: dict[str, list], axes: np.ndarray, figure: Figure) -> None:
    """The sizes of the data term and the self-evaluation term over (t, s), of the paper's form."""
    titles = {"data": "data term", "self_evaluation": "self-evaluation term"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        values = np.array(terms[name], dtype=float)
        image = axis.imshow(np.log10(values).T, origin="lower", extent=(0, 1, 0, 1))
        axis.set(title=f"log10 of the {title}, velocity units", xlabel="t", ylabel="s")
        figure.colorbar(image, ax=axis)


# ---- the page ----


FIRST_LOOK = "\n\nThese results are preliminary: the main models were run with fewer than three seeds."
NOT_RUN = "(Not run for this page.)"
PAGE = (Path(__file__).parent / "page.md").read_text()


def page(results: dict[str, Any]) -> str:
    """docs/miniature.md."""
    study, claims, real, seconds = Study(results), results["claims"], results["real"], results["cpu_seconds"]

    # how the results were made
    facts = {
        **results["setting"],
        "machine": results["machine"],
        "command": results["command"],
        "count": results["images_per_cell"],
        "seeds": "; ".join(f"{label}: {study.seeds(config)}" for config, label in LABELS.items()),
        "missing": "" if all(study.seeds(config) > 2 for config in LABELS) else FIRST_LOOK,
        "ablation_note": "" if study.seeds("short_selfe") else NOT_RUN,
    }

    # real images, for comparison
    facts |= {f"real_{name}": real[""][name] for name in ("ok", "fd", "place", "spread")}
    facts["contrast_norm"] = number(real.get("contrast", {}).get("log_norm"))

    # tables
    facts |= {
        "passed": sum(claim["pass"] for claim in claims),
        "total": len(claims),
        "claims": claim_table(claims),
        "cost": cost_table(seconds, LABELS),
        "contrast_cost": cost_table(seconds, CONTRAST) or NOT_RUN,
        "main": main_table(study),
        "measures_1": measure_table(study, 1.0),
        "measures_2": measure_table(study, 2.0),
        "ablations": ablation_table(study, ABLATIONS),
        "contrast": ablation_table(study, CONTRAST),
        "compute": equal_compute_table(study, seconds),
        "s": s_table(study),
        "mild": mild_table(study),
        "eta": eta_table(study),
        "trade": trade_table(study),
    }
    return PAGE.format(**facts)
