"""Signals that shut a run down cleanly: SIGTERM and SIGUSR1 (sent by schedulers before a kill) and Ctrl-C."""

from __future__ import annotations

import os
import signal
import time

STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def ignore(worker: int) -> None:
    """`worker_init_fn` of data loaders: workers ignore stop signals sent to the process group, to finish the step."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


class Stopped(Exception):
    """The run received a stop signal and has saved a checkpoint. Exit code 128 + signal."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + number


class StopSignal:
    """Records a stop signal, so that the trainer can finish the step in progress first.

    A second Ctrl-C exits immediately, as does any stop signal after a Ctrl-C (a launcher may forward the second Ctrl-C
    as another signal).
    """

    def __init__(self):
        self.received = 0  # signal number, 0: none
        self.at = 0.0  # when it was received, monotonic seconds
        self.before = {number: signal.signal(number, self.receive) for number in STOPS}

    def receive(self, number: int, frame: object) -> None:
        """The signal handler."""
        again = self.received and signal.SIGINT in (self.received, number)
        # within 0.2 s it is the same Ctrl-C, delivered by both the terminal and the launcher
        if again and time.monotonic() - self.at > 0.2:
            os._exit(128 + number)
        if not self.received:
            self.received, self.at = number, time.monotonic()

    def close(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
