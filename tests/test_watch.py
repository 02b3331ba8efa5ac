"""What a process that waits says of the others."""

import time

import torch

from selfe import dist
from selfe.dist import World
from selfe.watch import Watch


def test_who_is_to_blame(alone):
    """Notes of three processes: one silent, then one in another step, then all alike."""
    watch = Watch(World(0, 3, torch.device("cpu")), 5, print)
    watch.beat(7, "training")
    dist.post("stuck_0", "step 7: training")
    dist.post("stuck_2", "step 7: training")
    waited = "step 7: training: process 0 waited 5 minutes (trainer.timeout_minutes); "
    assert watch.verdict() == waited + "no answer from process 1"
    dist.post("stuck_1", "step 6: training")
    assert watch.verdict() == waited + "process 1 is at step 6: training"
    dist.post("stuck_1", "step 7: training")
    assert watch.verdict() == waited + "all processes answer"
    watch.close()


def test_a_wait_without_limit_is_let_be(alone):
    said = []
    watch = Watch(alone, 0.01, said.append)
    watch.beat(3, "saving", limited=False)
    time.sleep(1.0)
    assert said == []
    watch.beat(3, "training")
    for _ in range(100):
        if said:
            break
        time.sleep(0.05)
    assert said == ["step 3: training: process 0 waited 0.01 minutes (trainer.timeout_minutes); all processes answer"]
