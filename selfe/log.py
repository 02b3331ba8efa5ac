"""Console output: a progress bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm


def print_line(message: str) -> None:
    """One line on stdout, above a progress bar if there is one."""
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 5 h 10 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def count(number: int, one: str, many: str) -> str:
    """1 process, 2 processes."""
    return f"{number:,} {one if number == 1 else many}"


def record_replaced(folder: Path, problems: Sequence[str]) -> None:
    """Append bad samples that were replaced to `quarantine.txt`, a line each. Safe from several processes."""
    if problems:
        # one write in append mode, so that lines of different processes do not interleave
        with (folder / "quarantine.txt").open("a", encoding="utf-8") as file:
            file.write("".join(f"{problem}\n" for problem in problems))


class Progress:
    """A bar on a terminal; otherwise a plain line at most every `seconds`, always including the first and the last.

    With `unit`, lines also show the time per unit and the remaining time, as the bar does.
    """

    def __init__(self, name: str, total: int, start: int = 0, seconds: float = 10, quiet: bool = False, unit: str = ""):
        self.name, self.total, self.done, self.quiet, self.unit = name, total, start, quiet, unit
        self.note = ""
        self.paced_from, self.is_warm = (start, time.monotonic()), False  # count and time
        self.seconds, self.last_printed, self.terminal = seconds, -float("inf"), sys.stderr.isatty()
        bar = self.terminal and not quiet
        self.bar = tqdm(total=total, initial=start, desc=name, unit=unit or "it", dynamic_ncols=True, disable=not bar)

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count `n` more as done; `note` is shown after the count, until there is another."""
        self.done += n
        self.note = note or self.note
        if self.terminal:
            self.bar.set_postfix_str(self.note, refresh=False)
            self.bar.update(n)
        elif not self.quiet and (self.done >= self.total or time.monotonic() - self.last_printed > self.seconds):
            self.last_printed = time.monotonic()
            print(f"{self.name} {self.done}/{self.total} {self.note}{self.pace()}".rstrip(), flush=True)

        # the first step compiles and fills caches, so the pace is that of the later ones
        if not self.is_warm:
            self.paced_from, self.is_warm = (self.done, time.monotonic()), True

    def pace(self) -> str:
        """Time per unit and remaining time."""
        if not self.unit:
            return ""
        done, begun = self.paced_from
        seconds = (time.monotonic() - begun) / max(self.done - done, 1)
        left = self.total - self.done
        return f", {seconds:.3g} s/{self.unit}" + (f", {duration(seconds * left)} left" if left > 0 else "")

    def close(self) -> None:
        self.bar.close()
