"""What a run prints at its start and at its end: parameters, devices, data, batch, and what to run next."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from selfe import log
from selfe.device import device_name
from selfe.distributed.activation_checkpoint import can_compile
from selfe.distributed.collectives import World
from selfe.optimizers.groups import trained
from selfe.protocols import Data
from selfe.system import System
from selfe.training.settings import TrainerConfig
from selfe.types import DTYPES


def start(
    cfg: TrainerConfig, system: System, data: Data, net: nn.Module, seed: int, world: World, step: int, num_micro: int
) -> str:
    """The start banner of a run that continues after `step` steps, with `num_micro` micro-batches per rank."""
    encoders = {"text encoder": system.text_encoder, "autoencoder": system.autoencoder}
    sizes = {name: num_parameters(modules_of(part)) for name, part in encoders.items()}
    frozen = [f"{name} {size / 1e6:,.2f}M parameters, frozen" for name, size in sizes.items() if size]
    total, learned = num_parameters([net]), sum(parameter.numel() for _, parameter in trained(net))
    how = f"{learned / 1e6:,.2f}M of them trained" if learned < total else "trained"
    last_step = cfg.max_steps if cfg.stop_step is None else min(cfg.stop_step, cfg.max_steps)
    state = f"continues after step {step}" if step else "new"

    rows = {
        "run": f"{cfg.output_dir}, {state}, to step {last_step} of {cfg.max_steps}",
        "denoiser": f"{total / 1e6:,.2f}M parameters, {how} in {cfg.precision}, and their EMA",
        "encoders": "; ".join(frozen) or "none in memory",
        "devices": devices(cfg, world),
        "data": images(data, step),
        "batch": batch(cfg, data, seed, world, step, num_micro),
        "compile": compilation(cfg, world),
        "first": first_events(cfg, data, step, last_step),
    }
    return "\n".join(f"{name + ':':10}{text}" for name, text in rows.items())


def num_parameters(modules: Iterable[nn.Module]) -> int:
    """Parameters of modules, over all shards."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def modules_of(part: Any) -> list[nn.Module]:
    """The modules that an encoder holds; it need not be one itself."""
    values = [part] if isinstance(part, nn.Module) else getattr(part, "__dict__", {}).values()
    return [value for value in values if isinstance(value, nn.Module)]


def devices(cfg: TrainerConfig, world: World) -> str:
    """Processes, their device, and how many of them hold one copy of the parameters."""
    shards = cfg.shard_size or world.size
    sharding = f"; parameters sharded over {shards}" if shards > 1 else ""
    return f"{log.count(world.size, 'process', 'processes')} on {device_name(world.device)}{sharding}"


def compilation(cfg: TrainerConfig, world: World) -> str:
    """Whether blocks are compiled."""
    if not cfg.compile:
        return "off"
    if not can_compile(cfg.activation_checkpointing, world.device, DTYPES[cfg.precision]):
        return "no effect on blocks with activation checkpointing, except in bf16 on a GPU"
    return "on: the first steps take minutes"


def images(data: Data, step: int) -> str:
    """Size of the data set, and the pixels of its images."""
    number = getattr(data, "num_images", None)
    count = f"{number:,} images" if number else "generated images"
    budgets = " and ".join(f"{pixels:,}" for pixels in data.resolution(step))
    return f"{count} of at most {budgets} pixels, sides multiples of {data.multiple}"


def batch(cfg: TrainerConfig, data: Data, seed: int, world: World, step: int, num_micro: int) -> str:
    """How the batch of a step is divided, and its tokens."""
    samples = cfg.samples_at(step)
    total = len(samples)
    tokens = sum(data.costs(seed, step, samples, "train"))
    return (
        f"{total} images per step = {total // world.size // num_micro} per micro-batch (at most {cfg.micro_batch_size})"
        f" x {num_micro} accumulated x {log.count(world.size, 'process', 'processes')}; about {tokens:,} tokens"
    )


def first_events(cfg: TrainerConfig, data: Data, step: int, last_step: int) -> str:
    """The steps after which the first checkpoint, validation, sample grid and evaluation of this start come."""
    periods = {"checkpoint": cfg.checkpoint_every}
    if data.has_val:
        periods["validation"] = cfg.val_every
    if cfg.samples.prompts:
        periods["samples"] = cfg.samples.every
    if cfg.evaluate:
        periods["evaluation"] = cfg.evaluate.every

    # what never comes would come after the end
    steps = {name: last_step + 1 if every is None else step - step % every + every for name, every in periods.items()}
    steps["checkpoint"] = min(steps["checkpoint"], last_step)
    return ", ".join(f"{name} after step {at}" if at <= last_step else f"no {name}" for name, at in steps.items())


def end(folder: Path, has_inferencer: bool) -> str:
    """What to open and to run after a run in `folder`; its config may describe a sampling job."""
    rows = {"report": f"{command()} report {folder}", "try it": f"{command()} demo {folder / 'checkpoints'}"}
    if any(folder.glob("samples/step_*.png")):
        rows = {"samples": str(folder / "samples")} | rows
    if has_inferencer:
        rows["images"] = f"{command()} infer {folder / 'config.yaml'}"
    return "\n".join(f"{name + ':':10}{text}" for name, text in rows.items())


def command() -> str:
    """The `selfe` of this environment, from the current folder."""
    path = Path(sys.executable).with_name("selfe")
    inside = path.is_relative_to(Path.cwd())
    return os.path.relpath(path) if inside else str(path)
