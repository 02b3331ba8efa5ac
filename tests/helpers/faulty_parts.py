"""Faulty parts: an objective whose steps take long, a sampler that fails."""

import time

from torch import Tensor

from selfe.objectives.self_evaluation import SelfEvaluation
from selfe.samplers.euler import Euler
from selfe.types import Loss


class SlowObjective(SelfEvaluation):
    """The objective of tiny.yaml with a pause in every step, in which a test can act."""

    def __init__(self, seconds: float):
        super().__init__(start_step=0, tau_steps=4, aux_start_step=4)
        self.seconds = seconds

    def __call__(self, *arguments) -> Loss:
        print("a slow step", flush=True)
        time.sleep(self.seconds)
        return super().__call__(*arguments)


class FailingSampler(Euler):
    def __call__(self, *arguments) -> Tensor:
        raise MemoryError("no room for images")
