"""TiM, transition models (arXiv 2509.04394), with the path of flow matching.

The target of a row with s < t is v - (t - s) sg D, with D = dV/dt along v, as in MeanFlow, by a difference of two
calls at t + e and t - e with the same x0 and noise (the paper's DDE). Rows with s < t have the weight 1 / sqrt(tan t
- tan s + 1), and all rows 1 / (loss + 1e-5). Verified against the published code (WZDTHU/TiM,
tim/schedulers/transition.py and transports.py: `OT_FM`, `time_weighting`, `adaptive_weighting`; configs/t2i).

Different from the code: the difference ends at t = 1 and at s (`time_derivative`); rows with s = t keep the time t of
flow matching; no directional loss and no REPA term (`selfe.objectives.repa` can be put around it). Guidance takes both
velocities from the EMA network, as there; with it, rows with s < t do not learn the map of the guided velocity, because
D is taken along v.
"""

from __future__ import annotations

from torch import Tensor

from selfe import flow
from selfe.objectives.flow_map import AdaptiveWeight, FlowMap, Guidance, Pairs, SRule, time_derivative
from selfe.protocols import Denoiser
from selfe.types import check_range


class TransitionModel(FlowMap):
    """The square of V - (v - (t - s) sg(dV/dt)), weighted by time and by the inverse of itself."""

    def __init__(
        self,
        p_drop: float = 0.1,
        p_equal: float = 0.5,
        p_zero: float = 0.1,
        s_rule: SRule = "sorted",
        t_mean: float = 0.0,
        t_std: float = 1.6,
        t_distribution: flow.TimeDistribution = "logit-normal",
        t_warp: tuple[float, float] = flow.WARP,
        guidance: float = 1.0,
        guidance_mix: float | None = None,
        width: float = 0.005,
        time_weight: bool = True,
        adaptive_power: float = 1.0,
        adaptive_offset: float = 1e-5,
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
            width: half the time between the two ends of the difference that gives the derivative.
            time_weight: give rows with s < t the weight 1 / sqrt(tan t - tan s + 1).
            adaptive_power: of the weight 1 / (mean square + adaptive_offset)^power of a row; 0 is none.
            adaptive_offset: see adaptive_power.
        """
        guide = Guidance(guidance, guidance_mix, "ema")
        adaptive = AdaptiveWeight(adaptive_power, adaptive_offset)
        super().__init__(p_drop, p_equal, p_zero, s_rule, t_mean, t_std, t_distribution, t_warp, guide, adaptive)
        check_range("width", width, 1e-7, 0.5)
        self.width, self.time_weight = width, time_weight

    def error(self, net: Denoiser, pairs: Pairs, step: int) -> Tensor:
        x_t, t, s = pairs.x_t, pairs.t, pairs.s
        derivative = time_derivative(net, x_t, t, s, pairs.cond, pairs.v, self.width)
        return pairs.predicted - (pairs.velocity - flow.per_token(t - s, x_t) * derivative)

    def weighted_pairs(self, error: Tensor, pairs: Pairs, step: int) -> Tensor:
        loss = self.weighted(error, pairs.x_t, pairs.t)
        return loss / (pairs.t.tan() - pairs.s.tan() + 1).sqrt() if self.time_weight else loss
