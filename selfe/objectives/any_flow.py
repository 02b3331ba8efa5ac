"""AnyFlow (arXiv 2605.13724), its first stage: forward training of a flow map, without distillation.

With guidance w, what is regressed is V_f = (V - (1 - w) sg V(x_t, t, s, null)) / w, so that V itself is the guided
one; the target is v - (t - s) D / w, with D = dV/dt along v by a difference of two calls (the other network's
derivative is left out there too). Rows have the weight 15/4 t sqrt(1 - t) (beta08), and the loss of a row with s < t
is then rescaled to the mean loss of rows with s = t, without gradient. Verified against a published trainer of AnyFlow
with FAR (`sample_timestep`, `compute_central_difference`, `train_causal`), whose repository could not be determined,
and against its port (NVlabs/FastGen, pull request 25).

At guidance 1, the true flow map is a fixed point; at another one, rows with s = t learn the guided velocity, and the
map of the others is that of the difference above. Different from the code: the mean loss is that of the rows with s =
t in the same group of `batch_multiple` neighbouring rows, not of the batch, so that it does not depend on how a batch
is split over ranks and micro-batches; rows without prompt are regressed without guidance, as in FastGen; the weight
has the mean 1 over uniform t, there over the sampler's times.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from selfe import flow
from selfe.objectives.flow_map import FlowMap, Guidance, Pairs, SRule, time_derivative
from selfe.protocols import Denoiser
from selfe.rng import SampleRNG
from selfe.types import Packed, TextCond, check_range

SMALL = 1e-5  # added to a loss by which is divided, as in the code


class AnyFlow(FlowMap):
    """The square of V_f - (v - (t - s) sg(dV/dt) / w); rows with s < t as large as those with s = t."""

    def __init__(
        self,
        p_drop: float = 0.1,
        p_equal: float = 0.5,
        p_zero: float = 0.25,
        s_rule: SRule = "sorted",
        t_mean: float = 0.0,
        t_std: float = 1.0,
        t_distribution: flow.TimeDistribution = "uniform",
        t_warp: tuple[float, float] = flow.WARP,
        guidance: float = 1.0,
        width: float = 0.005,
        time_weight: bool = True,
        balance: bool = True,
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
            width: half the time between the two ends of the difference that gives the derivative.
            time_weight: give rows the weight 15/4 t sqrt(1 - t).
            balance: rescale the loss of rows with s < t to that of rows with s = t.
        """
        # guidance is part of the prediction here, not of the velocity
        none = Guidance(1.0, 0.0)
        super().__init__(p_drop, p_equal, p_zero, s_rule, t_mean, t_std, t_distribution, t_warp, none)
        check_range("guidance", guidance, 1, 100)
        check_range("width", width, 1e-7, 0.5)
        if balance and p_equal == 0:
            raise ValueError("balance: needs rows with s = t; raise p_equal above 0, or set balance to false")
        self.fused_guidance, self.width = guidance, width
        self.time_weight, self.balance = time_weight, balance

    def captions(self, prompts: Sequence[str], rng: SampleRNG, step: int, drop: bool = True) -> dict[str, list[str]]:
        captions = super().captions(prompts, rng, step, drop)
        return captions if self.fused_guidance == 1 else captions | {"null": [""] * len(prompts)}

    def prediction(
        self, net: Denoiser, x_t: Packed, t: Tensor, s: Tensor, conds: dict[str, TextCond], kept: Tensor
    ) -> Tensor:
        predicted, w = super().prediction(net, x_t, t, s, conds, kept), self.fused_guidance
        if w == 1:
            return predicted
        with torch.no_grad():
            without_prompt = net(x_t, t, s, conds["null"])
        return torch.where(flow.per_token(kept, x_t), (predicted - (1 - w) * without_prompt) / w, predicted)

    def error(self, net: Denoiser, pairs: Pairs, step: int) -> Tensor:
        x_t, t, s = pairs.x_t, pairs.t, pairs.s
        derivative = time_derivative(net, x_t, t, s, pairs.cond, pairs.v, self.width)
        length = torch.where(pairs.kept, (t - s) / self.fused_guidance, t - s)
        return pairs.predicted - (pairs.v - flow.per_token(length, x_t) * derivative)

    def weighted(self, error: Tensor, like: Packed, t: Tensor) -> Tensor:
        return 15 / 4 * t * (1 - t).sqrt() * error if self.time_weight else error

    def combined(self, loss: Tensor, pair_loss: Tensor, index: Tensor) -> Tensor:
        if self.balance:
            # mean loss of the rows with s = t in each group
            equal = torch.ones_like(loss).index_fill(0, index, 0).view(-1, self.batch_multiple)
            means = (loss.detach().view_as(equal) * equal).sum(dim=1) / equal.sum(dim=1)
            pair_loss = pair_loss * means.repeat_interleave(self.batch_multiple)[index] / (pair_loss.detach() + SMALL)
        return super().combined(loss, pair_loss, index)
