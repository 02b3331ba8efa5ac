"""Energy-preserving classifier-free guidance (arXiv 2412.09966)."""

from __future__ import annotations

import torch
from torch import Tensor

from selfe import flow
from selfe.protocols import Denoiser, GuidedDenoiser
from selfe.types import Packed, TextCond, packed

Interval = tuple[float, float]  # of times before the warp, which are uniform: 1 is noise, 0 is data
EDGE = 1e-4  # by which an interval is larger, because times are rounded; steps are at least 1e-3 apart


def is_inside(time: float, interval: Interval | None) -> bool:
    """Whether guidance applies at a uniform time; None: at all times."""
    return interval is None or interval[0] - EDGE <= time <= interval[1] + EDGE


def guided(
    net: Denoiser, cond: TextCond, null: TextCond, cfg_scale: float, interval: Interval | None = None
) -> GuidedDenoiser:
    """Guided velocity v_null + cfg_scale (v_cond - v_null), rescaled per sample to the L2 norm of v_cond.

    Both velocities are computed in one packed call. With `cfg_scale` 1, and outside of the interval (arXiv 2404.07724),
    the unconditional half is skipped. With an interval, every call waits for the device.
    """
    if cfg_scale == 1:
        return lambda x, t, s: net(x, t, s, cond)

    both = TextCond(concat(cond.text, null.text), torch.cat([cond.pooled, null.pooled]))

    def denoise(x: Packed, t: Tensor, s: Tensor) -> Tensor:
        # all samples are at the same uniform time, so that one of them decides
        if interval is not None and not is_inside(flow.unwarp(t[:1].double(), x.lens[0]).item(), interval):
            return net(x, t, s, cond)

        v_cond, v_null = net(concat(x, x), t.repeat(2), s.repeat(2), both).chunk(2)
        return flow.rescale(v_null + cfg_scale * (v_cond - v_null), v_cond, x)

    return denoise


def concat(a: Packed, b: Packed) -> Packed:
    """Concatenate packed sequences: those of a, then those of b."""
    return packed(torch.cat([a.tokens, b.tokens]), a.grids + b.grids)
