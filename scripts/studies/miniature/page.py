"""The miniature's plots and its page, filled in from what was measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from miniature.cells import MILD, RATIOS, STEPS, SWEEP
from tables import number, pyplot, table

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


# ---- tables ----


def main_table(study) -> str:
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


def readme_table(study) -> str:
    """The small table: ok at the best guidance of each."""
    lines = []
    for steps in STEPS:
        rows = [study.best(config, steps) for config in LABELS]
        plain = [study.row(config, steps, 1.0) for config in LABELS]
        lines.append([str(steps), *(number(r and r["ok"]) for r in plain), *(number(r and r["ok"]) for r in rows)])
    head = ["steps", *LABELS.values(), *(f"{label}, best guidance" for label in LABELS.values())]
    return table(head, lines)


def measure_table(study, guidance: float) -> str:
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


def ablation_table(study, labels: dict[str, str]) -> str:
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


def equal_compute_table(study, everything: dict) -> str:
    """Flow matching with as many CPU-seconds as Self-E beside Self-E, seed 1 of each."""
    lines = []
    for config in ("flow_matching", "flow_matching_long", *FORMS):
        if not study.seeds(config):
            continue
        label = LABELS.get(config, "flow matching, longer")
        cells = [label, number(everything["cpu_seconds"].get(config), 0)]
        for guidance in (1.0, 2.0):
            for steps in STEPS:
                row = study.row(config, steps, guidance)
                cells.append(number(row and row["ok_seeds"][0]))
        lines.append(cells)
    return table(["model", "CPU-s", *(f"N={n}, w={w}" for w in (1, 2) for n in STEPS)], lines)


def s_table(study) -> str:
    """ok / FD at guidance 1 by the s ratio, at few steps (seed 1)."""
    lines = []
    for config in FORMS:
        for steps in (1, 2, 4):
            rows = [study.row(config, steps, 1.0, 0, r) for r in RATIOS]
            cells = [f"{r['ok_seeds'][0]:.2f} / {r['fd_seeds'][0]:.0f}" if r else "-" for r in rows]
            lines.append([LABELS[config], str(steps), *cells])
    return table(["model", "N", *(f"r = {r:g}" for r in RATIOS)], lines)


def mild_table(study) -> str:
    """ok and FD at the milder s ratios, all seeds."""
    lines = []
    for steps, ratios in MILD.items():
        for config, r in (("flow_matching", 1.0), *((config, r) for r in ratios for config in FORMS)):
            rows = [study.row(config, steps, w, 0, r) for w in (1.0, 2.0, 3.0)]
            cells = [number(row and row[name], digits) for row in rows for name, digits in (("ok", 2), ("fd", 0))]
            lines.append([str(steps), f"{r:g}", LABELS[config], *cells])
    return table(["N", "r", "model", *(f"{name}, w={w}" for w in (1, 2, 3) for name in ("ok", "FD"))], lines)


def eta_table(study) -> str:
    lines = []
    for config, label in LABELS.items():
        for eta in (0, 1):
            rows = [study.row(config, n, w, eta) for w in (1.0, 2.0) for n in STEPS[1:]]
            lines.append([label, str(eta), *(number(r and r["ok_seeds"][0]) for r in rows)])
    return table(["model", "eta", *(f"N={n}, w={w}" for w in (1, 2) for n in STEPS[1:])], lines)


def trade_table(study) -> str:
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


def cost_table(everything: dict, labels: dict[str, str]) -> str:
    """CPU-seconds by model; empty if none was trained."""
    seconds = everything["cpu_seconds"]
    lines = [[label, f"{seconds[config]:.0f}"] for config, label in labels.items() if seconds.get(config)]
    return table(["model", "CPU-seconds of one training run, one thread"], lines) if lines else ""


def claim_table(claims: list[dict]) -> str:
    lines = [[c["name"], number(c["value"], 3), c["bound"], "yes" if c["pass"] else "**no**"] for c in claims]
    return table(["claim", "value", "bound", "holds"], lines)


# ---- plots ----


def plots(study, everything: dict, target: Path) -> None:
    """One sheet: ok and FD over steps, ok against FD, the rule for s, and the two terms over (t, s)."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.4), layout="constrained")
    for config, label in LABELS.items():
        if study.seeds(config):
            curves(study, config, label, axes)
    for config in FORMS:
        rows = [(r, study.row(config, 1, 1.0, 0, r)) for r in RATIOS]
        rows = [(r, row["ok_seeds"][0]) for r, row in rows if row]
        if rows:
            axes[1, 0].plot(*zip(*rows, strict=True), "o-", color=COLOURS[config], label=LABELS[config])
    axes[1, 0].set(title="one step, by secondary time s", xlabel="s", ylabel="ok")
    for axis, title, y in zip(
        axes[0], ("guidance 1", "guidance 1", "N = 4, by guidance"), ("ok", "FD", "FD"), strict=True
    ):
        axis.set(title=title, ylabel=y)
    for axis in axes[0, :2]:
        axis.set(xscale="log", xlabel="steps", xticks=STEPS, xticklabels=STEPS)
        axis.minorticks_off()
    axes[0, 1].set_yscale("log")
    axes[0, 2].set(xlabel="ok")
    axes[0, 0].legend(fontsize=8)
    heat(study, axes[1, 1], axes[1, 2], figure)
    figure.savefig(target / "miniature_plots.png", dpi=80)
    plt.close(figure)


def curves(study, config: str, label: str, axes: np.ndarray) -> None:
    rows = [row for n in STEPS if (row := study.row(config, n, 1.0))]
    steps, colour = [row["steps"] for row in rows], COLOURS[config]
    axes[0, 0].plot(steps, [row["ok"] for row in rows], "o-", color=colour, label=label)
    axes[0, 0].fill_between(steps, *([row[k] for row in rows] for k in ("ok_low", "ok_high")), color=colour, alpha=0.2)
    axes[0, 1].plot(steps, [row["fd"] for row in rows], "o-", color=colour)
    trade = [row for w in SWEEP if (row := study.row(config, 4, w))]
    axes[0, 2].plot([r["ok_seeds"][0] for r in trade], [r["fd_seeds"][0] for r in trade], "o-", color=colour)
    for row in trade:
        axes[0, 2].annotate(f"{row['guidance']:g}", (row["ok_seeds"][0], row["fd_seeds"][0]), fontsize=7)


def heat(study, left, right, figure) -> None:
    """The sizes of the data term and the self-evaluation term over (t, s), of the paper's form."""
    path = study.out / "selfe_1" / "terms.npz"
    if not path.exists():
        return
    terms = np.load(path)
    for axis, name, title in ((left, "data", "data term"), (right, "self_evaluation", "self-evaluation term")):
        image = axis.imshow(np.log10(terms[name]).T, origin="lower", extent=(0, 1, 0, 1))
        axis.set(title=f"log10 of the {title}, velocity units", xlabel="t", ylabel="s")
        figure.colorbar(image, ax=axis)


# ---- the page ----


FIRST_LOOK = "\n\nThese results are preliminary: the main models were run with fewer than three seeds."
NOT_RUN = "(Not run for this page.)"
PAGE = (Path(__file__).parent / "page.md").read_text()


def page(study, everything: dict) -> str:
    """docs/miniature.md."""
    claims, real = everything["claims"], everything["real"]

    # how the results were made
    facts = {
        **everything["setting"],
        "machine": everything["machine"],
        "command": everything["command"],
        "count": everything["images_per_cell"],
        "seeds": "; ".join(f"{label}: {len(study.seeds(config))}" for config, label in LABELS.items()),
        "missing": "" if all(len(study.seeds(config)) > 2 for config in LABELS) else FIRST_LOOK,
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
        "cost": cost_table(everything, LABELS),
        "contrast_cost": cost_table(everything, CONTRAST) or NOT_RUN,
        "main": main_table(study),
        "measures_1": measure_table(study, 1.0),
        "measures_2": measure_table(study, 2.0),
        "ablations": ablation_table(study, ABLATIONS),
        "contrast": ablation_table(study, CONTRAST),
        "compute": equal_compute_table(study, everything),
        "s": s_table(study),
        "mild": mild_table(study),
        "eta": eta_table(study),
        "trade": trade_table(study),
    }
    return PAGE.format(**facts)
