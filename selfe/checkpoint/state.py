"""The contents of a checkpoint, and loading it on any number of processes."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
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

from selfe.backbones import lora
from selfe.checkpoint import second_time
from selfe.checkpoint.verify import read_step
from selfe.distributed import fsdp
from selfe.errors import UserError

Part = Literal["model", "ema", "optimizer", "step"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True)
class InitFromConfig:
    """Weights that a run starts from. If only one of `model` and `ema` is listed, it initialises both."""

    path: Path  # checkpoint directory, or a parent directory (newest is used); or FLUX weights
    parts: tuple[Part, ...] = ("model", "ema")  # what is loaded; ema: every average that the checkpoint has
    # predict at any s what the weights predict at s = t: for weights that were trained by flow matching
    reset_s: bool = False

    def __post_init__(self):
        if not {"model", "ema"} & set(self.parts):
            raise ValueError(f"parts must contain model or ema, got {list(self.parts)}")
        if self.reset_s and "optimizer" in self.parts:
            raise ValueError(
                "reset_s changes weights, whose optimizer state would not fit; remove optimizer from parts"
            )


def load(
    path: Path,
    net: nn.Module,
    averages: Mapping[str, nn.Module],
    optimizer: Optimizer | None,
    parts: Sequence[Part] = PARTS,
) -> int:
    """Load parts of a training state in place, without what is frozen; must be called by every rank.

    If only one of `model` and `ema` is in `parts`, its weights are loaded into both. An average that the checkpoint
    lacks starts from the weights of the first one. Unless the optimizer is loaded too, heads of training aids that the
    checkpoint does not have keep their initial values, and an embedding of t - s starts without effect.

    Args:
        averages: EMA denoisers by name; the first is "ema", which every checkpoint has.

    Returns:
        The number of finished steps, or 0 if `step` is not in `parts`.

    Raises:
        UserError: a tensor is missing from the checkpoint or has another shape.
    """
    # Weights of the model and its averages, checked before anything is loaded.
    modules = {"net": net} if "model" in parts else {}
    if "ema" in parts:
        stored = list_weights(path)
        modules |= {name: module for name, module in averages.items() if name == "ema" or name in stored}
    wanted = {name: trained_state(net, module) for name, module in modules.items()}
    state = wanted
    if "optimizer" not in parts:
        state = {name: without_new(path, name, tensors) for name, tensors in wanted.items()}
    new = [name for group, tensors in wanted.items() for name in tensors if name not in state[group]]
    check_fits(path, state)

    # State of the optimizer, without its hyperparameters, which are those of the config.
    if "optimizer" in parts:
        if problem := optimizer_problem(path, net, optimizer):
            raise UserError(problem)
        current = get_optimizer_state_dict(net, optimizer)
        state["optimizer"] = {"state": current["state"]}

    dcp.load(state, checkpoint_id=path)

    if "optimizer" in parts:
        set_optimizer_state_dict(net, optimizer, current)

    # Copy the weights to whatever was not loaded.
    source = state["ema" if "ema" in parts else "net"]
    for name, module in {"net": net, **averages}.items():
        if name not in state:
            set_model_state_dict(module, source, options=StateDictOptions(strict=False))  # without what is new
        if any(name.startswith(second_time.PREFIX) for name in new):
            second_time.silence(module)
    return read_step(path) if "step" in parts else 0


def trained_state(net: nn.Module, module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a denoiser `net` or of an average of it, without those that are frozen in `net`."""
    frozen = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in get_model_state_dict(module).items() if name not in frozen}


def load_base(path: Path, net: nn.Module, averages: Mapping[str, nn.Module], weights: str) -> list[str]:
    """Load complete weights, "ema" or "live", into a denoiser and all averages of it; must be called by every rank.

    Returns the parameters that the checkpoint lacks, which keep their initial values. Low-rank matrices and heads are
    not among them. The embedding of t - s starts without effect if it is missing.

    Raises:
        UserError: a tensor has another shape.
    """
    group = group_of(weights)
    stored = stored_parameters(path, group)
    tensors = {
        name: tensor
        for name, tensor in get_model_state_dict(net).items()
        if not lora.is_low_rank(name) and not name.startswith("heads.")
    }
    missing = [name for name in tensors if name not in stored]

    state = {group: {name: tensor for name, tensor in tensors.items() if name in stored}}
    check_fits(path, state)
    dcp.load(state, checkpoint_id=path)
    if any(name.startswith(second_time.PREFIX) for name in missing):
        second_time.silence(net)
    for average in averages.values():
        fsdp.copy_weights(average, net)
    return missing


def without_new(path: Path, group: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, without those of heads and of the embedding of t - s that the checkpoint does not have."""
    stored = stored_tensors(path)
    optional = ("heads.", second_time.PREFIX)
    return {
        name: tensor for name, tensor in tensors.items() if not name.startswith(optional) or f"{group}.{name}" in stored
    }


def load_weights(path: Path, module: nn.Module, weights: str) -> int:
    """Load an unsharded denoiser in a single process; returns the number of finished steps.

    Raises:
        UserError: the checkpoint has no such weights, or those of another denoiser.
    """
    check_has(path, weights)
    load_tensors(path, module.state_dict(), weights)
    return read_step(path)


def load_tensors(path: Path, tensors: dict[str, Tensor], weights: str) -> None:
    """Load only the given tensors (by parameter name, in place) in a single process.

    `weights` is "live", or the name of an average of the weights, such as "ema".
    """
    state = {group_of(weights): tensors}
    check_fits(path, state)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # expected with no_dist
        dcp.load(state, checkpoint_id=path, no_dist=True)


def fingerprint(module: nn.Module) -> str:
    """Identifies a denoiser's weights: a digest of up to 1024 evenly spaced values of each parameter.

    Equal for all copies of the same weights, whatever the file format; changes with every training step. Heads of
    training aids do not count, because sampling leaves them out. All ranks must call it if the weights are sharded.
    """
    digest = Digest()
    for name, parameter in module.named_parameters():
        if not name.startswith("heads."):
            digest.update(name, fsdp.unsharded(parameter.detach()))
    return digest.hexdigest()


class Digest:
    """A digest of named tensors: of their shapes, and up to 1024 evenly spaced values of each."""

    def __init__(self):
        self.hash = hashlib.blake2b(digest_size=8)

    def update(self, name: str, tensor: Tensor) -> None:
        stride = max(1, tensor.numel() // 1024)
        self.hash.update(f"{name} {tuple(tensor.shape)}".encode())
        self.hash.update(tensor.flatten()[::stride].float().cpu().numpy().tobytes())

    def hexdigest(self) -> str:
        return self.hash.hexdigest()


def training_state(net: nn.Module, averages: Mapping[str, nn.Module], optimizer: Optimizer) -> dict:
    """The state dict of a checkpoint, to be saved with `CheckpointManager.begin`: all that is not frozen."""
    state = {"net": trained_state(net, net)}
    state |= {name: trained_state(net, average) for name, average in averages.items()}
    return state | {"optimizer": get_optimizer_state_dict(net, optimizer)}


def stored_tensors(path: Path) -> dict[str, Any]:
    """Descriptions of what a checkpoint holds, by key, such as "ema.out.weight"."""
    return dcp.FileSystemReader(path).read_metadata().state_dict_metadata


def stored_parameters(path: Path, group: str) -> dict[str, torch.Size]:
    """Shapes of the parameters in a group of a checkpoint: "net", or the name of an average."""
    stored = stored_tensors(path)
    return {key.removeprefix(f"{group}."): entry.size for key, entry in stored.items() if key.startswith(f"{group}.")}


def group_of(weights: str) -> str:
    """Where a checkpoint has weights: "live", or the name of an average such as "ema"."""
    return "net" if weights == "live" else weights


def read_parameter(path: Path, name: str, shape: torch.Size, weights: str) -> Tensor:
    """A parameter of a checkpoint, float32 on the host, in a single process."""
    full = torch.empty(shape)
    load_tensors(path, {name: full}, weights)
    return full


def list_weights(path: Path) -> list[str]:
    """The weights in a checkpoint: "net" and the names of its averages."""
    keys = stored_tensors(path)
    parameter = next(key for key in keys if key.startswith("net.")).removeprefix("net.")
    return [key.removesuffix(f".{parameter}") for key in keys if key.endswith(f".{parameter}")]


def check_has(path: Path, weights: str) -> None:
    """Raise UserError unless a checkpoint has these weights: "live", or the name of an average, such as "ema"."""
    stored = ["live" if name == "net" else name for name in list_weights(path)]
    if weights not in stored:
        raise UserError(f"{path}: has no weights {weights!r}; those that it has are {', '.join(stored)}")


def optimizer_problem(path: Path, net: nn.Module, optimizer: Optimizer) -> str | None:
    """Why the state of the optimizer cannot be loaded from a checkpoint; None if it can."""
    stored = stored_tensors(path)
    for parameter, tensors in get_optimizer_state_dict(net, optimizer)["state"].items():
        for name, tensor in tensors.items():
            entry = stored.get(f"optimizer.state.{parameter}.{name}")
            if entry is None or getattr(entry, "size", None) != getattr(tensor, "shape", None):
                return (
                    f"{path}: has no {name} of {parameter}, which trainer.optimizer keeps; use the optimizer of the "
                    "run, or load only other parts of the checkpoint with trainer.init_from"
                )
    return None


def check_fits(path: Path, state: dict[str, dict]) -> None:
    """Raise UserError unless the checkpoint has every tensor of `state` with the same shape; loads nothing."""
    stored = stored_tensors(path)
    for group, tensors in state.items():
        for name, tensor in tensors.items():
            entry = stored.get(f"{group}.{name}")
            if entry is None or entry.size != tensor.shape:
                holds = "does not have it" if entry is None else f"has {tuple(entry.size)}"
                raise UserError(
                    f"{path}: the config's {group}.{name} is {tuple(tensor.shape)}, the checkpoint {holds}; "
                    "use the config.yaml saved with the run"
                )
