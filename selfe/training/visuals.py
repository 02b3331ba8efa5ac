"""Sample grids generated during training."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from PIL import Image
from torch import nn

from selfe.distributed import collectives
from selfe.distributed.collectives import World
from selfe.io import image_encode
from selfe.io.sampling_limits import check_interval
from selfe.protocols import Sampler
from selfe.rng import SampleRNG
from selfe.samplers.cost import check_sampler
from selfe.samplers.renoise import Renoise
from selfe.system import System
from selfe.types import check_period, check_range

TITLES = {"ema": "EMA weights", "live": "live weights"}


@dataclass(frozen=True)
class SampleGridConfig:
    """Sample grids during training: a row per prompt, a column per number of steps, always from the same noise."""

    every: int | None = 5000  # steps between sample grids; null: none
    prompts: tuple[str, ...] = ()  # a row each; []: no sample grids
    num_steps: tuple[int, ...] = (1, 2, 4, 8)  # numbers of sampling steps, a column each
    size: tuple[int, int] = (256, 256)  # height, width
    cfg_scale: float = 5.0  # guidance; 1 is none
    s_ratio: float = 0.0  # second time of a sampling step: 0 for few steps, 1 as in flow matching
    # times between which guidance applies, as shares of the steps: 1 is the first step; null: at all times
    guidance_interval: tuple[float, float] | None = None
    # how the images are sampled
    sampler: Sampler = Renoise()  # noqa: RUF009 - stateless
    weights: tuple[str, ...] = ("ema", "live")  # a grid each: ema, live or the name of another track of trainer.ema

    def __post_init__(self):
        for name in ("num_steps", "weights"):
            if not getattr(self, name):
                raise ValueError(f"{name}: the list is empty; prompts: [] switches sample grids off")
        check_period("every", self.every)
        check_range("num_steps", self.num_steps, 1, 1000)
        check_range("size", self.size, 1, 8192)
        check_range("cfg_scale", self.cfg_scale, 0, 1000)
        check_range("s_ratio", self.s_ratio, 0, 1)
        check_interval("guidance_interval", self.guidance_interval)
        check_sampler(self.sampler, self.s_ratio)

    def check(self, system: System) -> None:
        """Raise UserError for a size, prompts or a sampler that cannot be used.

        Called on every rank before the first step.
        """
        if self.prompts:
            system.check_sampling(self.sampler, self.s_ratio)
            system.autoencoder.noise([self.size], SampleRNG.of_images([(0, "", 0)]))
            system.encode({"cond": list(self.prompts), "null": [""]})

    @torch.no_grad()
    def draw(
        self, system: System, nets: dict[str, nn.Module], seed: int, done: int, world: World
    ) -> dict[str, Image.Image]:
        """A labelled grid per denoiser on rank 0, by the name of its weights; empty on other ranks. `done`: completed
        training steps.

        Every rank generates the same number of images, because calls of a sharded denoiser are collective.
        """
        # this rank's prompts; where they do not divide evenly, some prompts are generated twice
        share = -(-len(self.prompts) // world.size)
        mine = [(world.rank + i * world.size) % len(self.prompts) for i in range(share)]
        prompts = [self.prompts[i] for i in mine]

        # (denoiser, prompt, number of steps) -> image
        own: dict[tuple[str, int, int], Image.Image] = {}
        for (name, net), num_steps in product(nets.items(), self.num_steps):
            images = system.generate(
                net,
                prompts,
                [self.size] * share,
                SampleRNG.of_images([(seed, prompt, 0) for prompt in prompts]),
                sampler=self.sampler,
                num_steps=num_steps,
                cfg_scale=self.cfg_scale,
                s_ratio=self.s_ratio,
                guidance_interval=self.guidance_interval,
            )
            for i, image in zip(mine, images, strict=True):
                own[name, i, num_steps] = image_encode.to_image(image)

        # gather the images of all ranks and arrange them on rank 0
        everyone: dict[tuple[str, int, int], Image.Image] = {}
        for of_rank in collectives.gather(own, world):
            everyone |= of_rank
        if not world.is_main:
            return {}
        sheets: dict[str, Image.Image] = {}
        for name in nets:
            rows = [[everyone[name, i, count] for count in self.num_steps] for i in range(len(self.prompts))]
            title = f"{TITLES.get(name, name)}, step {done:,}, guidance {self.cfg_scale:g}, s ratio {self.s_ratio:g}"
            if getattr(system.autoencoder, "is_preview", False):
                title += ", linear preview of latents"
            sheets[name] = image_encode.sample_sheet(rows, self.prompts, self.num_steps, title)
        return sheets
