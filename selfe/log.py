"""What a run says: a progress bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


def say(message: str) -> None:
    """One line on stdout, above a progress bar if there is one."""
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()


class Progress:
    """A bar on a terminal; otherwise a plain line every `seconds`, the first and last always."""

    def __init__(self, name: str, total: int, start: int = 0, seconds: float = 10, quiet: bool = False):
        self.name, self.total, self.done, self.quiet = name, total, start, quiet
        self.seconds, self.said, self.terminal = seconds, -float("inf"), sys.stderr.isatty()
        bar = self.terminal and not quiet
        self.bar = tqdm(total=total, initial=start, desc=name, dynamic_ncols=True, disable=not bar)

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        if self.terminal:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(n)
        elif not self.quiet and (self.done >= self.total or time.monotonic() - self.said > self.seconds):
            self.said = time.monotonic()
            print(f"{self.name} {self.done}/{self.total} {note}".rstrip(), flush=True)

    def close(self) -> None:
        self.bar.close()
