"""Watchdog: ends this process if the training loop hangs or another process has failed, and reports which one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from selfe.distributed import collectives
from selfe.distributed.collectives import World


class Watchdog:
    """Two threads that check the heartbeats of the training loop and the failures of other processes.

    Without a heartbeat for `minutes`, `end(message)` is called on every rank that is alive. The timeout of the process
    group is longer, because its message names collectives, not ranks and steps. When another process has failed, `end`
    is called within seconds, even if this process waits for it in a collective.
    """

    def __init__(self, world: World, minutes: float, end: Callable[[str], None]):
        self.world, self.minutes, self.end = world, minutes, end
        self.step, self.doing, self.since = 0, "starting", time.monotonic()
        self.limited = True
        self.closed = threading.Event()
        threading.Thread(target=self.run, name="watch", daemon=True).start()
        if world.size > 1:
            threading.Thread(target=self.listen, name="listen", daemon=True).start()

    def heartbeat(self, step: int, doing: str, limited: bool = True) -> None:
        """Report progress: at `step`, about to do `doing`, which may take at most `minutes` if `limited`."""
        self.step, self.doing, self.limited, self.since = step, doing, limited, time.monotonic()

    def run(self) -> None:
        """The first thread: polls until closed or timed out."""
        seconds = 60 * self.minutes
        interval = min(1.0, seconds / 10)
        polled = time.monotonic()
        while not self.closed.wait(interval):
            # A process that was stopped (Ctrl+Z, a paused container) has not hung meanwhile.
            now = time.monotonic()
            if now - polled > 10 * interval:
                self.since = min(now, self.since + now - polled)
            polled = now

            if self.limited and time.monotonic() - self.since > seconds:
                collectives.set_note(f"stuck_{self.world.rank}", f"step {self.step}: {self.doing}")
                time.sleep(min(5.0, seconds / 2))  # let the other ranks time out and set their notes
                return self.end(self.diagnosis())

    def listen(self) -> None:
        """The second thread: polls every second until closed or another process has failed."""
        failure = None
        while failure is None:
            if self.closed.wait(1.0):
                return
            failure = collectives.failure_of_another()

        # An error of all processes is reported by the main thread of each, if it does not hang.
        if not self.closed.wait(1.0):
            self.end(failure)

    def diagnosis(self) -> str:
        """One line from the notes of all ranks: who does not respond, or who is elsewhere."""
        # notes of ranks that timed out; a rank without a note does not respond
        notes = {rank: collectives.get_note(f"stuck_{rank}") for rank in range(self.world.size)}
        silent = [str(rank) for rank, note in notes.items() if note is None]
        mine = notes.pop(self.world.rank)
        others = {rank: note for rank, note in notes.items() if note not in (None, mine)}

        if silent:
            who = f"no response from process {', '.join(silent)}"
        elif others:
            who = "; ".join(f"process {rank} is at {note}" for rank, note in others.items())
        else:
            who = "all processes respond"

        limit = f"{self.minutes:g} minutes (trainer.timeout_minutes)"
        return f"{mine}: process {self.world.rank} waited {limit}; {who}"

    def close(self) -> None:
        self.closed.set()
