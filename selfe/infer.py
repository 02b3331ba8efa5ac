"""The inferencer: `python -m selfe.infer CONFIG [key=value ...]`, one process per device, started by `infer.sh`.

Every process holds the whole denoiser and draws its share of the pictures. A picture is a function of (seed, prompt,
sample number) and the settings, not of the process or the batch that drew it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice, product
from pathlib import Path
from typing import Literal

import torch

from selfe import checkpoint, config, dist, launch, log, pictures
from selfe.dist import World
from selfe.draws import Draws
from selfe.samplers.renoise import Renoise
from selfe.system import System
from selfe.types import DTYPES, Precision, Sampler, UserError


@dataclass(frozen=True)
class Defaults:
    """How pictures are drawn. Several step counts make a sweep from the same noise."""

    prompt_file: str  # a prompt per line
    num_steps: tuple[int, ...] = (1, 2, 4, 8, 50)
    num_samples: int = 1  # pictures per prompt
    seed: int = 0
    height: int = 256
    width: int = 256
    cfg_scale: float = 5.0
    s_ratio: float = 0.0
    sampler: Sampler = Renoise()  # noqa: RUF009 - it has no state

    def __post_init__(self):
        if not self.num_steps or min(self.num_steps) < 1 or self.num_samples < 1:
            raise ValueError(
                f"num_steps {list(self.num_steps)} and num_samples {self.num_samples} must be positive; give at least 1"
            )


@dataclass(frozen=True)
class Picture:
    """One line of `metadata.jsonl`."""

    file: str
    prompt: str
    sample: int
    num_steps: int


@dataclass(frozen=True)
class Inferencer:
    """Draws every prompt of a file from a checkpoint, in every number of steps asked for."""

    ckpt_dir: str  # a checkpoint, or a folder of them: then the newest
    output_dir: str
    defaults: Defaults
    weights: Literal["ema", "live"] = "ema"
    precision: Precision = "bf16"
    batch_size: int = 16

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    def run(self, system: System, world: World) -> None:
        prompts = read_prompts(Path(self.defaults.prompt_file))
        path = checkpoint.find(Path(self.ckpt_dir))
        net = system.backbone.to_empty(device=world.device).requires_grad_(False)
        step = checkpoint.load_weights(path, net, self.weights)
        net.to(DTYPES[self.precision])
        system.load_encoders(world.device)

        folder = Path(self.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        todo = list(self.pictures(prompts))
        progress = log.Progress("pictures", len(todo[world.rank :: world.size]), quiet=not world.is_main)
        for num_steps in self.defaults.num_steps:
            mine = iter([picture for picture in todo if picture.num_steps == num_steps][world.rank :: world.size])
            while batch := list(islice(mine, self.batch_size)):
                self.draw(system, net, batch, folder)
                progress.advance(len(batch))
        progress.close()
        dist.barrier()
        if world.is_main:
            settings = {"checkpoint": str(path), "step": step, "weights": self.weights} | self.settings()
            lines = [json.dumps(asdict(picture) | settings, ensure_ascii=False) + "\n" for picture in todo]
            (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
            log.say(f"{len(todo)} pictures from {path} ({self.weights} weights) in {folder}")

    def pictures(self, prompts: list[str]) -> Iterator[Picture]:
        """Everything to draw, in the order of the metadata file."""
        for (number, prompt), sample, steps in product(
            enumerate(prompts), range(self.defaults.num_samples), self.defaults.num_steps
        ):
            yield Picture(f"{number:05d}_{sample:02d}_steps{steps:02d}.png", prompt, sample, steps)

    def draw(self, system: System, net: torch.nn.Module, batch: list[Picture], folder: Path) -> None:
        """One batch of pictures of the same step count, to files."""
        defaults = self.defaults
        images = system.generate(
            net,
            [picture.prompt for picture in batch],
            [(defaults.height, defaults.width)] * len(batch),
            Draws.of_pictures([(defaults.seed, picture.prompt, picture.sample) for picture in batch]),
            sampler=defaults.sampler,
            num_steps=batch[0].num_steps,
            cfg_scale=defaults.cfg_scale,
            s_ratio=defaults.s_ratio,
        )
        for picture, image in zip(batch, images, strict=True):
            pictures.to_image(image).save(folder / picture.file)

    def settings(self) -> dict:
        """What all pictures of the job share, for the metadata file."""
        defaults = self.defaults
        sampler = {"sampler": type(defaults.sampler).__name__.lower()} | vars(defaults.sampler)
        names = ("seed", "height", "width", "cfg_scale", "s_ratio")
        return {name: getattr(defaults, name) for name in names} | sampler


def read_prompts(path: Path) -> list[str]:
    """The lines of a prompt file; blank lines are left out."""
    if not path.is_file():
        raise UserError(f"{path}: no such prompt file; set inferencer.defaults.prompt_file (a prompt per line)")
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    if not prompts:
        raise UserError(f"{path}: the prompt file is empty; write a prompt per line")
    return prompts


def main(arguments: list[str]) -> None:
    settings = config.load(arguments[0], arguments[1:])
    with torch.device("meta"):
        system = config.build(settings, "system")
    inferencer = config.build(settings, "inferencer")
    # ranks finish at different times: the only wait is at the very end
    with dist.world(timeout_minutes=24 * 60) as world:
        inferencer.run(system, world)


if __name__ == "__main__":
    launch.worker(main)
