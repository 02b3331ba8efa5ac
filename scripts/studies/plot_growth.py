"""Plot docs/growth.png: measured scaling (scripts/bench/run.py grow) and planned scaling over 1 to 1,024 ranks.

    .venv/bin/python scripts/bench/run.py grow > grow.json
    .venv/bin/python scripts/studies/plot_growth.py grow.json [CONFIG] [--out docs/growth.png]

Prints the planned values as a table. Plans run under a fake process group (see `selfe plan`).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from tables import pyplot, table

from selfe import launch
from selfe.distributed.fsdp import GatherConfig
from selfe.log import Progress
from selfe.tools.plan.job import count_words, load, run
from selfe.tools.plan.ranks import share, traffic

RANKS = tuple(2**power for power in range(11))
NODE = 8  # ranks per machine
CAPTION = 77  # T5 tokens per caption
GIB = 2**30
TITLES = {
    "tokens": "tokens per image (8 images)",
    "batch": "images of 144 tokens",
    "width": "width (4 images)",
}


def planned(path: str) -> list[dict]:
    """GiB held and received by a rank in a step of one micro-batch, by world size and shard group size."""
    # the cost of a micro-batch does not depend on the ranks: measure it once
    job = load(path)
    step = run(
        job, job.shapes_at(0), count_words(job.system.text_encoder, CAPTION), 1, job.trainer.activation_checkpointing
    )

    # sharded over all ranks, and (beyond one machine) sharded within a machine and replicated across machines
    cases = [(ranks, ranks) for ranks in RANKS] + [(ranks, NODE) for ranks in RANKS if ranks > NODE]
    progress, rows = Progress("ranks", len(cases)), []
    for ranks, shared_by in cases:
        ours = share(job.system, replace(job.trainer, shard_size=shared_by, gathering=GatherConfig()), ranks)
        states = ours.parameters + ours.gradients + ours.optimizer + ours.ema
        sizes = {"states": states, "unsharded": ours.unsharded, **traffic(ours, step.calls)}
        rows.append({"ranks": ranks, "shared by": shared_by} | {name: size / GIB for name, size in sizes.items()})
        progress.advance()
    progress.close()
    return rows


def draw(measured: dict, rows: list[dict], path: Path) -> None:
    """Save the figure: three columns of measured values, one of planned values."""
    figure, axes = pyplot().subplots(2, 4, figsize=(15, 6.4), layout="constrained")

    # measured: time above, memory below, on logarithmic axes with a proportional line
    for column, (axis, points) in zip(axes.T, measured["figures"].items(), strict=False):
        numbers = [int(number) for number in points]
        for plot, kind in zip(column, ("CPU milliseconds", "peak MB"), strict=True):
            values = [point[kind] for point in points.values()]
            plot.loglog(numbers, values, "o-", label="measured")
            proportional = [values[0] * number / numbers[0] for number in numbers]
            plot.loglog(numbers, proportional, ":", color="gray", label="proportional")
            plot.set(xlabel=TITLES[axis], ylabel=kind, xticks=numbers, xticklabels=numbers)
            plot.minorticks_off()

    # planned: memory above, communication below
    all_share = [row for row in rows if row["shared by"] == row["ranks"]]
    groups = [row for row in rows if row["shared by"] == NODE]
    for chosen, style, label in ((all_share, "o-", "sharded over all"), (groups, "s--", f"sharded over {NODE}")):
        ranks = [row["ranks"] for row in chosen]
        axes[0, 3].plot(ranks, [row["states"] + row["unsharded"] for row in chosen], style, label=label)
        sent = [row["all_gather"] + row["reduce_scatter"] + row["all_reduce"] for row in chosen]
        axes[1, 3].plot(ranks, sent, style, label=label)

    axes[0, 3].set(ylabel="GiB on a rank (planned)", yscale="log")
    axes[1, 3].set(ylabel="GiB received by a rank (planned)")
    for plot in axes[:, 3]:
        plot.set(xlabel="ranks", xscale="log", xticks=RANKS[::2], xticklabels=RANKS[::2])
        plot.minorticks_off()
        plot.legend(fontsize=8)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=80)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, help="JSON output of scripts/bench/run.py grow")
    parser.add_argument("config", nargs="?", default="configs/train/selfe.yaml")
    parser.add_argument("--out", type=Path, default=Path("docs/growth.png"))
    options = parser.parse_args(arguments)
    pyplot()  # planning takes minutes: a missing package is reported first

    rows = planned(options.config)
    draw(json.loads(options.measured.read_text()), rows, options.out)

    lines = [[f"{v:,}" if isinstance(v, int) else f"{v:.2f}" for v in row.values()] for row in rows]
    print(table(list(rows[0]), lines))


if __name__ == "__main__":
    launch.worker(lambda: main(sys.argv[1:]))
