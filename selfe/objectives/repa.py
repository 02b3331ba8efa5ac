"""REPA and iREPA: a layer of the denoiser is aligned with the features of a vision encoder, around any objective.

REPA (arXiv 2410.06940) adds -mean cos(head(h), y) over the tokens of an image, where h is the output of a block at x_t
and y are the features of the clean image. iREPA (arXiv 2512.10794) projects by a convolution and normalises y over the
tokens of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from selfe import flow
from selfe.errors import UserError
from selfe.objectives.heads import ConvHead, MlpHead, layer_width
from selfe.objectives.wrapper import Wrapper
from selfe.protocols import Backbone, Denoiser, ImageEncoder, Objective
from selfe.rng import SampleRNG
from selfe.types import MOST_STEPS, MOST_WIDTH, Loss, Packed, TextCond, check_range

HEAD = "repa"  # name of the head


class Repa(Wrapper):
    """REPA or iREPA around an objective: aligns the first pass with gradient of each step.

    The validation loss is that of the objective alone. The features come from the cache that `selfe precompute` writes;
    the encoder itself runs only there.
    """

    wants_features = True

    def __init__(
        self,
        objective: Objective,
        encoder: ImageEncoder,
        layer: str,
        weight: float = 0.5,
        head: Literal["mlp", "conv"] = "mlp",
        hidden: int = 2048,
        spatial_norm: float | None = None,
        stop_step: int | None = None,
    ):
        """
        Args:
            objective: the objective to which the alignment is added.
            encoder: the vision encoder whose features are stored.
            layer: block of the denoiser that is aligned, such as double_blocks.3.
            weight: weight of the alignment.
            head: projection of the layer: three linear layers (REPA) or a convolution of 3 x 3 tokens (iREPA).
            hidden: width of the hidden layers of the head `mlp`.
            spatial_norm: subtract this share of the mean over the tokens of an image from its features, and divide by
                their standard deviation (iREPA); null for none (REPA).
            stop_step: first step without alignment; null for none.
        """
        super().__init__(objective)
        check_range("weight", weight, 0, 100)
        check_range("hidden", hidden, 1, MOST_WIDTH)
        check_range("spatial_norm", spatial_norm, 0, 1)
        check_range("stop_step", stop_step, 0, MOST_STEPS)
        if getattr(objective, "wants_features", False):
            raise ValueError("objective: already aligned with image features; use one Repa")
        self.encoder, self.layer, self.weight, self.head = encoder, layer, weight, head
        self.hidden, self.spatial_norm, self.stop_step = hidden, spatial_norm, stop_step

    @property
    def feature_encoder(self) -> ImageEncoder:
        return self.encoder

    def prepare(self, backbone: Backbone) -> None:
        super().prepare(backbone)
        width, out = layer_width(backbone, self.layer), self.encoder.feature_dim
        head = MlpHead(width, self.hidden, out) if self.head == "mlp" else ConvHead(width, out)
        backbone.add_head(HEAD, self.layer, head)

    def is_active(self, step: int) -> bool:
        return self.stop_step is None or step < self.stop_step

    def phase(self, step: int) -> str:
        return super().phase(step) + " with REPA" * self.is_active(step)

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
        if not torch.is_grad_enabled() or not self.is_active(step):
            return self.inner_loss(net, ema, x0, conds, rng, step, features=features)
        if features is None:
            raise UserError("system.objective: no stored image features; train from the config of selfe precompute")

        projected = None

        def aligned(
            x_t: Packed, t: Tensor, s: Tensor, cond: TextCond, names: Sequence[str] = (), *options
        ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
            nonlocal projected
            if projected is not None or not torch.is_grad_enabled():
                return net(x_t, t, s, cond, names, *options)
            v, outputs = net(x_t, t, s, cond, (*names, HEAD), *options)
            projected = outputs.pop(HEAD)
            return (v, outputs) if names else v

        loss = self.inner_loss(aligned, ema, x0, conds, rng, step, features=features)
        target = features if self.spatial_norm is None else normalise(features, self.spatial_norm)
        cosine = F.cosine_similarity(projected.to(target.tokens.dtype), target.tokens, dim=-1)
        cosine = flow.mean_per_sample(cosine[:, None], x0)
        metrics = loss.metrics | {"repa_cosine": cosine.detach()}
        return replace(loss, per_sample=loss.per_sample - self.weight * cosine, metrics=metrics)


def normalise(features: Packed, gamma: float) -> Packed:
    """Subtract gamma times the mean over the tokens of each image, per channel, and divide by the deviation."""
    images = []
    for image in features.split():
        centred = image - gamma * image.mean(dim=0)
        images.append(centred / (image.std(dim=0, correction=0) + 1e-6))
    return features.with_tokens(torch.cat(images))
