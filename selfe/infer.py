"""The inferencer: `python -m selfe.infer CONFIG [key=value ...]`, one process per device, started by `infer.sh`.

Every process holds the whole denoiser and draws its share of the pictures. A picture is a function of (seed, prompt,
sample number) and the settings, not of the process or the batch that drew it. What is drawn already stays.
"""

from __future__ import annotations

import copy
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from selfe import blocks, checkpoint, config, dist, gallery, jobs, launch, log, pictures, prompts
from selfe.dist import World
from selfe.draws import Draws
from selfe.encoders.remembered import Remembered
from selfe.jobs import Layout, Picture, Weights
from selfe.pictures import Format
from selfe.prompts import Defaults, Request
from selfe.system import System
from selfe.types import DTYPES, Precision, UserError, at_least


@dataclass(frozen=True)
class Inferencer:
    """Draws prompts from a checkpoint, in every number of steps asked for."""

    ckpt_dir: str  # a checkpoint, or a folder of them: then the newest
    output_dir: str
    defaults: Defaults = Defaults()  # noqa: RUF009 - it has no state
    prompts: tuple[str, ...] = ()  # instead of defaults.prompt_file
    weights: Literal["ema", "live", "both"] = "ema"
    precision: Precision = "bf16"
    compile: bool = False  # every block of the denoiser, once for all sizes; worth it for many pictures
    batch_size: int = 16  # pictures in a batch, at most
    batch_pixels: int = 16 * 512 * 512  # of all pictures in a batch, at most
    format: Format = "png"
    layout: Layout = "flat"
    gallery: bool = True

    def __post_init__(self):
        at_least(1, self, "batch_size", "batch_pixels")
        if self.layout == "geneval" and self.format != "png":
            raise ValueError(f"format {self.format}: layout geneval needs png, its evaluator reads nothing else")

    def run(self, system: System, world: World, settings: dict) -> None:
        """Draw what is missing in `output_dir`; `settings` are the whole configuration, to be kept beside it."""
        requests = self.requests(system.autoencoder.multiple)
        todo = jobs.plan(requests, self.kinds, self.layout, pictures.SUFFIXES[self.format])
        if self.layout == "npz":
            check_one_size(todo)
        # a run may save while its weights are drawn from: one process looks, for all
        path = dist.broadcast(checkpoint.find(Path(self.ckpt_dir)) if world.is_main else None, world)
        folder = Path(self.output_dir)
        nets, facts = self.load(path, system.backbone, world.device)
        shared = facts | {"precision": self.precision, "format": self.format, "layout": self.layout}
        keep = jobs.opened(folder, shared | of_system(settings), todo, self.layout)
        with keep if world.is_main else nullcontext():
            there = dist.broadcast(set(jobs.drawn(folder)) if world.is_main else None, world)
            there &= {picture.file for picture in todo}
            if len(there) < len(todo):
                system.text_encoder = Remembered(system.text_encoder)
                system.load_encoders(world.device)
                self.draw_share(system, nets, todo, there, facts, world)
            dist.barrier()
            if world.is_main:
                again = {name: value for name, value in settings["inferencer"].items() if name != "prompts"}
                config.save(settings | {"inferencer": again}, folder / "config.yaml")
                new = len(todo) - len(there)
                self.describe(todo, requests, facts | {"checkpoint": str(path)}, drew=new > 0)
                log.say(f"{len(todo)} pictures of {path} ({self.weights} weights) in {folder}, {new} of them new")

    @property
    def kinds(self) -> tuple[Weights, ...]:
        return ("ema", "live") if self.weights == "both" else (self.weights,)

    def requests(self, multiple: int) -> list[Request]:
        """What is asked for, checked; sizes must be multiples of so many pixels."""
        if self.prompts:
            return prompts.from_list(self.prompts, self.defaults, multiple)
        if self.defaults.prompt_file is None:
            raise UserError(
                "inferencer.prompts: nothing to draw; give a list of prompts or set inferencer.defaults.prompt_file"
            )
        return prompts.from_file(Path(self.defaults.prompt_file), self.defaults, multiple)

    def load(self, path: Path, backbone: nn.Module, device: torch.device) -> tuple[dict[Weights, nn.Module], dict]:
        """The denoisers of a checkpoint by the kind of their weights, and what identifies them."""
        nets, facts = {}, {}
        for kind in self.kinds:
            net = copy.deepcopy(backbone).to_empty(device=device).requires_grad_(False)
            facts["step"] = checkpoint.load_weights(path, net, kind)
            facts[f"{kind}_fingerprint"] = checkpoint.fingerprint(net)
            nets[kind] = net.to(DTYPES[self.precision])
            if self.compile:
                blocks.compile(net)
        return nets, facts

    def draw_share(
        self,
        system: System,
        nets: dict[Weights, nn.Module],
        todo: Sequence[Picture],
        there: set[str],
        facts: dict,
        world: World,
    ) -> None:
        """This process's share of the missing pictures, with a word about speed and time left."""
        made = jobs.batches(todo, self.batch_size, self.batch_pixels, world.size)
        missing = [[picture for picture in batch if picture.file not in there] for batch in made]
        mine = jobs.share([batch for batch in missing if batch], world.size)[world.rank]
        left = sum(picture.cost() for batch in mine for picture in batch)
        progress = log.Progress("pictures", sum(map(len, mine)), quiet=not world.is_main)
        worked, start = 0.0, time.perf_counter()
        for batch in mine:
            self.draw(system, nets[batch[0].weights], batch, facts)
            cost = sum(picture.cost() for picture in batch)
            worked, left = worked + cost, left - cost
            seconds = time.perf_counter() - start
            rate = (progress.done + len(batch)) / seconds
            progress.advance(len(batch), f"{rate:.2f} pictures/s, {log.duration(seconds * left / worked)} left")
        progress.close()

    def draw(self, system: System, net: nn.Module, batch: Sequence[Picture], facts: dict) -> None:
        """One batch of pictures of one group, to files."""
        first = batch[0]
        images = system.generate(
            net,
            [picture.prompt for picture in batch],
            [(picture.height, picture.width) for picture in batch],
            Draws.of_pictures([(picture.seed, picture.prompt, picture.sample) for picture in batch]),
            sampler=first.sampler,
            num_steps=first.num_steps,
            cfg_scale=first.cfg_scale,
            s_ratio=first.s_ratio,
            negative_prompts=[picture.negative_prompt for picture in batch],
        )
        for picture, image in zip(batch, images, strict=True):
            if not image.isfinite().all():
                raise UserError(f"{picture.file}: not all numbers are finite; try inferencer.precision=fp32")
            path = Path(self.output_dir) / picture.file
            pictures.save(pictures.to_image(image), path, self.format, record(picture, facts))

    def describe(self, todo: Sequence[Picture], requests: Sequence[Request], facts: dict, drew: bool) -> None:
        """The files beside the pictures: metadata, what evaluators ask for, the gallery."""
        folder = Path(self.output_dir)
        lines = [{"file": picture.file} | record(picture, facts) for picture in todo]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        pictures.write(folder / "metadata.jsonl", text.encode())
        if self.layout == "geneval":
            for home in {(folder / picture.file).parents[1] for picture in todo}:
                request = requests[int(home.name)]
                said = json.dumps(request.extra or {"prompt": request.prompt}, ensure_ascii=False)
                pictures.write(home / "metadata.jsonl", (said + "\n").encode())
        if self.layout == "npz":
            groups = defaultdict(list)
            for picture in todo:
                groups[picture.group].append(folder / picture.file)
            for group, paths in groups.items():
                output = folder / f"{group}.npz"
                if drew or not output.exists():
                    pictures.save_npz(paths, output)
        if self.gallery and len(todo) <= gallery.MOST:
            gallery.build([folder], folder / "gallery.html")
        elif self.gallery:
            command = f".venv/bin/python -m selfe.gallery {folder}"
            log.say(f"no gallery of {len(todo)} pictures; {command} makes one all the same")


def record(picture: Picture, facts: dict) -> dict:
    """A picture's settings and the weights that drew it."""
    mine = {"fingerprint": facts[f"{picture.weights}_fingerprint"]}
    return picture.record() | {name: facts[name] for name in ("step", "checkpoint") if name in facts} | mine


def of_system(settings: dict) -> dict:
    """What decides a picture besides the denoiser's weights: the system's keys, but for where files lie."""
    found = {}

    def walk(path: str, value: object) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{path}.{key}", item)
        elif not path.endswith(".cache_dir"):
            found[path] = config.plain(value)

    walk("system", {name: part for name, part in settings["system"].items() if name != "objective"})
    return found


def check_one_size(todo: Sequence[Picture]) -> None:
    sizes = sorted({(picture.height, picture.width) for picture in todo})
    if len(sizes) > 1:
        raise UserError(
            f"inferencer.layout: npz holds pictures of one size, the prompts ask for {len(sizes)}, such as "
            f"{sizes[0][0]} x {sizes[0][1]} and {sizes[1][0]} x {sizes[1][1]}; use layout=flat"
        )


def main(arguments: list[str]) -> None:
    settings = config.load(arguments[0], arguments[1:])
    with torch.device("meta"):
        system = config.build(settings, "system")
    inferencer = config.build(settings, "inferencer")
    # ranks finish at different times: the only wait is at the very end
    with dist.world(timeout_minutes=24 * 60) as world:
        inferencer.run(system, world, settings)


if __name__ == "__main__":
    launch.worker(main)
