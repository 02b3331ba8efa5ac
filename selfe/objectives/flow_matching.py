"""Conditional flow matching (Eq. 3, 7): the baseline, equal to Self-E with s = t for every sample."""

from __future__ import annotations

from collections.abc import Sequence

from selfe import flow
from selfe.protocols import Denoiser
from selfe.rng import SampleRNG
from selfe.types import Loss, Packed, TextCond, check_range


class FlowMatching:
    """E || v - (noise - x0) ||^2 with prompt dropout for classifier-free guidance."""

    batch_multiple = 1
    s_equals_t = True  # images are sampled with s_ratio 1, see `selfe.system.check_sampling`

    def __init__(
        self,
        p_drop: float = 0.1,
        t_std: float = 1.0,
        t_mean: float = 0.0,
        t_distribution: flow.TimeDistribution = "logit-normal",
        t_warp: tuple[float, float] = flow.WARP,
        loss_weight: flow.LossWeight = "velocity",
    ):
        """
        Args:
            p_drop: probability of replacing a prompt by the null prompt.
            t_std: standard deviation of the logit of the training times.
            t_mean: mean of the logit of the training times; positive values draw more times close to 1.
            t_distribution: of the training times, before they are warped.
            t_warp: mu of the warp of the training times at 512 and at 4096 image tokens; [0, 0] is none. Sampling keeps
                the paper's.
            loss_weight: whose squared error the loss is. Relative to velocity, x0 has the weight t^2, noise (1 - t)^2.
        """
        check_range("p_drop", p_drop, 0, 1)
        self.p_drop, self.loss_weight = p_drop, loss_weight
        self.times = flow.TrainingTimes(t_distribution, t_mean, t_std, t_warp)

    def phase(self, step: int) -> str:
        return "flow matching"

    def captions(self, prompts: Sequence[str], rng: SampleRNG, step: int, drop: bool = True) -> dict[str, list[str]]:
        return {"cond": flow.drop_prompts(prompts, rng, self.p_drop) if drop else list(prompts)}

    def __call__(
        self, net: Denoiser, ema: Denoiser, x0: Packed, conds: dict[str, TextCond], rng: SampleRNG, step: int
    ) -> Loss:
        # Sample noise and times, then interpolate (Eq. 1).
        noise = rng.normal_like("noise", x0)
        t = flow.draw_t(rng, x0, self.times)
        x_t = x0.with_tokens(flow.interpolate(x0.tokens, noise, t, x0))

        # Regress the velocity. With s = t the secondary time is inactive.
        v = net(x_t, t, t, conds["cond"])
        loss = flow.mean_per_sample((v - (noise - x0.tokens)).square(), x0)
        return Loss(loss * flow.loss_weight(self.loss_weight, t), {"data_loss": loss.detach()}, t, t)
