"""Training metrics: means, means by (t, s) cell, and the distance between EMA and live weights.

Metrics do not affect training. Values stay on the device and are only read when a step is logged.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from selfe.device import to_device
from selfe.distributed import collectives, fsdp
from selfe.io import image_encode
from selfe.types import Batch, Loss

BINS = 8  # cells per axis: t from left to right, s from bottom to top


@dataclass
class MetricAccumulator:
    """Per-sample values of each metric, with the (t, s) of each sample."""

    values: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    times: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))  # (2, rows)
    samples: list[tuple[Batch, Tensor]] = field(default_factory=list)  # without images; with (3, B): loss, t, s

    def add(self, loss: Loss, batch: Batch) -> None:
        """Add the loss and metrics of a micro-batch."""
        times = torch.stack([loss.t, loss.s])
        eval_rows = times.index_select(1, to_device(torch.tensor(loss.eval_rows, dtype=torch.int64), times.device))
        per_sample = loss.per_sample.detach()

        # a metric has a value per sample, or per self-evaluated row
        for name, rows in ({"loss": per_sample} | loss.metrics).items():
            self.values[name].append(rows)
            self.times[name].append(times if len(rows) == len(loss.t) else eval_rows)
        # images would stay on the device until the end of the step
        self.samples.append((replace(batch, images=(), text=None, flat=None), torch.cat([per_sample[None], times])))

    def add_values(self, values: dict[str, Tensor]) -> None:
        """Add values per sample that have no place in the grid of (t, s)."""
        for name, rows in values.items():
            self.values[name].append(rows.detach())

    def extend(self, other: MetricAccumulator) -> None:
        """Add the values of a step, without its samples."""
        for name in other.values:
            self.values[name] += other.values[name]
            self.times[name] += other.times[name]

    def means(self, device: torch.device, prefix: str = "") -> dict[str, float]:
        """Mean of each metric over all ranks; empty if nothing was added."""
        means = collectives.mean_over_ranks(self.values, device) if self.values else {}
        return {prefix + name: value for name, value in means.items()}

    def cells(self, device: torch.device) -> dict[str, Tensor]:
        """metric -> (2, BINS x BINS) on the host: sums and counts over all ranks. Every rank needs the same metrics."""
        # sums and counts of this rank, by cell
        totals = {}
        for name in sorted(self.values):
            column, row = (torch.cat(self.times[name], 1) * BINS).long().clamp(0, BINS - 1)
            values = torch.cat(self.values[name]).double()
            sums = torch.zeros(2, BINS * BINS, dtype=torch.float64, device=device)
            totals[name] = sums.index_add_(1, column * BINS + row, torch.stack([values, torch.ones_like(values)]))
        if not totals:
            return {}

        # one all-reduce for all metrics
        everyone = collectives.sum_over_ranks(torch.stack(list(totals.values())))
        return dict(zip(totals, everyone.cpu(), strict=True))

    def describe(self) -> list[list[dict]]:
        """This rank's samples, a list per micro-batch: position in the global batch, file, prompt, loss, t and s."""
        micro_batches = []
        for batch, numbers in self.samples:
            samples = []
            of_samples = zip(batch.positions, batch.names, batch.prompts, numbers.T.tolist(), strict=True)
            for position, name, prompt, (loss, t, s) in of_samples:
                samples.append({"position": position, "name": name, "prompt": prompt, "loss": loss, "t": t, "s": s})
            micro_batches.append(samples)
        return micro_batches


class TimeGrid:
    """Sums and counts by (t, s) cell since the last `take`, equal on every rank."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}

    def add(self, cells: dict[str, Tensor]) -> None:
        """Add the result of `MetricAccumulator.cells`."""
        for name, sums in cells.items():
            self.sums[name] = self.sums.get(name, 0) + sums

    def take(self) -> dict[str, Tensor]:
        """metric -> (BINS, BINS) means [t, s], NaN for cells without samples; then reset."""
        sums, self.sums = self.sums, {}
        return {name: (total / counts).view(BINS, BINS) for name, (total, counts) in sums.items()}


def write_cells(folder: Path, step: int, means: dict[str, Tensor]) -> Path:
    """Append {step, metric: BINS lists by t of values by s} to `cells.jsonl`; save heat maps and return their path.

    `step` is the number of completed steps.
    """

    def rounded(value: float) -> float | None:
        return None if math.isnan(value) else float(f"{value:.4g}")

    tables = {name: [list(map(rounded, row)) for row in table.tolist()] for name, table in means.items()}
    with (folder / "cells.jsonl").open("a") as file:
        file.write(json.dumps({"step": step} | tables) + "\n")

    return image_encode.save_sheet(image_encode.heat_maps(means), folder / "cells", step)


@torch.no_grad()
def ema_distance(ema: nn.Module, net: nn.Module, device: torch.device) -> float:
    """|| ema - net || / || net || over all ranks and all parameters that are trained."""
    pairs = fsdp.trained_pairs(ema, net)
    distance = torch.stack([(average - own).square().sum() for average, own in pairs]).sum()
    length = torch.stack([own.square().sum() for _, own in pairs]).sum()
    squares = collectives.sum_over_ranks(torch.stack([distance, length]).double().to(device))
    return (squares[0] / squares[1]).sqrt().item()
