"""Sheets of pictures drawn during training."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from PIL import Image
from torch import nn

from selfe import dist, pictures
from selfe.dist import World
from selfe.draws import Draws
from selfe.samplers.renoise import Renoise
from selfe.system import System
from selfe.types import Sampler


@dataclass(frozen=True)
class Samples:
    """Pictures drawn during training: a row per prompt, a column per step count, always from the same noise."""

    every: int = 5000
    prompts: tuple[str, ...] = ()
    num_steps: tuple[int, ...] = (1, 2, 4, 8)
    size: tuple[int, int] = (256, 256)  # height, width
    cfg_scale: float = 5.0
    s_ratio: float = 0.0
    sampler: Sampler = Renoise()  # noqa: RUF009 - it has no state

    def __post_init__(self):
        if min(self.every, *self.size, *self.num_steps, len(self.num_steps)) < 1:
            raise ValueError("every, size and num_steps must be at least 1; prompts: [] draws nothing")

    def check(self, system: System) -> None:
        """Raise UserError for what could not be drawn; by every rank, before the first step."""
        if self.prompts:
            system.autoencoder.noise([self.size], Draws.of_pictures([(0, "", 0)]))
            system.encode({"cond": list(self.prompts), "null": [""]})

    @torch.no_grad()
    def draw(self, system: System, nets: dict[str, nn.Module], seed: int, world: World) -> dict[str, Image.Image]:
        """A sheet by each denoiser, on rank 0. All ranks draw equally many: sharded calls are collective."""
        share = -(-len(self.prompts) // world.size)
        mine = [(world.rank + i * world.size) % len(self.prompts) for i in range(share)]
        prompts = [self.prompts[i] for i in mine]
        drawn = {}
        for (name, net), num_steps in product(nets.items(), self.num_steps):
            images = system.generate(
                net,
                prompts,
                [self.size] * share,
                Draws.of_pictures([(seed, prompt, 0) for prompt in prompts]),
                sampler=self.sampler,
                num_steps=num_steps,
                cfg_scale=self.cfg_scale,
                s_ratio=self.s_ratio,
            )
            drawn |= {(name, i, num_steps): pictures.to_image(image) for i, image in zip(mine, images, strict=True)}
        everyone = {key: image for part in dist.gather(drawn, world) for key, image in part.items()}
        rows = range(len(self.prompts)) if world.is_main else ()
        return {
            name: pictures.grid([[everyone[name, i, n] for n in self.num_steps] for i in rows])
            for name in (nets if world.is_main else ())
        }
