"""What a run measures about its learning: means, means by (t, s) cell, and how far EMA and live weights are apart.

Nothing here changes a number of the training; the device is asked only when a line of the log is due.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from selfe import dist, pictures
from selfe.device import to_device
from selfe.types import Batch, Loss

BINS = 8  # cells per axis: t from left to right, s from bottom to top


@dataclass
class Measured:
    """Rows that were measured, by metric, each with the (t, s) that it was measured at."""

    values: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    times: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))  # (2, rows)
    samples: list[tuple[Batch, Tensor]] = field(default_factory=list)  # with (3, B): loss, t, s

    def add(self, loss: Loss, batch: Batch) -> None:
        times = torch.stack([loss.t, loss.s])
        judged = times.index_select(1, to_device(torch.tensor(loss.judged, dtype=torch.int64), times.device))
        per_sample = loss.per_sample.detach()
        for name, rows in ({"loss": per_sample} | loss.metrics).items():
            self.values[name].append(rows)
            self.times[name].append(times if len(rows) == len(loss.t) else judged)
        self.samples.append((batch, torch.cat([per_sample[None], times])))

    def extend(self, other: Measured) -> None:
        """Adds the numbers of a step, without its samples."""
        for name in other.values:
            self.values[name] += other.values[name]
            self.times[name] += other.times[name]

    def means(self, device: torch.device, prefix: str = "") -> dict[str, float]:
        """Over all ranks; empty if nothing was measured."""
        means = dist.mean_over_ranks(self.values, device) if self.values else {}
        return {prefix + name: value for name, value in means.items()}

    def cells(self, device: torch.device) -> dict[str, Tensor]:
        """metric -> (2, BINS x BINS) on the host: sums and counts over all ranks; the same names on every rank."""
        found = {}
        for name in sorted(self.values):
            column, row = (torch.cat(self.times[name], 1) * BINS).long().clamp(0, BINS - 1)
            values = torch.cat(self.values[name]).double()
            sums = torch.zeros(2, BINS * BINS, dtype=torch.float64, device=device)
            found[name] = sums.index_add_(1, column * BINS + row, torch.stack([values, torch.ones_like(values)]))
        if not found:
            return {}
        everyone = dist.sum_over_ranks(torch.stack(list(found.values())))
        return dict(zip(found, everyone.cpu(), strict=True))

    def describe(self) -> list[list[dict]]:
        """This rank's samples, a list per micro-batch: place in the step's batch, file, prompt, loss, t and s."""
        return [
            [
                {"position": position, "name": name, "prompt": prompt, "loss": loss, "t": t, "s": s}
                for position, name, prompt, (loss, t, s) in zip(
                    batch.positions, batch.names, batch.prompts, numbers.T.tolist(), strict=True
                )
            ]
            for batch, numbers in self.samples
        ]


class Cells:
    """Sums by (t, s) cell since they were last taken, the same on every rank."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}

    def add(self, cells: dict[str, Tensor]) -> None:
        for name, sums in cells.items():
            self.sums[name] = self.sums.get(name, 0) + sums

    def take(self) -> dict[str, Tensor]:
        """metric -> (BINS, BINS) means [t, s], NaN where no sample fell; and start anew."""
        sums, self.sums = self.sums, {}
        return {name: (total / counts).view(BINS, BINS) for name, (total, counts) in sums.items()}


def write_cells(folder: Path, step: int, means: dict[str, Tensor]) -> Path:
    """A line of `cells.jsonl`, {step, metric: BINS lists by t of values by s}, and a sheet of heat-maps: its path."""
    tables = {
        name: [[None if value != value else float(f"{value:.4g}") for value in row] for row in table.tolist()]
        for name, table in means.items()
    }
    with (folder / "cells.jsonl").open("a") as file:
        file.write(json.dumps({"step": step} | tables) + "\n")
    return pictures.save_sheet(pictures.heat_maps(means), folder / "cells", step + 1)


@torch.no_grad()
def ema_distance(ema: nn.Module, net: nn.Module, device: torch.device) -> float:
    """|| ema - net || / || net || over all parameters and ranks."""
    pairs = [(dist.local(a), dist.local(b)) for a, b in zip(ema.parameters(), net.parameters(), strict=True)]
    apart = torch.stack([(a - b).square().sum() for a, b in pairs]).sum()
    length = torch.stack([b.square().sum() for _, b in pairs]).sum()
    sums = dist.sum_over_ranks(torch.stack([apart, length]).double().to(device))
    return (sums[0] / sums[1]).sqrt().item()
