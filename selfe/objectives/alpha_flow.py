"""alpha-Flow (arXiv 2510.20771): from the velocity of the data for every s, by a schedule, to MeanFlow.

With m = t - a (t - s) and x_m = x_t - (t - m) v, the target of a row with s < t is a v + (1 - a) sg V(x_m, m, s), and
its weight 1 / a. At a = 1 it is v (trajectory flow matching), and for a -> 0 the gradient is MeanFlow's. The schedule
is a(k) = 1 - sigmoid(gamma (k - middle) / length) between two steps. Verified against the published code
(snap-research/alphaflow, src/training/loss.py: `_compute_mean_velocity_d`, `get_ratio`).

The true flow map is a fixed point in the limit a -> 0 only: x_m is a step along the velocity of a sample. Different
from the code: a ends at `alpha_min` (`discrete_training` there) instead of changing to MeanFlow's derivative at 0;
targets are not clipped.
"""

from __future__ import annotations

import math
from bisect import bisect_left

from torch import Tensor

from selfe import flow
from selfe.objectives.flow_map import AdaptiveWeight, FlowMap, Guidance, Pairs, SRule, after_step
from selfe.protocols import Denoiser
from selfe.types import MOST_STEPS, check_range


class AlphaFlow(FlowMap):
    """The square of V - (a v + (1 - a) sg V(x_m, m, s)), divided by a and weighted by the inverse of itself."""

    def __init__(
        self,
        p_drop: float = 0.1,
        p_equal: float = 0.5,
        p_zero: float = 0.0,
        s_rule: SRule = "sorted",
        t_mean: float = 0.0,
        t_std: float = 1.0,
        t_distribution: flow.TimeDistribution = "logit-normal",
        t_warp: tuple[float, float] = flow.WARP,
        guidance: float = 1.0,
        guidance_mix: float | None = None,
        alpha_start_step: int = 0,
        alpha_end_step: int = 400_000,
        alpha_gamma: float = 25.0,
        alpha_min: float = 0.005,
        adaptive_power: float = 1.0,
        adaptive_offset: float = 0.001,
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
            alpha_start_step: step at which alpha starts to fall from 1; before, targets are the data's velocity.
            alpha_end_step: step from which on alpha is alpha_min.
            alpha_gamma: steepness of the sigmoid between these steps.
            alpha_min: least alpha; above 1 - alpha_min it is 1.
            adaptive_power: of the weight 1 / (mean square + adaptive_offset)^power of a row; 0 is none.
            adaptive_offset: see adaptive_power.
        """
        guide = Guidance(guidance, guidance_mix)
        adaptive = AdaptiveWeight(adaptive_power, adaptive_offset)
        super().__init__(p_drop, p_equal, p_zero, s_rule, t_mean, t_std, t_distribution, t_warp, guide, adaptive)
        check_range("alpha_start_step", alpha_start_step, 0, MOST_STEPS)
        check_range("alpha_end_step", alpha_end_step, 1, MOST_STEPS)
        check_range("alpha_gamma", alpha_gamma, 0, 1000)
        check_range("alpha_min", alpha_min, 1e-7, 0.5)
        if alpha_end_step <= alpha_start_step:
            raise ValueError(f"alpha_end_step {alpha_end_step} must be above alpha_start_step {alpha_start_step}")
        self.alpha_start_step, self.alpha_end_step = alpha_start_step, alpha_end_step
        self.alpha_gamma, self.alpha_min = alpha_gamma, alpha_min

    def alpha(self, step: int) -> float:
        """The share of the data's velocity in a target, from 1 to `alpha_min`."""
        if step >= self.alpha_end_step:
            return self.alpha_min
        length = self.alpha_end_step - self.alpha_start_step
        progress = (step - self.alpha_start_step) / length - 0.5
        alpha = 1 / (1 + math.exp(self.alpha_gamma * progress))
        return 1.0 if step < self.alpha_start_step or alpha > 1 - self.alpha_min else max(alpha, self.alpha_min)

    @property
    def starts(self) -> tuple[int, ...]:
        """The first step whose alpha is below 1: before, V(x_m, m, s) is not computed."""
        steps = range(self.alpha_start_step, self.alpha_end_step + 1)
        return (steps[bisect_left(steps, True, key=lambda step: self.alpha(step) < 1)],)

    def phase(self, step: int) -> str:
        return super().phase(step) if self.alpha(step) < 1 else "trajectory flow matching"

    def error(self, net: Denoiser, pairs: Pairs, step: int) -> Tensor:
        alpha = self.alpha(step)
        if alpha == 1:
            return pairs.predicted - pairs.velocity
        return pairs.predicted - (alpha * pairs.velocity + (1 - alpha) * after_step(net, pairs, alpha))

    def weighted_pairs(self, error: Tensor, pairs: Pairs, step: int) -> Tensor:
        # 1 / alpha; its product with the adaptive weight is that of the code, alpha / (error + offset), at power 1
        return self.alpha(step) ** (2 * self.adaptive.power - 1) * self.weighted(error, pairs.x_t, pairs.t)
