"""What a YAML file describes: denoiser, frozen encoders and objective behind two doors, `loss` and `generate`.

Both doors take the denoiser to use as an argument, because the trainer owns two of them (live and EMA).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from selfe import flow
from selfe.draws import Draws
from selfe.samplers.guidance import guided
from selfe.types import (
    Autoencoder,
    Backbone,
    Batch,
    Data,
    Denoiser,
    Loss,
    Objective,
    Place,
    Sampler,
    TextCond,
    TextEncoder,
    UserError,
)


class System:
    def __init__(self, backbone: Backbone, text_encoder: TextEncoder, autoencoder: Autoencoder, objective: Objective):
        for name, given, wanted in (
            ("text_dim", text_encoder.text_dim, backbone.text_dim),
            ("pooled_dim", text_encoder.pooled_dim, backbone.pooled_dim),
            ("patch_dim", autoencoder.token_dim, backbone.patch_dim),
        ):
            if given != wanted:
                raise ValueError(f"backbone has {name} {wanted}, but its encoder gives {given}; make them equal")
        self.backbone, self.text_encoder, self.autoencoder = backbone, text_encoder, autoencoder
        self.objective = objective

    def load_encoders(self, device: torch.device, shard: Place | None = None) -> None:
        """Bring the weights of the frozen parts to the device. The denoiser's come from training or a checkpoint.

        With `shard`, the text encoder is cut over ranks; every rank must then call `loss` and `generate` alike.
        """
        self.text_encoder.load(device, shard)
        self.autoencoder.load(device)

    def check_data(self, data: Data) -> None:
        """Raise UserError if pictures of this data cannot be encoded."""
        if data.multiple % self.autoencoder.multiple:
            raise UserError(
                f"data: sides of pictures are multiples of {data.multiple}, but system.autoencoder takes multiples of "
                f"{self.autoencoder.multiple}; make the one a multiple of the other"
            )

    def loss(self, net: Denoiser, ema: Denoiser, batch: Batch, draws: Draws, step: int) -> Loss:
        """The objective on one micro-batch: captions and pictures in, one loss per sample out."""
        conds = self.encode(self.objective.captions(batch.prompts, draws, step))
        x0 = self.autoencoder.encode(batch.images, draws)
        expect_finite(flow.sum_per_sample(x0.tokens, x0), batch.names, "system.autoencoder", HALF)
        return self.objective(net, ema, x0, conds, draws, step)

    @torch.no_grad()
    def generate(
        self,
        net: Denoiser,
        prompts: Sequence[str],
        sizes: Sequence[tuple[int, int]],
        draws: Draws,
        *,
        sampler: Sampler,
        num_steps: int,
        cfg_scale: float,
        s_ratio: float,
        negative_prompts: Sequence[str] | None = None,
    ) -> list[Tensor]:
        """Pictures B x (3, height, width) in [-1, 1] for B prompts and B sizes in pixels; `num_steps` network calls.

        Negative prompts take the place of the null prompt in guidance.
        """
        conds = self.encode({"cond": list(prompts), "null": list(negative_prompts or [""] * len(prompts))})
        noise = self.autoencoder.noise(sizes, draws)
        t, s = flow.sampling_times(num_steps, s_ratio, noise)
        x0 = sampler(guided(net, conds["cond"], conds["null"], cfg_scale), noise, t, s, draws)
        expect_finite(flow.sum_per_sample(x0, noise), prompts, "the denoiser", "use an earlier checkpoint")
        images = self.autoencoder.decode(noise.with_tokens(x0))
        expect_finite(torch.stack([image.sum() for image in images]), prompts, "system.autoencoder", HALF)
        return images

    def encode(self, captions: dict[str, list[str]]) -> dict[str, TextCond]:
        """Each distinct caption through the text encoder once, then dealt to where it is wanted."""
        number = {caption: i for i, caption in enumerate(dict.fromkeys(chain(*captions.values())))}
        cond = self.text_encoder(list(number))
        sums = flow.sum_per_sample(cond.text.tokens, cond.text) + cond.pooled.sum(dim=1)
        expect_finite(sums, list(number), "system.text_encoder", HALF)
        return {name: cond.select([number[caption] for caption in wanted]) for name, wanted in captions.items()}


HALF = "set its params.dtype=fp32, and if that does not help, fetch its weights again"


def expect_finite(sums: Tensor, names: Sequence[str], part: str, remedy: str) -> None:
    """Numbers that overflow are silent and make black pictures: say whose. `sums` (B,) of what came out of a part."""
    if not sums.is_meta and not sums.isfinite().all():
        name = names[sums.isfinite().tolist().index(False)]
        raise UserError(f"{name}: {part} gives infinite or undefined numbers; {remedy}")
