"""What a waiting process reports about the others."""

import multiprocessing
import os
import queue
import signal
import time

import torch

from selfe.distributed import collectives
from selfe.distributed.collectives import World
from selfe.training.watchdog import Watchdog


def test_who_is_to_blame(alone):
    """Notes of three processes: one silent, then one in another step, then all alike."""
    watch = Watchdog(World(0, 3, torch.device("cpu")), 5, print)
    watch.heartbeat(7, "training")
    collectives.set_note("stuck_0", "step 7: training")
    collectives.set_note("stuck_2", "step 7: training")
    waited = "step 7: training: process 0 waited 5 minutes (trainer.timeout_minutes); "
    assert watch.diagnosis() == waited + "no response from process 1"
    collectives.set_note("stuck_1", "step 6: training")
    assert watch.diagnosis() == waited + "process 1 is at step 6: training"
    collectives.set_note("stuck_1", "step 7: training")
    assert watch.diagnosis() == waited + "all processes respond"
    watch.close()


def test_a_wait_without_limit_is_let_be(alone):
    said = []
    watch = Watchdog(alone, 0.01, said.append)
    watch.heartbeat(3, "saving", limited=False)
    time.sleep(1.0)
    assert said == []
    watch.heartbeat(3, "training")
    for _ in range(100):
        if said:
            break
        time.sleep(0.05)
    assert said == ["step 3: training: process 0 waited 0.01 minutes (trainer.timeout_minutes); all processes respond"]


def watched(minutes: float, started, ended) -> None:
    """A process with a watchdog, whose main thread reports once and then waits."""
    watch = Watchdog(World(0, 1, torch.device("cpu")), minutes, lambda message: os._exit(3))
    watch.heartbeat(1, "training")
    started.set()
    ended.wait()
    watch.close()


def test_a_stopped_process_has_not_hung():
    context = multiprocessing.get_context("fork")
    started, ended = context.Event(), context.Event()
    process = context.Process(target=watched, args=(0.03, started, ended))
    process.start()
    assert started.wait(30)

    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2.5)  # the limit is 1.8 seconds
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(0.4)  # two polls
    ended.set()
    process.join(30)
    assert process.exitcode == 0


def test_the_failure_of_another_process_ends_this_one(alone, monkeypatch):
    """Also one that waits without limit, and hangs in a collective: the watchdog is a thread."""
    ended = queue.Queue()
    watch = Watchdog(World(0, 2, torch.device("cpu")), 0.01, ended.put)
    watch.heartbeat(3, "saving", limited=False)
    assert collectives.publish_failure(collectives._notes, "a process of node 0 was ended")
    assert ended.get(timeout=20) == "a process of node 0 was ended"
    assert not collectives.publish_failure(collectives._notes, "another one, a consequence of the first")

    # a failure that this process published does not end it: it is about to say more
    monkeypatch.setattr(collectives, "_posted", True)
    assert collectives.failure_of_another() is None
