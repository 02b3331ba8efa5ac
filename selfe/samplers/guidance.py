"""Energy-preserving classifier-free guidance (arXiv 2412.09966)."""

from __future__ import annotations

import torch
from torch import Tensor

from selfe import flow
from selfe.protocols import Denoiser, GuidedDenoiser
from selfe.types import Packed, TextCond, packed


def guided(net: Denoiser, cond: TextCond, null: TextCond, cfg_scale: float) -> GuidedDenoiser:
    """Guided velocity v_null + cfg_scale (v_cond - v_null), rescaled per sample to the L2 norm of v_cond.

    Both velocities are computed in one packed call. With `cfg_scale` 1 the unconditional half is skipped.
    """
    if cfg_scale == 1:
        return lambda x, t, s: net(x, t, s, cond)

    both = TextCond(concat(cond.text, null.text), torch.cat([cond.pooled, null.pooled]))

    def denoise(x: Packed, t: Tensor, s: Tensor) -> Tensor:
        v_cond, v_null = net(concat(x, x), t.repeat(2), s.repeat(2), both).chunk(2)
        return flow.rescale(v_null + cfg_scale * (v_cond - v_null), v_cond, x)

    return denoise


def concat(a: Packed, b: Packed) -> Packed:
    """Concatenate packed sequences: those of a, then those of b."""
    return packed(torch.cat([a.tokens, b.tokens]), a.grids + b.grids)
