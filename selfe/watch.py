"""A watch over the step: when it hangs, every process that still can says so once, and names who does not answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from selfe import dist
from selfe.dist import World


class Watch:
    """A thread beside the training loop, which tells it what it is about to do.

    No progress for `minutes`: `end(message)` is called from the thread, on every rank that is alive. The process
    group's own timeout is longer; it speaks of operations, not of ranks.
    """

    def __init__(self, world: World, minutes: float, end: Callable[[str], None]):
        self.world, self.minutes, self.end = world, minutes, end
        self.step, self.doing, self.since = 0, "starting", time.monotonic()
        self.waiting = True
        self.closed = threading.Event()
        threading.Thread(target=self.run, name="watch", daemon=True).start()

    def beat(self, step: int, doing: str, limited: bool = True) -> None:
        """The loop goes on: at `step`, about to do something that, if `limited`, may take `minutes` at most."""
        self.step, self.doing, self.waiting, self.since = step, doing, limited, time.monotonic()

    def run(self) -> None:
        seconds = 60 * self.minutes
        while not self.closed.wait(min(1.0, seconds / 10)):
            if self.waiting and time.monotonic() - self.since > seconds:
                dist.post(f"stuck_{self.world.rank}", f"step {self.step}: {self.doing}")
                time.sleep(min(5.0, seconds / 2))  # the others come to the same conclusion about now
                return self.end(self.verdict())

    def verdict(self) -> str:
        """What the ranks have posted, in a line."""
        found = {rank: dist.posted(f"stuck_{rank}") for rank in range(self.world.size)}
        silent = [str(rank) for rank, note in found.items() if note is None]
        mine = found.pop(self.world.rank)
        others = {rank: note for rank, note in found.items() if note not in (None, mine)}
        if silent:
            who = f"no answer from process {', '.join(silent)}"
        elif others:
            who = "; ".join(f"process {rank} is at {note}" for rank, note in others.items())
        else:
            who = "all processes answer"
        limit = f"{self.minutes:g} minutes (trainer.timeout_minutes)"
        return f"{mine}: process {self.world.rank} waited {limit}; {who}"

    def close(self) -> None:
        self.closed.set()
