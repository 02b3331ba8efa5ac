"""The inferencer: `python -m selfe.infer CONFIG [key=value ...]`, one process per device, started by `infer.sh`.

Every process holds the complete denoiser and generates its share of the images. An image is a function of (seed,
prompt, sample number) and the settings, not of the process or the batch. Existing images are kept.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from selfe import compare, config, errors, launch, log
from selfe.checkpoint import state
from selfe.checkpoint.weights import find_weights, load_weights
from selfe.device import choose_precision, device_name
from selfe.distributed import activation_checkpoint, collectives
from selfe.distributed.collectives import World
from selfe.encoders.remembered_text import RememberedText
from selfe.errors import UserError
from selfe.gallery import build
from selfe.inference import job, prompts
from selfe.inference.job import ImageSpec, Layout, Weights
from selfe.inference.prompts import Request, SamplingDefaults
from selfe.io import image_encode
from selfe.io.folder_lock import removed_on_failure
from selfe.io.image_encode import Format
from selfe.system import System
from selfe.types import DTYPES, MOST_SAMPLES, PrecisionOrAuto, check_range


@dataclass(frozen=True)
class Inferencer:
    """Generates images for prompts from a checkpoint, with every requested number of steps."""

    ckpt_dir: Path  # checkpoint directory, a parent directory (newest is used), or an exported folder
    output_dir: Path  # folder for the images; existing images are kept
    # settings of prompts that do not set them
    defaults: SamplingDefaults = SamplingDefaults()  # noqa: RUF009 - frozen
    prompts: tuple[str, ...] = ()  # overrides defaults.prompt_file
    # ema, live, or both for every image with each of the two; or the name of another average of the run
    weights: str = "ema"
    precision: PrecisionOrAuto = "auto"  # of the denoiser; auto: bf16 where the hardware has it, otherwise fp32
    compile: bool = False  # compile each block of the denoiser once for all sizes; useful for many images
    batch_size: int = 16  # maximum images per batch
    batch_pixels: int = 16 * 512 * 512  # maximum total pixels per batch
    format: Format = "png"  # of the image files
    layout: Layout = "flat"  # names and folders of the files: flat, as GenEval reads them, or one array for FID
    gallery: bool = True  # write gallery.html at the end
    allow_changes: tuple[str, ...] = ()  # keys of the system that may differ from the run's config.yaml

    def __post_init__(self):
        check_range("batch_size", self.batch_size, 1, MOST_SAMPLES)
        check_range("batch_pixels", self.batch_pixels, 1, 10**12)
        if self.layout == "geneval" and self.format != "png":
            raise ValueError(f"format {self.format}: layout geneval needs png, its evaluator reads only png")

    def run(self, system: System, world: World, settings: dict) -> Path:
        """Generate the images missing in `output_dir`; `settings` is the complete config, saved with them.

        Returns the folder of the images.

        Raises UserError for invalid prompts or sizes, a missing checkpoint, or an `output_dir` of another job.
        """
        begun = time.monotonic()

        # images to generate; the same list on every process
        requests = self.requests(system.autoencoder.multiple)
        for request in requests:
            for variant in request.settings.variants():
                system.check_sampling(variant.sampler, variant.s_ratio)
        todo = job.plan(requests, self.kinds, self.layout, image_encode.SUFFIXES[self.format])
        if self.layout == "npz":
            check_one_size(todo)
        for hint in prompts.foreign_syntax(requests) if world.is_main else ():
            log.print_line(hint)

        # one process finds the checkpoint for all, because a training run may be saving newer ones meanwhile
        path = collectives.broadcast(find_weights(Path(self.ckpt_dir)) if world.is_main else None, world)
        if world.is_main:
            self.check_run(path, settings)
        nets, facts = self.load(path, system.backbone, world.device)

        # open the output directory, which records the settings that identify its images
        shared = facts | {"precision": self.precision, "format": self.format, "layout": self.layout}
        identity = shared | compare.describe_system(settings["system"])
        folder = collectives.broadcast(self.choose_folder(identity, todo) if world.is_main else None, world)
        opened = job.opened(folder, identity, todo, self.layout, lost=partial(launch.end, 1))
        cleanup = removed_on_failure(folder, ["job.json"])
        with errors.writing_to(folder), collectives.on_main(cleanup, world), collectives.on_main(opened, world):
            # generate what is missing
            existing = collectives.broadcast(set(job.existing_images(folder)) if world.is_main else None, world)
            existing &= {spec.file for spec in todo}
            if len(existing) < len(todo):
                system.text_encoder = RememberedText(system.text_encoder)
                system.load_encoders(world.device)
                self.generate_share(system, nets, todo, existing, facts, folder, world)
            collectives.barrier()

            # write config, metadata and gallery
            if world.is_main:
                inferencer = {name: value for name, value in settings["inferencer"].items() if name != "prompts"}
                config.save(settings | {"inferencer": inferencer | {"output_dir": folder}}, folder / "config.yaml")
                num_new = len(todo) - len(existing)
                self.describe(folder, todo, requests, facts | {"checkpoint": str(path)}, any_new=num_new > 0)

                seconds = log.duration(time.monotonic() - begun)
                images = log.count(len(todo), "image", "images")
                log.print_line(
                    f"{images} from {path} ({self.weights} weights) in {folder}, {num_new} of them new, in {seconds}"
                )
                if (folder / "gallery.html").is_file():
                    log.print_line(f"open:     {folder / 'gallery.html'}")
        return folder

    def choose_folder(self, identity: dict, todo: Sequence[ImageSpec]) -> Path:
        """`output_dir`, or its sub-folder for this job's settings, reported in a line."""
        output_dir = Path(self.output_dir)
        folder, difference = job.choose_folder(output_dir, identity, todo, self.layout)
        if difference:
            log.print_line(f"{output_dir}: {difference}; the images of this job are in {folder}")
        return folder

    def check_run(self, path: Path, settings: dict) -> None:
        """Raise UserError if the system differs from that of the run whose checkpoint is at `path`."""
        run = compare.config_beside(path)
        if run is None:
            log.print_line(f"{path}: no config.yaml beside it, so the system is not compared with that of the run")
        else:
            compare.check_run(run, settings, self.allow_changes, "inferencer")

    @property
    def kinds(self) -> tuple[Weights, ...]:
        """Kinds of weights to sample from."""
        return ("ema", "live") if self.weights == "both" else (self.weights,)

    def requests(self, multiple: int) -> list[Request]:
        """Checked requests of the prompt list or prompt file; sizes must be multiples of `multiple` pixels."""
        if self.prompts:
            return prompts.from_list(self.prompts, self.defaults, multiple)
        if self.defaults.prompt_file is None:
            raise UserError(
                "inferencer.prompts: no prompts; give a list of prompts or set inferencer.defaults.prompt_file"
            )
        return prompts.from_file(Path(self.defaults.prompt_file), self.defaults, multiple)

    def load(self, path: Path, backbone: nn.Module, device: torch.device) -> tuple[dict[Weights, nn.Module], dict]:
        """Denoisers of a checkpoint by kind of weights, and its step and fingerprints of the weights."""
        nets, facts = {}, {}
        for kind in self.kinds:
            net = copy.deepcopy(backbone).to_empty(device=device).requires_grad_(False)
            facts["step"] = load_weights(path, net, kind)
            facts[f"{kind}_fingerprint"] = state.fingerprint(net)
            nets[kind] = net.to(DTYPES[choose_precision(self.precision, device)])
            if self.compile:
                activation_checkpoint.compile(net)
        return nets, facts

    def generate_share(
        self,
        system: System,
        nets: dict[Weights, nn.Module],
        todo: Sequence[ImageSpec],
        existing: set[str],
        facts: dict,
        folder: Path,
        world: World,
    ) -> None:
        """Generate this process's share of the missing images; shows images per second and remaining time."""
        # batches are formed before existing images are dropped, so a resumed job uses the same ones
        batches = job.make_batches(todo, self.batch_size, self.batch_pixels, world.size)
        missing = [[spec for spec in batch if spec.file not in existing] for batch in batches]
        own_batches = job.share([batch for batch in missing if batch], world.size)[world.rank]
        progress = log.Progress("images", sum(map(len, own_batches)), quiet=not world.is_main)

        # estimated cost of the images that are generated, and of those that are not yet
        cost_done, cost_left = 0.0, sum(spec.cost() for batch in own_batches for spec in batch)
        start = time.perf_counter()

        saving: list[Future] = []
        with ThreadPoolExecutor(1, "save images") as thread:
            for batch in own_batches:
                images = job.generate(system, nets[batch[0].weights], batch)

                # files are compressed and written while the next batch is generated
                for future in saving:
                    future.result()
                saving = [
                    thread.submit(image_encode.save, image, folder / spec.file, self.format, record(spec, facts))
                    for spec, image in zip(batch, images, strict=True)
                ]

                # remaining time by estimated cost, not by count, because sizes and steps differ between batches
                cost = sum(spec.cost() for spec in batch)
                cost_done, cost_left = cost_done + cost, cost_left - cost
                seconds = time.perf_counter() - start
                rate = (progress.done + len(batch)) / seconds
                remaining = log.duration(seconds * cost_left / cost_done)
                progress.advance(len(batch), f"{rate:.2f} images/s, {remaining} left")
            for future in saving:
                future.result()
        progress.close()

    def describe(
        self, folder: Path, todo: Sequence[ImageSpec], requests: Sequence[Request], facts: dict, any_new: bool
    ) -> None:
        """Write the files next to the images: metadata, files that evaluators need, the gallery."""
        lines = []
        for spec in todo:
            category = {"category": spec.category} if spec.category else {}
            lines.append({"file": spec.file} | record(spec, facts) | category)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        image_encode.write(folder / "metadata.jsonl", text.encode())

        # GenEval: the metadata of each prompt in its own folder
        if self.layout == "geneval":
            for prompt_folder in {(folder / spec.file).parents[1] for spec in todo}:
                request = requests[int(prompt_folder.name)]
                metadata = json.dumps(request.extra or {"prompt": request.prompt}, ensure_ascii=False)
                image_encode.write(prompt_folder / "metadata.jsonl", (metadata + "\n").encode())

        # FID evaluators: all images of a group in one array
        if self.layout == "npz":
            groups = defaultdict(list)
            for spec in todo:
                groups[spec.group].append(folder / spec.file)
            for group, paths in groups.items():
                output = folder / f"{group}.npz"
                if any_new or not output.exists():
                    image_encode.save_npz(paths, output)

        if self.gallery and len(todo) <= build.MOST:
            build.build([folder], folder / "gallery.html")
        elif self.gallery:
            command = f".venv/bin/selfe gallery {folder}"
            log.print_line(f"gallery not built for {len(todo)} images; to build it anyway, run {command}")


def record(spec: ImageSpec, facts: dict) -> dict:
    """Metadata of an image: its settings, and the checkpoint and fingerprint of the weights."""
    metadata = spec.record()
    for name in ("step", "checkpoint"):
        if name in facts:
            metadata[name] = facts[name]
    return metadata | {"fingerprint": facts[f"{spec.weights}_fingerprint"]}


def check_one_size(todo: Sequence[ImageSpec]) -> None:
    """Raise UserError if images differ in size, which layout npz does not support."""
    sizes = sorted({(spec.height, spec.width) for spec in todo})
    if len(sizes) > 1:
        raise UserError(
            f"inferencer.layout: npz needs images of one size, the prompts have {len(sizes)}, such as "
            f"{sizes[0][0]} x {sizes[0][1]} and {sizes[1][0]} x {sizes[1][1]}; use layout=flat"
        )


def main(arguments: list[str]) -> None:
    """Run the sampling job that a config file describes: CONFIG [key=value ...]."""
    settings = config.load(arguments[0], arguments[1:])
    generate = prepare(settings)

    # long timeout: ranks finish at different times and only synchronise at the end
    with collectives.process_group(timeout_minutes=24 * 60) as world:
        generate(world)


def prepare(settings: dict) -> Callable[[World], Path]:
    """Build the parts of a sampling job; the function that it returns generates what is missing, on all processes.

    The function returns the folder of the images. Raises UserError.
    """
    with torch.device("meta"):
        system = config.build(settings, "system")
    inferencer = config.build(settings, "inferencer")

    def generate(world: World) -> Path:
        # the first process decides on `auto` for all, and the choice is recorded
        chosen = collectives.broadcast(choose_precision(inferencer.precision, world.device), world)
        if inferencer.precision == "auto" and world.is_main:
            log.print_line(f"inferencer.precision: auto is {chosen} on this machine ({device_name(world.device)})")
        recorded = settings | {"inferencer": settings["inferencer"] | {"precision": chosen}}
        return replace(inferencer, precision=chosen).run(system, world, recorded)

    return generate


if __name__ == "__main__":
    launch.worker(lambda: main(sys.argv[1:]))
