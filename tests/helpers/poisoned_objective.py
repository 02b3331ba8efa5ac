"""Objectives with faults: batches that are spoiled, and gradient norms that jump where the loss changes."""

import torch

from selfe.objectives.self_evaluation import SelfEvaluation
from selfe.types import Loss

NAN, HUGE = (6, 5), (9, 1)  # step, position
CHANGES = (4, 8, 12, 16)  # steps at which the loss, the batch or the resolution changes in test_grad_guard.py


class PoisonedObjective(SelfEvaluation):
    def __call__(self, net, ema, x0, conds, rng, step) -> Loss:
        loss = super().__call__(net, ema, x0, conds, rng, step)
        factors = torch.ones_like(loss.per_sample)
        for row, (_, at, position) in enumerate(rng.keys):
            if (at, position) == NAN:
                factors[row] = float("nan")
            if at == HUGE[0]:
                factors[row] = 100
        return Loss(loss.per_sample * factors, loss.metrics, loss.t, loss.s, loss.eval_rows)


class NanObjective(SelfEvaluation):
    """No loss of any step is a number."""

    def __call__(self, net, ema, x0, conds, rng, step) -> Loss:
        loss = super().__call__(net, ema, x0, conds, rng, step)
        return Loss(loss.per_sample * float("nan"), loss.metrics, loss.t, loss.s, loss.eval_rows)


class JumpingObjective(SelfEvaluation):
    """At every second change of loss, batch or resolution the gradient becomes `jump` times as large."""

    def __init__(
        self, start_step: int, tau_steps: int, aux_start_step: int, jump: float = 1.0, spike: int | None = None
    ):
        super().__init__(start_step=start_step, tau_steps=tau_steps, aux_start_step=aux_start_step)
        self.jump, self.spike = jump, spike

    def __call__(self, net, ema, x0, conds, rng, step) -> Loss:
        loss = super().__call__(net, ema, x0, conds, rng, step)
        changes = sum(step >= first for first in CHANGES)
        factor = self.jump if changes % 2 else 1.0
        factor *= 100 if step == self.spike else 1
        return Loss(loss.per_sample * factor, loss.metrics, loss.t, loss.s, loss.eval_rows)
