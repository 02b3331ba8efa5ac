"""Conditional flow matching: the baseline, and what Self-E becomes when every sample has s = t (Eq. 3, 7)."""

from __future__ import annotations

from collections.abc import Sequence

from selfe import flow
from selfe.draws import Draws
from selfe.types import Denoiser, Loss, Packed, TextCond


class FlowMatching:
    """E || v - (noise - x0) ||^2 with classifier-free prompt dropout."""

    batch_multiple = 1

    def __init__(self, p_drop: float = 0.1, t_std: float = 1.0):
        if not 0 <= p_drop <= 1:
            raise ValueError(f"p_drop is a probability in [0, 1], got {p_drop}")
        self.p_drop, self.t_std = p_drop, t_std

    def captions(self, prompts: Sequence[str], draws: Draws, step: int) -> dict[str, list[str]]:
        return {"cond": flow.drop_prompts(prompts, draws, self.p_drop)}

    def __call__(
        self, net: Denoiser, ema: Denoiser, x0: Packed, conds: dict[str, TextCond], draws: Draws, step: int
    ) -> Loss:
        noise = draws.normal_like("noise", x0)
        t = flow.draw_t(draws, x0, self.t_std)
        x_t = x0.with_tokens(flow.interpolate(x0.tokens, noise, t, x0))
        v = net(x_t, t, t, conds["cond"])
        loss = flow.mean_per_sample((v - (noise - x0.tokens)).square(), x0)
        return Loss(loss, {"data_loss": loss.detach()}, t, t)
