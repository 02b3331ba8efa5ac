"""The base of all objectives that learn a flow map.

The true flow map V*(x_t, t, s) is the mean velocity of the probability flow ODE from time t to time s <= t: x_t - (t
- s) V*(x_t, t, s) is the state at time s of the solution that passes through x_t at time t. At s = t it is the
velocity E[noise - x0 | x_t] that flow matching learns. A share of the rows has s = t, and their target is the
velocity; the target of the others is made of the velocity and of the network's own output, so that V* is a fixed
point.

Classifier-free guidance can be built in. The velocity v of the data, in all targets, is then replaced by (1 - mix) (w
v + (1 - w) V(x_t, t, t, null)) + mix V(x_t, t, t, c), of which the network learns w v_c + (1 - w) v_null for every
mix: as in MeanFlow (arXiv 2505.13447), with omega = (1 - mix) w and kappa = mix. Such a network is sampled at
guidance 1. Rows whose prompt was dropped keep v.

The score of self-evaluation can be added to the velocity of rows with s < t, see `EndScore`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from selfe import flow
from selfe.device import to_device
from selfe.objectives.flow_matching import FlowMatching
from selfe.objectives.rows import share_of_pairs, spread_rows
from selfe.protocols import Denoiser
from selfe.rng import SampleRNG
from selfe.types import Loss, Packed, TextCond, check_range, packed

SRule = Literal["sorted", "uniform"]


@dataclass(frozen=True)
class PairTimes:
    """How the times of rows are drawn: t as in flow matching, and s <= t."""

    times: flow.TrainingTimes
    p_equal: float  # share of the rows with s = t
    p_zero: float  # share of all rows with s = 0
    s_rule: SRule

    def __post_init__(self):
        check_range("p_equal", self.p_equal, 0, 1)
        check_range("p_zero", self.p_zero, 0, 1)
        if self.p_equal + self.p_zero > 1:
            raise ValueError(f"p_equal {self.p_equal} and p_zero {self.p_zero} are shares of a batch; lower one")

    def draw(
        self, rng: SampleRNG, x0: Packed, rows: Tensor, names: tuple[str, str] = ("t", "second t")
    ) -> tuple[Tensor, Tensor]:
        """t and s (B,); the indices `rows` have s < t, the others s = t. `names`: of the random numbers."""
        t = flow.draw_t(rng, x0, self.times, names[0])
        if self.s_rule == "sorted":
            second = flow.draw_t(rng, x0, self.times, names[1])
            later, earlier = torch.maximum(t, second), torch.minimum(t, second)
        else:
            later, earlier = t, t * rng.uniform("s", like=t)

        # which of the rows with s < t have s = 0 is random per sample: it does not change the network calls
        if self.p_zero:
            earlier = torch.where(rng.uniform("zero", like=t) < self.p_zero / (1 - self.p_equal), 0, earlier)
        return t.index_copy(0, rows, later[rows]), t.index_copy(0, rows, earlier[rows])


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance as part of the velocity that a network learns, see the top of this file."""

    scale: float  # w; 1 is none
    mix: float | None  # share of the network's own conditional velocity; None: 1 - 1 / w
    weights: Literal["live", "ema"] = "live"  # of the network that gives the velocities

    def __post_init__(self):
        check_range("guidance", self.scale, 1, 100)
        check_range("guidance_mix", self.mix, 0, 0.99)

    @property
    def share(self) -> float:
        return 1 - 1 / self.scale if self.mix is None else self.mix

    def velocity(
        self, net: Denoiser, x_t: Packed, t: Tensor, conds: dict[str, TextCond], v: Tensor, kept: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The guided velocity (T, d), and the network's own conditional one if it was computed.

        Args:
            v: velocity of the data (T, d).
            kept: (B,) which rows have their prompt.
        """
        guided, v_cond = v, None
        with torch.no_grad():
            if self.scale != 1:
                guided = self.scale * v + (1 - self.scale) * net(x_t, t, t, conds["null"])
            if self.share:
                v_cond = net(x_t, t, t, conds["cond"])
                guided = (1 - self.share) * guided + self.share * v_cond
        return torch.where(flow.per_token(kept, x_t), guided, v), v_cond


@dataclass(frozen=True)
class EndScore:
    """The classifier score of Self-E (arXiv 2512.22374, Eq. 14) at the end of a step, as a part of the velocity there.

    Self-E takes the score at a re-noised prediction x0_hat and adds it to the target of x0_hat. The end of a step of a
    flow map is a state x_s = x_t - (t - s) V(x_t, t, s) at noise level s already. As the score at s = 0 is zero, it is
    taken at x_e = a x_s + b noise of level e = max(s, floor t), with a = (1 - e) / (1 - s) and b^2 = e^2 - (a s)^2, so
    that real data at level s becomes real data at level e.

    A velocity has units of x0 divided by t, so what is added is k_cls w (e / t) (V_ema(x_e, e, e, c) - V(x_e, e, e,
    null)), with Self-E's weight w = lambda / (1 + lambda) between e and t (Eq. 17): none for short steps, k_cls e from
    noise to data. The true map of the velocity with this addition is a fixed point. Not in the paper.
    """

    k_cls: float = 0.0  # 0: none
    floor: float = 0.5  # of e, relative to t

    def __post_init__(self):
        check_range("k_cls", self.k_cls, 0, 100)
        check_range("eval_floor", self.floor, 0, 1)

    def __call__(self, net: Denoiser, ema: Denoiser, pairs: Pairs, null: TextCond, rng: SampleRNG) -> Tensor:
        """What is added to the velocity (T, d), without gradient; zero for rows whose prompt was dropped.

        Args:
            null: of the J rows.
            rng: of the J rows.
        """
        x_t, t, s = pairs.x_t, pairs.t, pairs.s
        x_s = x_t.tokens - flow.per_token(t - s, x_t) * pairs.predicted.detach()

        # Noise of a higher level, where the state is below the floor; at s = 1 nothing of it is left.
        level = torch.maximum(s, self.floor * t)
        scale = (1 - level) / (1 - s).clamp_min(torch.finfo(s.dtype).tiny)
        spread = (level.square() - (scale * s).square()).clamp_min(0).sqrt()
        noise = rng.normal_like("renoise", x_t)
        x_e = x_t.with_tokens(flow.per_token(scale, x_t) * x_s + flow.per_token(spread, x_t) * noise)

        with torch.no_grad():
            v_null = net(x_e, level, level, null)
            v_cond = ema(x_e, level, level, pairs.cond)
        weight = self.k_cls * flow.self_weight(t, level) * level / t.clamp_min(torch.finfo(t.dtype).tiny) * pairs.kept
        return flow.per_token(weight, x_t) * (v_cond - v_null)


@dataclass(frozen=True)
class AdaptiveWeight:
    """Divides squared errors by (error + offset)^power, without gradient through the divisor.

    As the weight of a row depends on its own noise, a power above 0 moves what is learned away from the mean: with it,
    the true flow map is only nearly a fixed point.
    """

    power: float = 0.0  # 0 changes nothing
    offset: float = 1.0

    def __post_init__(self):
        check_range("adaptive_power", self.power, 0, 2)
        check_range("adaptive_offset", self.offset, 1e-12, 1e6)

    def __call__(self, error: Tensor, num_values: Tensor | int = 1) -> Tensor:
        """The loss (B,) from errors (B,), which are means of `num_values` values if the offset is that of a sum."""
        return error / (error.detach() + self.offset / num_values) ** self.power if self.power else error


@dataclass(frozen=True)
class Pairs:
    """The J rows of a micro-batch with s < t."""

    x_t: Packed
    t: Tensor  # (J,)
    s: Tensor  # (J,)
    cond: TextCond
    kept: Tensor  # (J,) which rows have their prompt
    predicted: Tensor  # V(x_t, t, s) (T, d), with gradient
    v: Tensor  # velocity of the data (T, d)
    velocity: Tensor  # the same with guidance (T, d)
    v_cond: Tensor | None  # V(x_t, t, t) (T, d), without gradient, if it was computed


class FlowMap(FlowMatching):
    """Flow matching for rows with s = t, and the error that a subclass defines for rows with s < t.

    In validation it is flow matching for all rows, comparable with other runs.
    """

    flow_map = True  # samplers have to follow it, see `selfe.system.check_sampling`
    s_equals_t = False
    passes = ("flow map", "flow map, further passes", "targets")

    def __init__(
        self,
        p_drop: float,
        p_equal: float,
        p_zero: float,
        s_rule: SRule,
        t_mean: float,
        t_std: float,
        t_distribution: flow.TimeDistribution,
        t_warp: tuple[float, float],
        guidance: Guidance,
        adaptive: AdaptiveWeight = AdaptiveWeight(),
        end_score: EndScore = EndScore(),
    ):
        super().__init__(p_drop, t_std, t_mean, t_distribution, t_warp)
        self.pair_times = PairTimes(self.times, p_equal, p_zero, s_rule)
        self.share = share_of_pairs(p_equal)
        self.batch_multiple = self.share.denominator
        self.guidance, self.adaptive, self.end_score = guidance, adaptive, end_score

    def phase(self, step: int) -> str:
        if not self.share:
            return "flow matching"
        return "flow map and self-evaluation" if self.end_score.k_cls else "flow map"

    def captions(self, prompts: Sequence[str], rng: SampleRNG, step: int, drop: bool = True) -> dict[str, list[str]]:
        captions = super().captions(prompts, rng, step, drop)
        without = self.guidance.scale == 1 and not self.end_score.k_cls
        return captions if without else captions | {"null": [""] * len(prompts)}

    def kept(self, rng: SampleRNG, like: Tensor) -> Tensor:
        """(B,) which rows have their prompt, on the device of `like`."""
        return to_device(torch.tensor([not drop for drop in flow.dropped(rng, self.p_drop)]), like.device)

    def __call__(
        self, net: Denoiser, ema: Denoiser, x0: Packed, conds: dict[str, TextCond], rng: SampleRNG, step: int
    ) -> Loss:
        if not torch.is_grad_enabled():
            return super().__call__(net, ema, x0, conds, rng, step)

        # Sample noise and times, then interpolate.
        rows = spread_rows(self.share, len(x0))
        noise = rng.normal_like("noise", x0)
        index = to_device(torch.tensor(rows, dtype=torch.int64), noise.device)
        t, s = self.pair_times.draw(rng, x0, index)
        x_t = x0.with_tokens(flow.interpolate(x0.tokens, noise, t, x0))

        # Rows with s = t regress the velocity, with guidance if it is built in.
        v = noise - x0.tokens
        guide = {"live": net, "ema": ema}[self.guidance.weights]
        kept = self.kept(rng, t)
        velocity, v_cond = self.guidance.velocity(guide, x_t, t, conds, v, kept)
        predicted = self.prediction(net, x_t, t, s, conds, kept)
        error = flow.mean_per_sample((predicted - velocity).square(), x0)
        loss = self.weighted(error, x0, t)
        metrics = {"data_loss": flow.mean_per_sample((predicted - v).detach().square(), x0)}
        if not rows:
            return Loss(loss, metrics, t, s)

        # Rows with s < t regress the target of the flow map.
        def of_pairs(tokens: Tensor) -> Tensor:
            return x0.with_tokens(tokens).select(rows).tokens

        pairs = Pairs(
            x_t.select(rows),
            t[index],
            s[index],
            conds["cond"].select(rows),
            kept[index],
            of_pairs(predicted),
            of_pairs(v),
            of_pairs(velocity),
            None if v_cond is None else of_pairs(v_cond),
        )
        if self.end_score.k_cls:
            score = self.end_score(net, ema, pairs, conds["null"].select(rows), rng.select(rows))
            pairs = replace(pairs, velocity=pairs.velocity + score)
            metrics["score"] = flow.mean_per_sample(score.square(), pairs.x_t)
        pair_error = flow.mean_per_sample(self.error(net, pairs, step).square(), pairs.x_t)
        loss = self.combined(loss, self.weighted_pairs(pair_error, pairs, step), index)
        return Loss(loss, metrics | {"map_loss": pair_error.detach()}, t, s, tuple(rows))

    def prediction(
        self, net: Denoiser, x_t: Packed, t: Tensor, s: Tensor, conds: dict[str, TextCond], kept: Tensor
    ) -> Tensor:
        """What is regressed (T, d); `kept` (B,) are the rows that have their prompt."""
        return net(x_t, t, s, conds["cond"])

    def error(self, net: Denoiser, pairs: Pairs, step: int) -> Tensor:
        """Prediction minus target (T, d) of the rows with s < t; the gradient goes through `pairs.predicted` alone."""
        raise NotImplementedError

    def weighted(self, error: Tensor, like: Packed, t: Tensor) -> Tensor:
        """The loss (B,) of rows with s = t from their mean squared errors (B,)."""
        return self.adaptive(error)

    def weighted_pairs(self, error: Tensor, pairs: Pairs, step: int) -> Tensor:
        """The loss (J,) of rows with s < t from their mean squared errors (J,)."""
        return self.weighted(error, pairs.x_t, pairs.t)

    def combined(self, loss: Tensor, pair_loss: Tensor, index: Tensor) -> Tensor:
        """The loss (B,) of all rows, of which the rows `index` have s < t and `pair_loss` (J,)."""
        return loss.index_copy(0, index, pair_loss)


def time_derivative(
    net: Denoiser, x_t: Packed, t: Tensor, s: Tensor, cond: TextCond, tangent: Tensor, width: float
) -> Tensor:
    """d/dt V(x_t, t, s) where x_t moves by `tangent` (T, d), without gradient: a central difference over 2 x `width`.

    Forward-mode differentiation needs formulas that the fused attention kernels and the packed layers do not have. A
    difference is made of ordinary calls of the network, so it runs with every kernel, sharded, recomputed or compiled.
    Both calls are one, with twice the rows. It ends at time 1, and at s, below which the network is never trained; as
    it is multiplied by t - s, the error of the target is of second order in `width` there too.
    """
    after, before = (t + width).clamp_max(1), torch.maximum(t - width, s)
    both = torch.cat([x_t.tokens + flow.per_token(time - t, x_t) * tangent for time in (after, before)])
    rows = [*range(len(x_t)), *range(len(x_t))]
    with torch.no_grad():
        times = torch.cat([after, before]), torch.cat([s, s])
        outputs = net(packed(both, x_t.grids + x_t.grids), *times, cond.select(rows))
    upper, lower = outputs.chunk(2)

    # no difference where no time is left, at s = t = 1
    span = after - before
    return torch.where(flow.per_token(span > 0, x_t), (upper - lower) / flow.per_token(span.clamp_min(1e-30), x_t), 0)


def after_step(net: Denoiser, pairs: Pairs, ratio: float) -> Tensor:
    """V(x_m, m, s) (T, d) without gradient: m = t - ratio (t - s), and x_m = x_t - (t - m) velocity."""
    x_t, step = pairs.x_t, ratio * (pairs.t - pairs.s)
    x_m = x_t.with_tokens(x_t.tokens - flow.per_token(step, x_t) * pairs.velocity)
    with torch.no_grad():
        return net(x_m, pairs.t - step, pairs.s, pairs.cond)
