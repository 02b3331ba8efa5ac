"""The denoiser's weights for sampling, from a checkpoint of a run or from a folder written by `selfe export`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
from torch import nn

from selfe.checkpoint import adapter, state, verify
from selfe.checkpoint.adapter import AdapterWeights
from selfe.checkpoint.flux import FluxStateDict
from selfe.errors import UserError

SETTINGS = "config.json"  # of an exported folder: step, weights, dtype, backbone


def find_weights(path: Path) -> Path:
    """Resolve a user's path: an exported folder, a checkpoint directory, or a parent directory (newest is used).

    Raises:
        UserError: there is neither.
    """
    return path if is_export(path) else verify.find(path)


def is_export(path: Path) -> bool:
    """Whether a folder was written by `selfe export --format safetensors`."""
    return (path / SETTINGS).is_file() and any(path.glob("model*.safetensors"))


def read_step(path: Path) -> int:
    """Number of finished steps of a checkpoint or of an exported folder."""
    return read_settings(path)["step"] if is_export(path) else verify.read_step(path)


def read_settings(folder: Path) -> dict:
    """What `selfe export` recorded beside the weights. Raises UserError if it is damaged."""
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        settings["step"], settings["weights"]
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{folder / SETTINGS}: not written by selfe export ({error!r})"
        raise UserError(f"{problem}; export the run again") from error
    return settings


def load_weights(path: Path, net: nn.Module, weights: str) -> int:
    """Load an unsharded denoiser in a single process; returns the number of finished steps.

    Its heads of training aids are removed: sampling does not need them.

    Raises:
        UserError: the weights do not fit the denoiser, or an exported folder has those of the other kind.
    """
    remove_heads(net)
    if not is_export(path):
        if record := adapter.read_record(path):
            state.check_has(path, weights)
            shapes = {name: parameter.shape for name, parameter in net.named_parameters()}
            AdapterWeights(path, record, shapes, partial(state.read_parameter, path, weights=weights)).load(net)
            return verify.read_step(path)
        return state.load_weights(path, net, weights)

    settings = read_settings(path)
    stored = settings["weights"]
    if stored != weights:
        raise UserError(f"{path}: has {stored} weights only, {weights} ones are asked for; set weights to {stored}")
    source = FluxStateDict.of(path, {name: parameter.shape for name, parameter in net.named_parameters()})
    if source.missing or source.left_over:
        names = ", ".join([*source.missing, *source.left_over][:3])
        raise UserError(f"{path}: its tensors are not those of system.backbone ({names}); export the run again")
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(source.read(name))
    return settings["step"]


def remove_heads(net: nn.Module) -> None:
    """Remove what training aids have added to a denoiser, see `Backbone.add_head`."""
    if hasattr(net, "heads"):
        net.heads = nn.ModuleDict()
