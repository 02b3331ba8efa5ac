"""The weights that a new run starts from, `trainer.init_from`: a checkpoint of another run, or FLUX weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from selfe import log
from selfe.checkpoint import adapter, flux, second_time, state, verify
from selfe.checkpoint.state import InitFromConfig
from selfe.distributed import collectives
from selfe.distributed.collectives import World
from selfe.errors import UserError


def load(
    origin: Path | InitFromConfig,
    net: nn.Module,
    averages: Mapping[str, nn.Module],
    optimizer: Optimizer | None,
    world: World,
    report: Path,
) -> tuple[int, int]:
    """Load a sharded denoiser and its averages on every rank; returns the finished steps, and the images learned from.

    Args:
        optimizer: None: its state is not loaded.
        report: where the names of the tensors of a FLUX file are listed.

    Raises:
        UserError: there are no weights, or they do not fit.
    """
    origin = InitFromConfig(origin) if isinstance(origin, Path) else origin
    if optimizer is None:
        origin = replace(origin, parts=tuple(part for part in origin.parts if part != "optimizer"))

    path = flux.weights_of(origin.path)
    if flux.holds_weights(path):
        done = 0, 0
        load_files(path, origin, (net, *averages.values()), world, report)
    else:
        done = load_checkpoint(origin, net, averages, optimizer, world)

    if origin.reset_s:
        for module in (net, *averages.values()):
            second_time.reset(module)
        if world.is_main:
            log.print_line("predictions start as those at s = t, whatever s is (trainer.init_from.reset_s)")
    return done


def load_files(path: Path, origin: InitFromConfig, modules: tuple[nn.Module, ...], world: World, report: Path) -> None:
    """Load safetensors weights in FLUX names into denoisers of equal architecture."""
    if extra := sorted({"optimizer", "step"} & set(origin.parts)):
        raise UserError(f"trainer.init_from.parts: {path} holds weights only, no {extra[0]}; remove it")
    loaded = flux.warm_start(path, *modules)
    if world.is_main:
        log.print_line(loaded.summary(report))


def load_checkpoint(
    origin: InitFromConfig,
    net: nn.Module,
    averages: Mapping[str, nn.Module],
    optimizer: Optimizer | None,
    world: World,
) -> tuple[int, int]:
    """Load the parts of another run's checkpoint that were asked for."""
    if world.is_main:
        log.print_line(f"starting from {', '.join(origin.parts)} of {origin.path}")
    path = collectives.broadcast(verify.find(origin.path) if world.is_main else None, world)
    adapter.refuse(path)
    samples = verify.read_marker(path)["samples"] if "step" in origin.parts else 0
    return state.load(path, net, averages, optimizer, origin.parts), samples
