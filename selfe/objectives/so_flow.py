"""SoFlow, solution flow models (arXiv 2512.15657): consistency of the flow map over a short step, without a
derivative.

With l = t + r (s - t) and x_l = x_t + (l - t) v, the solution f(x, t, s) = x + (s - t) V(x, t, s) has to be the same
from x_t at t and from x_l at l. The difference quotient R = (f(x_t, t, s) - f(x_l, l, s)) / (t - l) is
v - V + (1 / r - 1) (V(x_l, l, s) - V(x_t, t, s)), and the loss | V - sg(V + R) |^2 / 2, weighted by
1 / (mean R^2 + offset)^power. r falls from `r_first` to `r_last` exponentially. Verified against the published class
`Soflow` (`get_consistency_loss`, `get_velocity_loss`, `get_middle_time`), of a models.py as the readme of
zlab-princeton/SoFlow describes it.

The true flow map is a fixed point in the limit r -> 0 only. Different from the paper: all rows are of one batch, 1 -
`p_equal` of them with s < t; times are drawn as for the other objectives; guidance does not fade towards t = 1.

With `k_cls`, the score of Self-E at the end of a step is added to v of rows with s < t (`flow_map.EndScore`). This is
not in the paper.
"""

from __future__ import annotations

from torch import Tensor

from selfe import flow
from selfe.objectives.flow_map import AdaptiveWeight, EndScore, FlowMap, Guidance, Pairs, SRule, after_step
from selfe.protocols import Denoiser
from selfe.types import MOST_STEPS, check_range


class SoFlow(FlowMap):
    """Half of the square of V - sg(V + R), R the difference quotient of the solutions from t and from l."""

    def __init__(
        self,
        p_drop: float = 0.1,
        p_equal: float = 0.75,
        p_zero: float = 0.0,
        s_rule: SRule = "sorted",
        t_mean: float = 0.0,
        t_std: float = 1.0,
        t_distribution: flow.TimeDistribution = "logit-normal",
        t_warp: tuple[float, float] = flow.WARP,
        guidance: float = 1.0,
        guidance_mix: float | None = None,
        r_first: float = 0.1,
        r_last: float = 0.002,
        r_steps: int = 400_000,
        adaptive_power: float = 1.0,
        adaptive_offset: float = 0.01,
        k_cls: float = 0.0,
        eval_floor: float = 0.5,
    ):
        """
        Args:
            p_drop: probability of replacing a prompt by the null prompt.
            p_equal: fraction of samples with s = t.
            p_zero: fraction of samples with s = 0.
            s_rule: the other samples have two times t in order (sorted), or s uniform between 0 and t.
            t_mean: mean of the logit of the training times; positive values draw more times close to 1.
            t_std: standard deviation of the logit of the training times.
            t_distribution: of the training times, before they are warped.
            t_warp: mu of the warp of the training times at 512 and at 4096 image tokens; [0, 0] is none.
            guidance: built-in scale of classifier-free guidance; 1 is none.
            guidance_mix: share of the network's own velocity in the guided one; null is 1 - 1 / guidance.
            r_first: length of the step from t to l, relative to t - s, in the first step of training.
            r_last: the same after r_steps steps of training.
            r_steps: steps over which r falls, exponentially.
            adaptive_power: of the weight 1 / (mean square + adaptive_offset)^power of a row; 0 is none.
            adaptive_offset: see adaptive_power.
            k_cls: weight of the classifier score of Self-E at the end of a step; 0 is none.
            eval_floor: the score is taken at level max(s, eval_floor * t).
        """
        guide, score = Guidance(guidance, guidance_mix), EndScore(k_cls, eval_floor)
        adaptive = AdaptiveWeight(adaptive_power, adaptive_offset)
        super().__init__(p_drop, p_equal, p_zero, s_rule, t_mean, t_std, t_distribution, t_warp, guide, adaptive, score)
        check_range("r_first", r_first, 1e-7, 1)
        check_range("r_last", r_last, 1e-7, 1)
        check_range("r_steps", r_steps, 1, MOST_STEPS)
        self.r_first, self.r_last, self.r_steps = r_first, r_last, r_steps

    def ratio(self, step: int) -> float:
        """The length of the step from t to l, relative to t - s."""
        return self.r_first * (self.r_last / self.r_first) ** min(step / self.r_steps, 1)

    def error(self, net: Denoiser, pairs: Pairs, step: int) -> Tensor:
        ratio, predicted = self.ratio(step), pairs.predicted
        change = after_step(net, pairs, ratio) - predicted.detach()
        return predicted - pairs.velocity - (1 / ratio - 1) * change

    def weighted_pairs(self, error: Tensor, pairs: Pairs, step: int) -> Tensor:
        return self.weighted(error, pairs.x_t, pairs.t) / 2
