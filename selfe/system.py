"""Denoiser, frozen encoders and objective behind two methods: `loss` for training, `generate` for sampling.

Both take the denoiser as an argument, because the trainer has two (live and EMA).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from selfe import flow
from selfe.errors import UserError
from selfe.io.feature_cache import AGAIN
from selfe.protocols import Autoencoder, Backbone, Data, Denoiser, Objective, Sampler, ShardLoader, TextEncoder
from selfe.rng import SampleRNG
from selfe.samplers.cost import check_sampler
from selfe.samplers.guidance import Interval, guided
from selfe.types import Batch, FiniteCheck, Loss, Packed, StoredCaptions, TextCond, packed, raise_if_not_finite


class System:
    """The parts of `system:` in a config. Raises ValueError if their dimensions differ."""

    def __init__(self, backbone: Backbone, text_encoder: TextEncoder, autoencoder: Autoencoder, objective: Objective):
        for name, given, wanted in (
            ("text_dim", text_encoder.text_dim, backbone.text_dim),
            ("pooled_dim", text_encoder.pooled_dim, backbone.pooled_dim),
            ("patch_dim", autoencoder.token_dim, backbone.patch_dim),
        ):
            if given != wanted:
                raise ValueError(f"backbone has {name} {wanted}, but its encoder returns {given}; make them equal")
        self.backbone, self.text_encoder, self.autoencoder = backbone, text_encoder, autoencoder
        self.objective = objective
        if hasattr(objective, "prepare"):
            objective.prepare(backbone)

    def load_encoders(self, device: torch.device, shard: ShardLoader | None = None) -> None:
        """Load the weights of the frozen parts. The denoiser's come from training or a checkpoint.

        With `shard`, the text encoder is sharded over ranks; every rank must then make the same calls to `loss` and
        `generate`.
        """
        self.text_encoder.load(device, shard)
        self.autoencoder.load(device)

    def check_data(self, data: Data) -> None:
        """Raise UserError if the autoencoder cannot encode images of this data, or it lacks features of images."""
        if data.multiple % self.autoencoder.multiple:
            raise UserError(
                f"data: image sides are multiples of {data.multiple}, but system.autoencoder needs multiples of "
                f"{self.autoencoder.multiple}; make the first a multiple of the second"
            )
        if not getattr(self.objective, "wants_features", False):
            return

        wanted, stored = self.objective.feature_encoder, getattr(data, "features", None)
        if stored is None:
            raise UserError(
                "system.objective: needs stored image features; run selfe precompute CONFIG --out FOLDER, and train "
                "from the config that it writes"
            )
        if type(stored) is not type(wanted) or stored.output_settings() != wanted.output_settings():
            raise UserError("system.objective: its encoder is not the one of data.params.features; make them equal")

    def check_sampling(self, sampler: Sampler, s_ratio: float) -> None:
        """Raise UserError if sampling needs from the network what the objective does not teach it.

        At `s_ratio` 1 the network gives the velocity at time t, which every objective teaches and every sampler takes.
        Otherwise it has to be trained at s < t, and if it is a flow map, the sampler has to follow it.
        """
        if s_ratio == 1:
            return
        if getattr(self.objective, "s_equals_t", False):
            raise UserError(
                f"s_ratio {s_ratio:g}: system.objective trains with s = t only (flow matching); set s_ratio to 1, in "
                "trainer.samples, trainer.evaluate and inferencer.defaults"
            )
        if not getattr(self.objective, "flow_map", False) or getattr(sampler, "follows_flow_map", False):
            return

        settings = ", ".join(f"{name}: {value}" for name, value in sampler.output_settings().items())
        raise UserError(
            f"sampler {type(sampler).__name__}{f' with {settings}' if settings else ''}: a model that was trained by "
            "the flow map of system.objective is sampled by steps along it; take selfe.samplers.euler.Euler, Renoise "
            "with eta: 0, or s_ratio: 1 (as in flow matching)"
        )

    def loss(self, net: Denoiser, ema: Denoiser, batch: Batch, rng: SampleRNG, step: int) -> Loss:
        """The objective on one micro-batch of images and captions: one loss per sample.

        Does not wait for the device; the caller reads `Loss.checks` with `raise_if_not_finite`.
        """
        captions = self.objective.captions(batch.prompts, rng, step)
        conds, text_check = self.encode_unchecked(captions, batch.text)
        x0 = self.autoencoder.encode(batch.images, rng)
        x0_check = FiniteCheck(flow.sum_per_sample(x0.tokens, x0), batch.names, "system.autoencoder", HALF)

        options = {}
        if getattr(self.objective, "wants_features", False):
            options["features"] = stored_features(batch, x0)
        loss = self.objective(net, ema, x0, conds, rng, step, **options)
        return replace(loss, num_tokens=len(x0.tokens), checks=(text_check, x0_check))

    @torch.no_grad()
    def generate(
        self,
        net: Denoiser,
        prompts: Sequence[str],
        sizes: Sequence[tuple[int, int]],
        rng: SampleRNG,
        *,
        sampler: Sampler,
        num_steps: int,
        cfg_scale: float,
        s_ratio: float,
        guidance_interval: Interval | None = None,
        negative_prompts: Sequence[str] | None = None,
    ) -> list[Tensor]:
        """Generate images B x (3, height, width) in [-1, 1] for B prompts in `num_steps` sampler steps.

        `sizes` are B x (height, width) in pixels. Negative prompts replace the null prompt of guidance, which is
        applied at uniform times in `guidance_interval`.
        Raises UserError if latents or images are non-finite, or the sampler does not suit the objective, ValueError if
        it is not valid for `s_ratio`.
        """
        check_sampler(sampler, s_ratio)
        self.check_sampling(sampler, s_ratio)
        conds = self.encode({"cond": list(prompts), "null": list(negative_prompts or [""] * len(prompts))})

        # Sample latents.
        noise = self.autoencoder.noise(sizes, rng)
        t, s = flow.sampling_times(num_steps, s_ratio, noise)
        denoise = guided(net, conds["cond"], conds["null"], cfg_scale, guidance_interval)
        x0 = sampler(denoise, noise, t, s, rng)
        sums = flow.sum_per_sample(x0, noise)
        raise_if_not_finite([FiniteCheck(sums, tuple(prompts), "the denoiser", "use an earlier checkpoint")])

        images = self.autoencoder.decode(noise.with_tokens(x0))
        sums = torch.stack([image.sum() for image in images])
        raise_if_not_finite([FiniteCheck(sums, tuple(prompts), "system.autoencoder", HALF)])
        return images

    def caption_reader(self, seed: int) -> Callable[[Sequence[str], Sequence[int], int], StoredCaptions] | None:
        """For loader workers: (prompts, positions, step) -> encodings of the captions that `loss` will ask for.

        None unless the text encoder reads them from disk.
        """
        read = getattr(self.text_encoder, "read", None)
        return read and partial(read_captions, self.objective, read, seed)

    def encode(self, captions: dict[str, list[str]]) -> dict[str, TextCond]:
        """Conditioning for lists of captions, by name. Each distinct caption is encoded once.

        Raises UserError if the text encoder returns non-finite values.
        """
        conds, check = self.encode_unchecked(captions)
        raise_if_not_finite([check])
        return conds

    def encode_unchecked(
        self, captions: dict[str, list[str]], stored: StoredCaptions | None = None
    ) -> tuple[dict[str, TextCond], FiniteCheck]:
        """`encode` without waiting for the device; captions that a loader worker has read are in `stored`."""
        index = {caption: i for i, caption in enumerate(distinct(captions))}
        if stored is not None and stored.captions == tuple(index):
            cond = stored.to(self.text_encoder.device)
        else:
            cond = self.text_encoder(list(index))
        sums = flow.sum_per_sample(cond.text.tokens, cond.text) + cond.pooled.sum(dim=1)

        conds = {name: cond.select([index[caption] for caption in wanted]) for name, wanted in captions.items()}
        return conds, FiniteCheck(sums, tuple(index), "system.text_encoder", HALF)


def stored_features(batch: Batch, x0: Packed) -> Packed | None:
    """The image features of a batch on the grids of x0, float32; None if it has none.

    Raises:
        UserError: they were stored for other grids.
    """
    if not batch.features:
        return None
    grids = [tuple(features.shape[:2]) for features in batch.features]
    if grids != list(x0.grids):
        raise UserError(f"{batch.names[0]}: the cache has features of other grids than its latents; {AGAIN}")
    return packed(torch.cat([features.flatten(0, 1) for features in batch.features]).float(), grids)


def distinct(captions: dict[str, list[str]]) -> list[str]:
    """The distinct captions of all lists, by first occurrence."""
    return list(dict.fromkeys(chain(*captions.values())))


def read_captions(
    objective: Objective,
    read: Callable[[Sequence[str]], StoredCaptions],
    seed: int,
    prompts: Sequence[str],
    positions: Sequence[int],
    step: int,
) -> StoredCaptions:
    """The stored encodings of the captions of a training micro-batch; prompt dropout is drawn as in the step."""
    return read(distinct(objective.captions(prompts, SampleRNG.of_step(seed, step, positions), step)))


# how to fix an encoder that overflows in half precision
HALF = "set its params.dtype=fp32, and if that does not help, download its weights again"
