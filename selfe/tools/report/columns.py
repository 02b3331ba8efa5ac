"""The metrics of a run as columns, reduced to a number of points that a page can draw."""

from __future__ import annotations

import math
from array import array

import numpy as np

from selfe.errors import UserError

# what a point is plotted over; every other number of a line is a metric
AXES = ("step", "samples", "elapsed", "time", "epoch")
SHARES = "time/"  # an activity that is missing from a line took no time


class Columns:
    """Numbers of `metrics.jsonl` by name, with the line that each of them is from."""

    def __init__(self):
        self.num_lines = 0
        self.axes = {name: array("d") for name in AXES}  # an element per line, NaN if unknown
        self.metrics: dict[str, tuple[array, array]] = {}  # indices of lines, values

    def add(self, line: dict, where: str) -> None:
        """Add a line; `where` names it in error messages."""
        for name in AXES:
            self.axes[name].append(number(line.get(name, math.nan), name, where))
        if math.isnan(self.axes["step"][-1]):
            raise UserError(f"{where} has no step; pass the output folder of a training run (trainer.output_dir)")

        for name, value in line.items():
            if name not in AXES:
                lines, values = self.metrics.setdefault(name, (array("q"), array("d")))
                lines.append(self.num_lines)
                values.append(number(value, name, where))
        self.num_lines += 1

    def last(self, name: str) -> float | None:
        """The newest value of an axis or a metric; None without one, or if it is not finite."""
        values = self.axes[name] if name in self.axes else self.metrics.get(name, ((), ()))[1]
        return values[-1] if len(values) and math.isfinite(values[-1]) else None

    def reduced(self, most: int) -> dict:
        """At most `most` points per metric, for the page.

        A point of a metric with more values is the mean of adjacent finite ones, at the line of the last of them.

        Returns `num_lines`; `columns`, name -> a value per kept line, None where it has none, and the texts nan, inf
        and -inf for numbers that JSON does not have; `not_finite`, name -> number of such values in the file.
        """
        points = {name: self.points(name, most) for name in self.metrics}
        kept = np.unique(np.concatenate([np.array([], dtype=np.int64), *(lines for lines, _ in points.values())]))

        # axes, which are known in every line or in none
        columns: dict[str, list] = {}
        for name in AXES:
            values = np.asarray(self.axes[name])[kept]
            if name == "step":
                columns[name] = values.astype(np.int64).tolist()
            elif not np.isnan(values).all():
                columns[name] = [None if math.isnan(value) else value for value in values.tolist()]

        # metrics
        not_finite = {}
        for name, (lines, values) in points.items():
            column: list[float | str | None] = [None] * len(kept)
            for place, value in zip(np.searchsorted(kept, lines).tolist(), values.tolist(), strict=True):
                column[place] = value if math.isfinite(value) else str(value)
            columns[name] = column
            if count := int((~np.isfinite(np.asarray(self.metrics[name][1]))).sum()):
                not_finite[name] = count
        return {"num_lines": self.num_lines, "columns": columns, "not_finite": not_finite}

    def points(self, name: str, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Lines and values of at most `most` points of a metric."""
        lines, values = (np.asarray(column) for column in self.metrics[name])
        if name.startswith(SHARES):
            lines, values = self.with_zeros(lines, values)

        size = math.ceil(len(values) / most)
        if size <= 1:
            return lines, values

        # sums and counts of the finite values of every group; a group without one keeps its last value
        starts = np.arange(0, len(values), size)
        ends = np.append(starts[1:], len(values)) - 1
        finite = np.isfinite(values)
        counts = np.add.reduceat(finite, starts, dtype=np.int64)
        sums = np.add.reduceat(np.where(finite, values, 0.0), starts)
        return lines[ends], np.where(counts > 0, sums / np.maximum(counts, 1), values[ends])

    def with_zeros(self, lines: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A time share with zeros in the lines that have other time shares only."""
        shares = [np.asarray(self.metrics[name][0]) for name in self.metrics if name.startswith(SHARES)]
        every_line = np.unique(np.concatenate(shares))
        filled = np.zeros(len(every_line))
        filled[np.searchsorted(every_line, lines)] = values
        return every_line, filled


def number(value: object, name: str, where: str) -> float:
    """A value of a line as a float. Raises UserError if it is not a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{where}: {name} is not a number; the file is not a metrics.jsonl of this version")
    return float(value)
