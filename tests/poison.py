"""An objective that spoils two batches: one loss is not a number, one gradient is a hundred times as large."""

import torch

from selfe.objectives.self_evaluation import SelfEvaluation
from selfe.types import Loss

NAN, HUGE = (6, 5), (9, 1)  # step, position


class Poisoned(SelfEvaluation):
    def __call__(self, net, ema, x0, conds, draws, step) -> Loss:
        loss = super().__call__(net, ema, x0, conds, draws, step)
        factors = torch.ones_like(loss.per_sample)
        for row, (_, at, position) in enumerate(draws.keys):
            if (at, position) == NAN:
                factors[row] = float("nan")
            if at == HUGE[0]:
                factors[row] = 100
        return Loss(loss.per_sample * factors, loss.metrics, loss.t, loss.s, loss.judged)
