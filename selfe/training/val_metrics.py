"""Validation metrics beside the losses of the objective."""

from __future__ import annotations

import torch
from torch import Tensor

from selfe import flow
from selfe.protocols import Denoiser
from selfe.rng import SampleRNG
from selfe.system import System
from selfe.types import Batch, check_range


class LossAtTimes:
    """Flow matching loss (Eq. 3) at fixed times: shows where between data and noise a model is better."""

    def __init__(self, times: tuple[float, ...] = (0.1, 0.5, 0.9)):
        """
        Args:
            times: values of t = s, each logged as `loss_at_t`.
        """
        if not times:
            raise ValueError("times: the list is empty")
        check_range("times", times, 0, 1)
        self.times = times

    def __call__(self, system: System, net: Denoiser, batch: Batch, rng: SampleRNG, step: int) -> dict[str, Tensor]:
        cond = system.encode({"cond": list(batch.prompts)})["cond"]
        x0 = system.autoencoder.encode(batch.images, rng)
        noise = rng.normal_like("noise", x0)

        losses = {}
        for time in self.times:
            t = torch.full((len(x0),), time, dtype=x0.tokens.dtype, device=x0.tokens.device)
            v = net(x0.with_tokens(flow.interpolate(x0.tokens, noise, t, x0)), t, t, cond)
            losses[f"loss_at_{time:g}"] = flow.mean_per_sample((v - (noise - x0.tokens)).square(), x0)
        return losses
