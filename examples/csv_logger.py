"""A logger: metrics as a CSV file with a line per metric, for spreadsheets and R."""

import csv
from pathlib import Path
from typing import Any


class CsvLogger:
    def __init__(self, prefix: str = "train/"):
        """
        Args:
            prefix: of the metrics that are written; an empty text writes all.
        """
        self.prefix = prefix

    def open(self, folder: Path, start: int, record: dict[str, Any]) -> None:
        """Keep the lines of steps up to `start`: later ones are logged again."""
        self.path = folder / "metrics.csv"
        rows = list(csv.reader(self.path.open(newline=""))) if self.path.exists() else []
        with self.path.open("w", newline="") as file:
            csv.writer(file).writerows(row for row in rows if int(row[0]) <= start)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerows((step, *item) for item in values.items() if item[0].startswith(self.prefix))

    def image(self, step: int, name: str, path: Path) -> None:
        """Nothing to write: the image is a file of the run already."""

    def close(self) -> None: ...
