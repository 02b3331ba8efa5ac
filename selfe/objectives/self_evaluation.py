"""The Self-E objective: learn from data, and from one's own judgement of one's few-step samples (arXiv 2512.22374).

Half of the samples have s = t and learn flow matching. The other half has s < t: their prediction x0_hat is noised
again to level s, the network's own scores judge it there, and the verdict moves the regression target from the data
towards x0_hat - delta the further the step reaches. Losses are written for velocities: the paper's x0 loss with its
weight 1/t^2 (S.2), finite at t = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import floor, inf
from typing import Literal

import torch
from torch import Tensor

from selfe import flow
from selfe.device import to_device
from selfe.draws import Draws
from selfe.types import Denoiser, Loss, Packed, TextCond

FAKE = "fake image "  # prepended to a prompt, names the network's own samples (S.1.2)


class SelfEvaluation:
    """Eq. 13-21 with the paper's constants. `p_equal=1` is flow matching, to the bit.

    Training times spread by `t_std` (`flow.draw_t`); a larger one shows a short run more of those close to 1. Steps
    count from 0: before `start_step` plain flow matching; from there tau grows from 0 to 1 over `tau_steps`; from
    `aux_start_step` (None: never) the auxiliary term joins. `k_cls` weighs the classifier score; in the auxiliary phase
    `aux_k_cls` and `aux_k_fake` weigh it and the fake score (s.6, k and 1 - k).
    """

    def __init__(
        self,
        p_drop: float = 0.1,
        p_equal: float = 0.5,
        t_std: float = 1.0,
        start_step: int = 0,
        tau_steps: int = 300_000,
        cond_weights: Literal["ema", "live"] = "ema",
        null_weights: Literal["ema", "live"] = "live",
        k_cls: float = 1.0,
        aux_start_step: int | None = 550_000,
        aux_k_cls: float = 0.9,
        aux_k_fake: float = 0.1,
        aux_loss_weight: float = 1.0,
        energy_preserving: bool = True,
        lam_max: float = inf,
        eval_floor: float = 0.0,
    ):
        for name, value in {"p_drop": p_drop, "p_equal": p_equal, "eval_floor": eval_floor}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} lies in [0, 1], got {value}")
        if tau_steps < 1 or lam_max < 0 or t_std < 0:
            raise ValueError(
                f"tau_steps is at least 1, lam_max and t_std at least 0, got {tau_steps}, {lam_max} and {t_std}"
            )
        self.p_drop, self.t_std = p_drop, t_std
        self.share = Fraction(1 - p_equal).limit_denominator(64)
        if abs(self.share - (1 - p_equal)) > 1e-3 or (self.share == 0) != (p_equal == 1):
            raise ValueError(f"p_equal is a fraction with a denominator of 64 at most, such as 0.5, got {p_equal}")
        self.batch_multiple = self.share.denominator
        self.start_step, self.tau_steps = start_step, tau_steps
        self.cond_weights, self.null_weights = cond_weights, null_weights
        self.k_cls, self.aux_start_step = k_cls, aux_start_step
        self.aux_k_cls, self.aux_k_fake, self.aux_loss_weight = aux_k_cls, aux_k_fake, aux_loss_weight
        self.energy_preserving, self.lam_max, self.eval_floor = energy_preserving, lam_max, eval_floor

    def tau(self, step: int) -> float:
        """How far s may lie below t: s ~ U((1 - tau) t, t) (S.2)."""
        return min(max(step - self.start_step, 0) / self.tau_steps, 1.0)

    def auxiliary(self, step: int) -> bool:
        return self.aux_start_step is not None and step >= self.aux_start_step and self.tau(step) > 0

    def judged_rows(self, batch_size: int, step: int) -> list[int]:
        """The rows with s < t: an even share of the batch, by place and never by chance, the same on every rank."""
        share = self.share if self.tau(step) > 0 else Fraction(0)
        return [i for i in range(batch_size) if floor((i + 1) * share) > floor(i * share)]

    def captions(self, prompts: Sequence[str], draws: Draws, step: int) -> dict[str, list[str]]:
        captions = {"cond": flow.drop_prompts(prompts, draws, self.p_drop)}
        rows = self.judged_rows(len(prompts), step)
        if rows:
            captions["null"] = [""] * len(rows)
        if rows and self.auxiliary(step):
            captions["fake"] = [FAKE + captions["cond"][r] for r in rows]
        return captions

    def __call__(
        self, net: Denoiser, ema: Denoiser, x0: Packed, conds: dict[str, TextCond], draws: Draws, step: int
    ) -> Loss:
        rows = self.judged_rows(len(x0), step)
        noise = draws.normal_like("noise", x0)
        t = flow.draw_t(draws, x0, self.t_std)
        s = t.clone()
        index = to_device(torch.tensor(rows, dtype=torch.int64), t.device)
        s[index] = (t * (1 - self.tau(step) * draws.uniform("s", like=t)))[index]
        x_t = x0.with_tokens(flow.interpolate(x0.tokens, noise, t, x0))
        v = net(x_t, t, s, conds["cond"])

        data_loss = flow.mean_per_sample((v - (noise - x0.tokens)).square(), x0)
        metrics = {"data_loss": data_loss.detach()}
        if not rows:
            return Loss(data_loss, metrics, t, s)

        def judged(tokens: Tensor) -> Packed:
            return x0.with_tokens(tokens).select(rows)

        x0_hat = judged(flow.predict_x0(x_t.tokens, v.detach(), t, x0))
        t_judged, s_judged = t[index], torch.maximum(s, self.eval_floor * t)[index]
        delta, aux_loss = self.judge(
            net, ema, x0_hat, s_judged, conds | {"cond": conds["cond"].select(rows)}, draws.select(rows), step
        )
        # Without a prompt the scores differ only by EMA lag: such a row keeps the data as its target.
        kept = torch.tensor([not drop for drop in flow.dropped(draws.select(rows), self.p_drop)])
        weight = flow.self_weight(t_judged, s_judged, self.lam_max) * to_device(kept, t.device)
        clean = judged(x0.tokens)
        target, norm_ratio = self.target(clean, x0_hat.tokens - delta, weight)
        # || x0_hat - target ||^2 / t^2, with the division done where it cannot be 0 / 0
        pull = (clean.tokens - target) / flow.per_token(t_judged.clamp_min(torch.finfo(t.dtype).tiny), clean)
        self_loss = flow.mean_per_sample((judged(v).tokens - (judged(noise - x0.tokens).tokens + pull)).square(), clean)
        aux_share = self.aux_loss_weight * len(x0) / len(rows)  # a mean over the judged rows, not over the batch
        loss = data_loss.index_copy(0, index, self_loss).index_add(0, index, aux_share * aux_loss)
        metrics |= {"self_loss": self_loss.detach(), "aux_loss": aux_loss.detach(), "self_weight": weight}
        # how far the target strays in norm, and whether the two terms pull the prediction the same way
        metrics |= {"norm_ratio": norm_ratio, "cosine": flow.cosine(clean.tokens - x0_hat.tokens, -delta, clean)}
        return Loss(loss, metrics, t, s, tuple(rows))

    def judge(
        self,
        net: Denoiser,
        ema: Denoiser,
        x0_hat: Packed,
        s: Tensor,
        conds: dict[str, TextCond],
        draws: Draws,
        step: int,
    ) -> tuple[Tensor, Tensor]:
        """The verdict delta (T, d) on predictions at level s (Eq. 14, s.6) and the fake score's loss (J,) (s.8)."""
        noise = draws.normal_like("renoise", x0_hat)
        x_s = x0_hat.with_tokens(flow.interpolate(x0_hat.tokens, noise, s, x0_hat))
        nets = {"live": net, "ema": ema}
        with torch.no_grad():
            v_null = nets[self.null_weights](x_s, s, s, conds["null"])
            v_cond = nets[self.cond_weights](x_s, s, s, conds["cond"])
        # G(a) - G(b) = -s (v_a - v_b), at the same x_s and s
        if not self.auxiliary(step):
            return -flow.per_token(s, x_s) * self.k_cls * (v_null - v_cond), torch.zeros_like(s)
        v_fake = net(x_s, s, s, conds["fake"])
        aux_loss = flow.mean_per_sample((v_fake - (noise - x0_hat.tokens)).square(), x_s)
        verdict = self.aux_k_cls * (v_null - v_cond) + self.aux_k_fake * (v_fake.detach() - v_cond)
        return -flow.per_token(s, x_s) * verdict, aux_loss

    def target(self, x0: Packed, x_self: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(x0 + lam x_self) / (1 + lam), brought back to the norm of x0 (Eq. 18-19), and how far off it was (J,)."""
        target = torch.lerp(x0.tokens, x_self, flow.per_token(weight, x0))
        ratio = flow.norm_per_sample(target, x0) / flow.norm_per_sample(x0.tokens, x0).clamp_min(1e-20)
        return flow.rescale(target, x0.tokens, x0) if self.energy_preserving else target, ratio
