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


def record_replaced(folder: Path, problems: Sequence[str]) -> None:
    """Append bad samples that were replaced to `quarantine.txt`, a line each. Safe from several processes."""
    if problems:
        # one write in append mode, so that lines of different processes do not interleave
        with (folder / "quarantine.txt").open("a", encoding="utf-8") as file:
            file.write("".join(f"{problem}\n" for problem in problems))


class Progress:
    """A bar on a terminal; otherwise a plain line at most every `seconds`, always including the first and the last."""

    def __init__(self, name: str, total: int, start: int = 0, seconds: float = 10, quiet: bool = False):
        self.name, self.total, self.done, self.quiet = name, total, start, quiet
        self.seconds, self.last_printed, self.terminal = seconds, -float("inf"), sys.stderr.isatty()
        bar = self.terminal and not quiet
        self.bar = tqdm(total=total, initial=start, desc=name, dynamic_ncols=True, disable=not bar)

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count `n` more as done; `note` is shown after the count."""
        self.done += n
        if self.terminal:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(n)
        elif not self.quiet and (self.done >= self.total or time.monotonic() - self.last_printed > self.seconds):
            self.last_printed = time.monotonic()
            print(f"{self.name} {self.done}/{self.total} {note}".rstrip(), flush=True)

    def close(self) -> None:
        self.bar.close()
