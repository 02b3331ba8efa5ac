"""TVM, terminal velocity matching (arXiv 2511.19797): the end of a step moves with the velocity there.

With f(s) = x_t - (t - s) V(x_t, t, s), the loss of a row is | df/ds - sg V_ema(f(s), s, s) |^2 + | V(x_u, u, u) - sg
v_g |^2, with the guided velocity v_g = w v + (1 - w) V_ema(x_u, u, u, null), both divided by w^2; u is a third time,
with the same x0 and noise. The gradient goes through V and its derivative in s. Verified against the published code
(lumalabs/tvm, training/wrapper.py and training/loss.py: `get_dfds`, `forward`).

Different from the paper: df/ds is the difference of two calls at s - e and s + e, between 0 and t, and f and s are
those in the middle; times are drawn as for the other objectives; the scale w is fixed, not an input of the network;
the architecture is not changed (semi-Lipschitz layers); both losses take the first EMA of the run, there one of decay
0.99.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selfe import flow
from selfe.device import to_device
from selfe.objectives.flow_map import FlowMap, Guidance, SRule
from selfe.objectives.rows import spread_rows
from selfe.protocols import Denoiser
from selfe.rng import SampleRNG
from selfe.types import Loss, Packed, TextCond, check_range, packed


class TerminalVelocity(FlowMap):
    """Flow matching for all rows, and the terminal velocity for those with s < t."""

    repeats_samples = True  # in a pass with gradient, which TREAD would take for one of all samples
    passes = ("flow map", "terminal velocity", "targets")

    def __init__(
        self,
        p_drop: float = 0.1,
        p_equal: float = 0.0,
        p_zero: float = 0.0,
        s_rule: SRule = "sorted",
        t_mean: float = 0.0,
        t_std: float = 1.0,
        t_distribution: flow.TimeDistribution = "logit-normal",
        t_warp: tuple[float, float] = flow.WARP,
        guidance: float = 1.0,
        width: float = 0.005,
    ):
        """
        Args:
            p_drop: probability of replacing a prompt by the null prompt.
            p_equal: fraction of samples with flow matching alone.
            p_zero: fraction of samples with s = 0.
            s_rule: the other samples have two times t in order (sorted), or s uniform between 0 and t.
            t_mean: mean of the logit of the training times; positive values draw more times close to 1.
            t_std: standard deviation of the logit of the training times.
            t_distribution: of the training times, before they are warped.
            t_warp: mu of the warp of the training times at 512 and at 4096 image tokens; [0, 0] is none.
            guidance: built-in scale of classifier-free guidance; 1 is none.
            width: half the time between the two ends of the difference that gives the derivative.
        """
        guide = Guidance(guidance, 0.0, "ema")
        super().__init__(p_drop, p_equal, p_zero, s_rule, t_mean, t_std, t_distribution, t_warp, guide)
        check_range("width", width, 1e-7, 0.5)
        self.width = width

    def __call__(
        self, net: Denoiser, ema: Denoiser, x0: Packed, conds: dict[str, TextCond], rng: SampleRNG, step: int
    ) -> Loss:
        rows = spread_rows(self.share, len(x0))
        if not torch.is_grad_enabled() or (not rows and self.guidance.scale == 1):
            return super().__call__(net, ema, x0, conds, rng, step)

        # Flow matching at a time u of its own.
        noise = rng.normal_like("noise", x0)
        u = flow.draw_t(rng, x0, self.times)
        x_u = x0.with_tokens(flow.interpolate(x0.tokens, noise, u, x0))
        v, kept = noise - x0.tokens, self.kept(rng, u)
        velocity, _ = self.guidance.velocity(ema, x_u, u, conds, v, kept)
        predicted = net(x_u, u, u, conds["cond"])

        # Errors are divided by the scale of guidance.
        weight = torch.ones_like(u).masked_fill(kept, self.guidance.scale**-2)
        loss = weight * flow.mean_per_sample((predicted - velocity).square(), x0)
        metrics = {"data_loss": flow.mean_per_sample((predicted - v).detach().square(), x0)}
        if not rows:
            return Loss(loss, metrics, u, u)

        # The terminal velocity of steps from t to s.
        index = to_device(torch.tensor(rows, dtype=torch.int64), u.device)
        t, s = self.pair_times.draw(rng, x0, index, ("second t", "third t"))
        x_t = x0.with_tokens(flow.interpolate(x0.tokens, noise, t, x0)).select(rows)
        error = self.terminal_error(net, ema, x_t, t[index], s[index], conds["cond"].select(rows))
        pair_error = flow.mean_per_sample(error.square(), x_t)
        loss = loss.index_add(0, index, weight[index] * pair_error)

        # the times of the metrics are those of flow matching
        return Loss(loss, metrics | {"map_loss": pair_error.detach()}, u, u, tuple(rows))

    def terminal_error(self, net: Denoiser, ema: Denoiser, x_t: Packed, t: Tensor, s: Tensor, cond: TextCond) -> Tensor:
        """df/ds - V_ema(f(s), s, s) (T, d), in the middle of the two ends of the difference."""
        # The ends of the step to both times, of one call with twice the rows.
        after, before = torch.minimum(s + self.width, t), (s - self.width).clamp_min(0)
        rows = [*range(len(x_t)), *range(len(x_t))]
        both = packed(torch.cat([x_t.tokens, x_t.tokens]), x_t.grids + x_t.grids)
        outputs = net(both, torch.cat([t, t]), torch.cat([after, before]), cond.select(rows))
        upper, lower = outputs.chunk(2)
        end = x_t.tokens - flow.per_token(t - after, x_t) * upper
        start = x_t.tokens - flow.per_token(t - before, x_t) * lower

        # Its velocity; where no time is left, at t = 0, that of the network.
        span = flow.per_token(after - before, x_t)
        slope = torch.where(span > 0, (end - start) / span.clamp_min(1e-30), upper)
        middle = (after + before) / 2
        with torch.no_grad():
            velocity = ema(x_t.with_tokens((end + start) / 2), middle, middle, cond)
        return slope - velocity
