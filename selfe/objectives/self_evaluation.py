"""The Self-E objective: flow matching combined with self-evaluation of few-step samples (arXiv 2512.22374).

Half of the samples have s = t and are trained with flow matching. For the other half s < t: the prediction x0_hat is
re-noised to level s and evaluated there with the network's own scores. Their difference delta gives the pseudo-target
x0_hat - delta, and the regression target moves from the data to the pseudo-target as the step from t to s grows.

Losses are written in velocity space, which equals the paper's x0 loss with weight 1/t^2 (S.2) and is finite at t = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Literal

import torch
from torch import Tensor

from selfe import flow
from selfe.device import to_device
from selfe.objectives.rows import share_of_pairs, spread_rows
from selfe.protocols import Denoiser
from selfe.rng import SampleRNG
from selfe.types import MOST_STEPS, Loss, Packed, TextCond, check_range

FAKE = "fake image "  # prompt prefix that labels the network's own samples (S.1.2)


class SelfEvaluation:
    """Eq. 13-21 with the paper's constants. `p_equal=1` is bitwise identical to flow matching.

    Steps count from 0. Before `start_step` the objective is plain flow matching, then tau grows linearly from 0 to 1
    over `tau_steps`, and from `aux_start_step` on the auxiliary term is added.
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
        t_mean: float = 0.0,
        t_distribution: flow.TimeDistribution = "logit-normal",
        t_warp: tuple[float, float] = flow.WARP,
        loss_weight: flow.LossWeight = "velocity",
    ):
        """
        Args:
            p_drop: probability of replacing a prompt by the null prompt.
            p_equal: fraction of samples with s = t.
            t_std: standard deviation of the logit of the training times. Larger values sample more times close to 1,
                which helps short runs.
            start_step: first step with self-evaluation.
            tau_steps: steps over which tau is annealed from 0 to 1.
            cond_weights: weights for the conditional evaluation pass.
            null_weights: weights for the unconditional evaluation pass.
            k_cls: weight of the classifier score.
            aux_start_step: first step of the auxiliary phase; null disables it.
            aux_k_cls: weight of the classifier score in the auxiliary phase (k in s.6).
            aux_k_fake: weight of the fake score in the auxiliary phase (1 - k in s.6).
            aux_loss_weight: weight of the auxiliary loss (s.8).
            energy_preserving: rescale each target to the L2 norm of x0 (Eq. 19).
            lam_max: upper bound on lambda (Eq. 17).
            eval_floor: evaluate at max(s, eval_floor * t) instead of s. Not in the paper; 0 disables it.
            t_mean: mean of the logit of the training times; positive values draw more times close to 1.
            t_distribution: of the training times, before they are warped.
            t_warp: mu of the warp of the training times at 512 and at 4096 image tokens; [0, 0] is none. Sampling keeps
                the paper's.
            loss_weight: whose squared error the loss is. Relative to velocity, the paper's, x0 has the weight t^2 and
                noise (1 - t)^2; the auxiliary loss has that of its own time.
        """
        for name, value in {"p_drop": p_drop, "p_equal": p_equal, "eval_floor": eval_floor}.items():
            check_range(name, value, 0, 1)
        for name, value in {"k_cls": k_cls, "aux_k_cls": aux_k_cls, "aux_k_fake": aux_k_fake}.items():
            check_range(name, value, -100, 100)  # negative: evaluation reversed, a control of the miniature
        check_range("aux_loss_weight", aux_loss_weight, 0, 100)
        check_range("start_step", start_step, 0, MOST_STEPS)
        check_range("tau_steps", tau_steps, 1, MOST_STEPS)
        check_range("aux_start_step", aux_start_step, 0, MOST_STEPS)
        check_range("lam_max", lam_max, 0, inf)  # infinite: not bounded, as in the paper
        self.p_drop, self.loss_weight = p_drop, loss_weight
        self.times = flow.TrainingTimes(t_distribution, t_mean, t_std, t_warp)

        self.share = share_of_pairs(p_equal)
        self.s_equals_t = p_equal == 1  # flow matching: the network learns nothing at s < t
        self.batch_multiple = self.share.denominator

        self.start_step, self.tau_steps = start_step, tau_steps
        self.cond_weights, self.null_weights = cond_weights, null_weights
        self.k_cls, self.aux_start_step = k_cls, aux_start_step
        self.aux_k_cls, self.aux_k_fake, self.aux_loss_weight = aux_k_cls, aux_k_fake, aux_loss_weight
        self.energy_preserving, self.lam_max, self.eval_floor = energy_preserving, lam_max, eval_floor

    def tau(self, step: int) -> float:
        """The range of s, annealed from 0 to 1: s ~ U((1 - tau) t, t) (S.2)."""
        return min(max(step - self.start_step, 0) / self.tau_steps, 1.0)

    def auxiliary(self, step: int) -> bool:
        """Whether the auxiliary term is active at this step."""
        return self.aux_start_step is not None and step >= self.aux_start_step and self.tau(step) > 0

    def eval_rows(self, batch_size: int, step: int) -> list[int]:
        """Indices of the rows with s < t, evenly spaced over the batch."""
        return spread_rows(self.share, batch_size) if self.tau(step) > 0 else []

    def phase(self, step: int) -> str:
        """Names the terms of the loss at a step."""
        if self.share == 0 or self.tau(step) == 0:
            return "flow matching"
        return "self-evaluation and auxiliary term" if self.auxiliary(step) else "self-evaluation"

    def captions(self, prompts: Sequence[str], rng: SampleRNG, step: int, drop: bool = True) -> dict[str, list[str]]:
        """Captions to encode: "cond" for all B rows; "null" and, in the auxiliary phase, "fake" for rows with s < t.

        `drop=False` gives them without prompt dropout.
        """
        captions = {"cond": flow.drop_prompts(prompts, rng, self.p_drop) if drop else list(prompts)}
        rows = self.eval_rows(len(prompts), step)
        if rows:
            captions["null"] = [""] * len(rows)
        if rows and self.auxiliary(step):
            captions["fake"] = [FAKE + captions["cond"][r] for r in rows]
        return captions

    def __call__(
        self, net: Denoiser, ema: Denoiser, x0: Packed, conds: dict[str, TextCond], rng: SampleRNG, step: int
    ) -> Loss:
        # Sample noise and times. Rows with s = t are trained with plain flow matching.
        rows = self.eval_rows(len(x0), step)
        noise = rng.normal_like("noise", x0)
        t = flow.draw_t(rng, x0, self.times)
        s = t.clone()
        index = to_device(torch.tensor(rows, dtype=torch.int64), t.device)
        s[index] = (t * (1 - self.tau(step) * rng.uniform("s", like=t)))[index]

        # The only pass with gradient (outside of the auxiliary phase).
        x_t = x0.with_tokens(flow.interpolate(x0.tokens, noise, t, x0))
        v = net(x_t, t, s, conds["cond"])

        # Flow matching loss of all rows; it is final for rows with s = t.
        data_loss = flow.mean_per_sample((v - (noise - x0.tokens)).square(), x0)
        metrics = {"data_loss": data_loss.detach()}
        of_time = flow.loss_weight(self.loss_weight, t)
        if not rows:
            return Loss(data_loss * of_time, metrics, t, s)

        def evaluated(tokens: Tensor) -> Packed:
            return x0.with_tokens(tokens).select(rows)

        # Self-evaluate the predictions of rows with s < t.
        x0_hat = evaluated(flow.predict_x0(x_t.tokens, v.detach(), t, x0))
        t_eval, s_eval = t[index], torch.maximum(s, self.eval_floor * t)[index]
        delta, aux_loss = self.self_evaluate(
            net, ema, x0_hat, s_eval, conds | {"cond": conds["cond"].select(rows)}, rng.select(rows), step
        )

        # Blend data and pseudo-target. For dropped prompts the scores differ only by the EMA lag, so those rows keep
        # the data as target.
        kept = torch.tensor([not drop for drop in flow.dropped(rng.select(rows), self.p_drop)])
        weight = flow.self_weight(t_eval, s_eval, self.lam_max) * to_device(kept, t.device)
        clean = evaluated(x0.tokens)
        target, norm_ratio = self.target(clean, x0_hat.tokens - delta, weight)

        # || x0_hat - target ||^2 / t^2 in velocity space, arranged so that it never divides 0 by 0.
        pull = (clean.tokens - target) / flow.per_token(t_eval.clamp_min(torch.finfo(t.dtype).tiny), clean)
        self_loss = flow.mean_per_sample(
            (evaluated(v).tokens - (evaluated(noise - x0.tokens).tokens + pull)).square(), clean
        )

        # The auxiliary loss is a mean over the evaluated rows, not over the batch.
        aux_share = self.aux_loss_weight * len(x0) / len(rows)
        aux_share = aux_share * flow.loss_weight(self.loss_weight, s_eval)
        loss = of_time * data_loss.index_copy(0, index, self_loss)
        loss = loss.index_add(0, index, aux_share * aux_loss)

        # norm_ratio: norm of the target before rescaling, relative to x0.
        # cosine: whether data and self-evaluation move the prediction in the same direction.
        metrics |= {"self_loss": self_loss.detach(), "aux_loss": aux_loss.detach(), "self_weight": weight}
        metrics |= {"norm_ratio": norm_ratio, "cosine": flow.cosine(clean.tokens - x0_hat.tokens, -delta, clean)}
        return Loss(loss, metrics, t, s, tuple(rows))

    def self_evaluate(
        self,
        net: Denoiser,
        ema: Denoiser,
        x0_hat: Packed,
        s: Tensor,
        conds: dict[str, TextCond],
        rng: SampleRNG,
        step: int,
    ) -> tuple[Tensor, Tensor]:
        """Evaluate predictions x0_hat of J rows at noise level s.

        Returns:
            The score difference delta (T, d) (Eq. 14, s.6) and the auxiliary loss (J,) (s.8), zero outside of the
            auxiliary phase.
        """
        # Re-noise with fresh noise.
        noise = rng.normal_like("renoise", x0_hat)
        x_s = x0_hat.with_tokens(flow.interpolate(x0_hat.tokens, noise, s, x0_hat))

        # Classifier score: unconditional minus conditional, without gradient.
        nets = {"live": net, "ema": ema}
        with torch.no_grad():
            v_null = nets[self.null_weights](x_s, s, s, conds["null"])
            v_cond = nets[self.cond_weights](x_s, s, s, conds["cond"])

        # At the same x_s and s, G(a) - G(b) = -s (v_a - v_b).
        if not self.auxiliary(step):
            return -flow.per_token(s, x_s) * self.k_cls * (v_null - v_cond), torch.zeros_like(s)

        # Auxiliary phase: one more pass with gradient, which also trains the fake score on the network's own samples.
        v_fake = net(x_s, s, s, conds["fake"])
        aux_loss = flow.mean_per_sample((v_fake - (noise - x0_hat.tokens)).square(), x_s)
        v_difference = self.aux_k_cls * (v_null - v_cond) + self.aux_k_fake * (v_fake.detach() - v_cond)
        return -flow.per_token(s, x_s) * v_difference, aux_loss

    def target(self, x0: Packed, x_self: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The effective target (x0 + lam x_self) / (1 + lam), rescaled to the norm of x0 (Eq. 18-19).

        Returns:
            The target (T, d) and the ratio (J,) of its norm before rescaling to that of x0.
        """
        target = torch.lerp(x0.tokens, x_self, flow.per_token(weight, x0))
        ratio = flow.norm_per_sample(target, x0) / flow.norm_per_sample(x0.tokens, x0).clamp_min(1e-20)
        return flow.rescale(target, x0.tokens, x0) if self.energy_preserving else target, ratio
