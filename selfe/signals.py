"""Signals that shut a run down cleanly (SIGTERM, SIGUSR1, Ctrl-C), and processes that end with their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PR_SET_PDEATHSIG = 1  # option of Linux's prctl(2)


def end_with_parent(worker: int) -> None:
    """`worker_init_fn` of data loaders: workers end with their rank, even if it is killed."""
    signal_with_parent(signal.SIGKILL)


def outlast_stops(worker: int) -> None:
    """`worker_init_fn` of data loaders: as `end_with_parent`, but stop signals are ignored, so that a step can finish.

    Schedulers send them to all processes of a job.
    """
    end_with_parent(worker)
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def signal_with_parent(number: signal.Signals) -> None:
    """Have the kernel send a signal to this process when its parent ends. Linux only, no effect elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def stop_with_parent(parent: int) -> None:
    """Send SIGTERM to this process when its parent, of which the id is given, ends or has ended already."""
    signal_with_parent(signal.SIGTERM)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def process_start(pid: int) -> str | None:
    """When a process of this machine was started, in units of the system; None if it does not run."""
    # Linux: state and start time are fields 3 and 22, counted behind the name in parentheses
    if sys.platform == "linux":
        try:
            state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if state in "ZX" else fields[18]

    done = subprocess.run(["ps", "-o", "state=,lstart=", "-p", str(pid)], capture_output=True, text=True)
    state, _, started = done.stdout.strip().partition(" ")
    return None if not state or state.startswith("Z") else started.strip()


class Stopped(Exception):
    """The run received a stop signal and has saved a checkpoint. Exit code 128 + signal."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + number


class StopSignal:
    """Records a stop signal, so that the trainer can finish the step in progress first.

    A second Ctrl-C exits immediately, as does any stop signal after a Ctrl-C (a launcher may forward the second Ctrl-C
    as another signal). If this object is not closed `grace` seconds after the first signal, `late(signal)` is called in
    a background thread and should end the process, whatever the main thread waits for.
    """

    def __init__(self, grace: float, late: Callable[[int], None]):
        self.received = 0  # signal number, 0: none
        self.at = 0.0  # when it was received, monotonic seconds
        self.grace, self.late = grace, late
        self.closed = threading.Event()

        # Python calls handlers in the main thread only, which may be blocked in a collective. The wakeup descriptor
        # is written at once.
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.wakeup_before = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        self.before = {number: signal.signal(number, self.receive) for number in STOPS}
        self.thread = threading.Thread(target=self.watch, name="stop signal", daemon=True)
        self.thread.start()

    def receive(self, number: int, frame: object) -> None:
        """The signal handler."""
        again = self.received and signal.SIGINT in (self.received, number)
        # within 0.2 s it is the same Ctrl-C, delivered by both the terminal and the launcher
        if again and time.monotonic() - self.at > 0.2:
            os._exit(128 + number)
        if not self.received:
            self.received, self.at = number, time.monotonic()

    def watch(self) -> None:
        """The thread: waits for the first stop signal, then for the end of the run."""
        number = 0
        while number not in STOPS:
            (number,) = os.read(self.reader, 1)
            if self.closed.is_set():
                return
        if not self.closed.wait(self.grace):
            self.late(number)

    def close(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.wakeup_before)

        # End the thread by a byte: forked loader workers have the pipe too, so closing it would not.
        self.closed.set()
        os.write(self.writer, b"\0")
        self.thread.join()
        os.close(self.writer)
        os.close(self.reader)
