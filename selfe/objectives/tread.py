"""TREAD: some image tokens skip a range of blocks during training (arXiv 2501.04765), around any objective."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from selfe.objectives.heads import layer_width
from selfe.objectives.wrapper import Wrapper
from selfe.protocols import Backbone, Denoiser, Objective
from selfe.rng import SampleRNG, philox
from selfe.types import Loss, Packed, Route, TextCond, check_range


class Tread(Wrapper):
    """TREAD around an objective: routes its passes with gradient over all samples of a batch.

    Passes without gradient (self-evaluation, validation) and the auxiliary pass of Self-E, which has only some of the
    samples, see all tokens, as sampling does.
    """

    def __init__(self, objective: Objective, first: str, last: str, skip: float = 0.5):
        """
        Args:
            objective: the objective whose passes are routed.
            first: first block that tokens skip, such as double_blocks.2.
            last: last block that tokens skip, such as single_blocks.11; at its end they join the others again.
            skip: share of the image tokens of each image that skip these blocks.
        """
        super().__init__(objective)
        check_range("skip", skip, 0, 0.99)
        if getattr(objective, "repeats_samples", False):
            name = type(objective).__name__
            raise ValueError(f"objective: {name} has each sample twice in a pass, which TREAD does not route")
        self.first, self.last, self.skip = first, last, skip

    def prepare(self, backbone: Backbone) -> None:
        super().prepare(backbone)
        for name in (self.first, self.last):
            layer_width(backbone, name)
        names = list(backbone.feature_widths)
        if names.index(self.first) > names.index(self.last):
            raise ValueError(f"objective: first block {self.first} comes after last block {self.last}; exchange them")

    def __call__(
        self,
        net: Denoiser,
        ema: Denoiser,
        x0: Packed,
        conds: dict[str, TextCond],
        rng: SampleRNG,
        step: int,
        features: Packed | None = None,
    ) -> Loss:
        route = Route(self.first, self.last, choose_tokens(x0, rng, self.skip)) if torch.is_grad_enabled() else None

        def routed(
            x_t: Packed, t: Tensor, s: Tensor, cond: TextCond, names: Sequence[str] = ()
        ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
            all_samples = len(x_t) == len(x0)
            return net(x_t, t, s, cond, names, route if torch.is_grad_enabled() and all_samples else None)

        return self.inner_loss(routed, ema, x0, conds, rng, step, features=features)


def choose_tokens(x0: Packed, rng: SampleRNG, skip: float) -> tuple[Tensor, ...]:
    """Ascending indices of the tokens of each image that do not skip, a function of (seed, step, sample)."""
    kept = []
    for key, num_tokens in zip(rng.keys, x0.lens, strict=True):
        order = philox(*key, "route").permutation(num_tokens)
        kept.append(torch.from_numpy(order[int(num_tokens * skip) :]).sort().values)
    return tuple(kept)
