"""The contents of a checkpoint, and loading it on any number of processes."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from selfe.checkpoint.verify import read_step
from selfe.errors import UserError

Part = Literal["model", "ema", "optimizer", "step"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True)
class InitFromConfig:
    """Parts to load from another run's checkpoint. If only one of `model` and `ema` is listed, it initialises both."""

    path: Path  # checkpoint directory, or a parent directory (newest is used)
    parts: tuple[Part, ...] = ("model", "ema")  # what is loaded

    def __post_init__(self):
        if not {"model", "ema"} & set(self.parts):
            raise ValueError(f"parts must contain model or ema, got {list(self.parts)}")


def load(path: Path, net: nn.Module, ema: nn.Module, optimizer: Optimizer | None, parts: Sequence[Part] = PARTS) -> int:
    """Load parts of a training state in place; must be called by every rank.

    If only one of `model` and `ema` is in `parts`, its weights are loaded into both. Heads of training aids that the
    checkpoint does not have keep their initial values, unless the optimizer is loaded too.

    Returns:
        The number of finished steps, or 0 if `step` is not in `parts`.

    Raises:
        UserError: a tensor is missing from the checkpoint or has another shape.
    """
    # Model and EMA weights, checked before anything is loaded.
    names = {"model": "net", "ema": "ema", "optimizer": "optimizer"}
    modules = {"model": net, "ema": ema}
    state = {names[part]: get_model_state_dict(modules[part]) for part in modules if part in parts}
    if "optimizer" not in parts:
        state = {group: without_new_heads(path, group, tensors) for group, tensors in state.items()}
    check_fits(path, state)

    # Optimizer state; the configured hyperparameters are remembered, because loading overwrites them.
    if "optimizer" in parts:
        asked = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        state["optimizer"] = get_optimizer_state_dict(net, optimizer)

    dcp.load(state, checkpoint_id=path)

    if "optimizer" in parts:
        set_optimizer_state_dict(net, optimizer, state["optimizer"])
        for group, settings in zip(optimizer.param_groups, asked, strict=True):
            group.update(settings)  # moments are restored, hyperparameters are those of the config

    # Copy the weights to whichever of model and EMA was not loaded.
    for there, missing in (("model", "ema"), ("ema", "model")):
        if missing not in parts:
            options = StateDictOptions(strict=False)  # without new heads
            set_model_state_dict(modules[missing], state[names[there]], options=options)
    return read_step(path) if "step" in parts else 0


def without_new_heads(path: Path, group: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, without those of heads that the checkpoint does not have."""
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    return {
        name: tensor for name, tensor in tensors.items() if not name.startswith("heads.") or f"{group}.{name}" in stored
    }


def load_weights(path: Path, module: nn.Module, weights: Literal["ema", "live"]) -> int:
    """Load an unsharded denoiser in a single process; returns the number of finished steps."""
    load_tensors(path, module.state_dict(), weights)
    return read_step(path)


def load_tensors(path: Path, tensors: dict[str, Tensor], weights: Literal["ema", "live"]) -> None:
    """Load only the given tensors (by parameter name, in place) in a single process."""
    state = {"net" if weights == "live" else weights: tensors}
    check_fits(path, state)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # expected with no_dist
        dcp.load(state, checkpoint_id=path, no_dist=True)


def fingerprint(module: nn.Module) -> str:
    """Identifies a denoiser's weights: a digest of up to 1024 evenly spaced values of each parameter.

    Equal for all copies of the same weights, whatever the file format; changes with every training step.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in module.named_parameters():
        stride = max(1, parameter.numel() // 1024)
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().flatten()[::stride].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def training_state(net: nn.Module, ema: nn.Module, optimizer: Optimizer) -> dict:
    """The state dict of a checkpoint, to be saved with `CheckpointManager.begin`."""
    return {
        "net": get_model_state_dict(net),
        "ema": get_model_state_dict(ema),
        "optimizer": get_optimizer_state_dict(net, optimizer),
    }


def check_fits(path: Path, state: dict[str, dict]) -> None:
    """Raise UserError unless the checkpoint has every tensor of `state` with the same shape; loads nothing."""
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    for group, tensors in state.items():
        for name, tensor in tensors.items():
            entry = stored.get(f"{group}.{name}")
            if entry is None or entry.size != tensor.shape:
                holds = "does not have it" if entry is None else f"has {tuple(entry.size)}"
                raise UserError(
                    f"{path}: the config's {group}.{name} is {tuple(tensor.shape)}, the checkpoint {holds}; "
                    "use the config.yaml saved with the run"
                )
