"""MeanFlow (arXiv 2505.13447) and improved MeanFlow (iMF, arXiv 2512.02012).

With D the derivative of V(x_t, t, s) along the path, d/dt V = dx/dt . grad V + dV/dt, the flow map fulfils the
MeanFlow identity V + (t - s) D = velocity (2505.13447, Eq. 6). The loss of a row is | V + (t - s) sg(D) - v |^2,
which has the gradient of MeanFlow's | V - sg(v - (t - s) D) |^2 (Eq. 9, 10). The two papers differ in dx/dt: MeanFlow
takes the velocity v = noise - x0 of the sample, iMF the network's V(x_t, t, t) (2512.02012, Sec. 4.1).
Verified against the code of iMF (Lyy-iiis/imeanflow, imf.py: `forward`, `guidance_fn`).

Different from the papers: D is a central difference (`time_derivative`); rows with s = t are the share of every batch
that `p_equal` says, and keep the time t of flow matching; iMF's second head for v and guidance as an input of the
network are left out.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from selfe import flow
from selfe.objectives.flow_map import AdaptiveWeight, FlowMap, Guidance, Pairs, SRule, time_derivative
from selfe.protocols import Denoiser
from selfe.types import Packed, check_range


class MeanFlow(FlowMap):
    """The square of V + (t - s) sg(dV/dt) - v, weighted by the inverse of itself."""

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
        tangent: Literal["network", "data"] = "network",
        width: float = 0.005,
        adaptive_power: float = 1.0,
        adaptive_offset: float = 0.01,
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
            guidance_mix: share of the network's own velocity in the guided one; null is 1 - 1 / guidance, as in iMF.
            tangent: along which x_t moves in the derivative; network is iMF, data is MeanFlow.
            width: half the time between the two ends of the difference that gives the derivative.
            adaptive_power: of the weight 1 / (sum of squares + adaptive_offset)^power of a row; 0 is none.
            adaptive_offset: see adaptive_power.
        """
        guide = Guidance(guidance, guidance_mix)
        adaptive = AdaptiveWeight(adaptive_power, adaptive_offset)
        super().__init__(p_drop, p_equal, p_zero, s_rule, t_mean, t_std, t_distribution, t_warp, guide, adaptive)
        check_range("width", width, 1e-7, 0.5)
        self.tangent, self.width = tangent, width

    def error(self, net: Denoiser, pairs: Pairs, step: int) -> Tensor:
        x_t, t, s, cond = pairs.x_t, pairs.t, pairs.s, pairs.cond
        tangent = pairs.velocity if self.tangent == "data" else self.network_velocity(net, pairs)
        derivative = time_derivative(net, x_t, t, s, cond, tangent, self.width)
        return pairs.predicted + flow.per_token(t - s, x_t) * derivative - pairs.velocity

    def network_velocity(self, net: Denoiser, pairs: Pairs) -> Tensor:
        """V(x_t, t, t) (T, d), without gradient."""
        if pairs.v_cond is not None:
            return pairs.v_cond
        with torch.no_grad():
            return net(pairs.x_t, pairs.t, pairs.t, pairs.cond)

    def weighted(self, error: Tensor, like: Packed, t: Tensor) -> Tensor:
        # the papers add the offset to the sum over all values of a sample
        num_values = like.counts * like.tokens.shape[1]
        return self.adaptive(error, num_values)
