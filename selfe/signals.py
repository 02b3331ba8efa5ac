"""Signals that end a run in good order: SIGTERM and SIGUSR1 (a scheduler's warning) and Ctrl-C."""

from __future__ import annotations

import os
import signal
import time

STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def ignore(worker: int) -> None:
    """For a loader's worker, which a signal to all of a rank's processes reaches too: the step is to be finished."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


class Stopped(Exception):
    """The run was asked to end and has saved its work. Ends the program with exit code 128 + signal."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + number


class Ear:
    """Notes that this process was asked to stop; the step in progress is finished first.

    Ctrl-C twice ends the process at once, as does any of the signals after a Ctrl-C (which is how a launcher passes the
    second one on).
    """

    def __init__(self):
        self.heard = 0  # a signal number
        self.at = 0.0
        self.before = {number: signal.signal(number, self.hear) for number in STOPS}

    def hear(self, number: int, frame: object) -> None:
        again = self.heard and signal.SIGINT in (self.heard, number)
        if again and time.monotonic() - self.at > 0.2:  # not the same key pressed once, sent by shell and launcher both
            os._exit(128 + number)
        if not self.heard:
            self.heard, self.at = number, time.monotonic()

    def close(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
