"""Checkpoints: written aside, renamed when whole, found by wholeness, loaded on any number of processes.

A run keeps them as `<run>/checkpoints/step_00001000/`, in torch's distributed checkpoint format. `step` counts finished
steps, which is all of a run's progress: order, times and noise are functions of it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Literal

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from selfe.dist import World, barrier
from selfe.types import UserError

MARKER = "progress.json"  # written last: a folder without it is not a checkpoint


def save(folder: Path, step: int, net: nn.Module, ema: nn.Module, optimizer: Optimizer, world: World) -> Path:
    """Write a checkpoint of `step` finished steps into `folder`; called by every rank. Returns its path."""
    final, aside = folder / f"step_{step:08d}", folder / f"step_{step:08d}.partial"
    if world.is_main:
        for leftover in (aside, final):
            if leftover.exists():
                shutil.rmtree(leftover)
        aside.mkdir(parents=True)
    barrier()
    dcp.save(training_state(net, ema, optimizer), checkpoint_id=aside)
    if world.is_main:
        (aside / MARKER).write_text(json.dumps({"step": step, "processes": world.size}) + "\n")
        aside.rename(final)
    barrier()
    return final


def resume(path: Path, net: nn.Module, ema: nn.Module, optimizer: Optimizer) -> int:
    """Load a training state in place and return the number of finished steps; called by every rank."""
    state = training_state(net, ema, optimizer)
    check_fits(path, {"net": state["net"], "ema": state["ema"]})
    dcp.load(state, checkpoint_id=path)
    set_optimizer_state_dict(net, optimizer, state["optimizer"])
    return read_step(path)


def load_weights(path: Path, module: nn.Module, weights: Literal["ema", "live"]) -> int:
    """Load a plain, unsharded denoiser in one process; returns the number of finished steps."""
    load_tensors(path, module.state_dict(), weights)
    return read_step(path)


def load_tensors(path: Path, tensors: dict[str, Tensor], weights: Literal["ema", "live"]) -> None:
    """Fill some of a denoiser's tensors in one process, reading no others."""
    state = {"net" if weights == "live" else weights: tensors}
    check_fits(path, state)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is what no_dist asks for
        dcp.load(state, checkpoint_id=path, no_dist=True)


def fingerprint(module: nn.Module) -> str:
    """A name for a denoiser's weights: a digest of up to 1024 numbers of each parameter, evenly spread.

    The same for every copy of a checkpoint, whatever wrote it; any step of training changes it.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in module.named_parameters():
        stride = max(1, parameter.numel() // 1024)
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().flatten()[::stride].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def training_state(net: nn.Module, ema: nn.Module, optimizer: Optimizer) -> dict:
    return {
        "net": get_model_state_dict(net),
        "ema": get_model_state_dict(ema),
        "optimizer": get_optimizer_state_dict(net, optimizer),
    }


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint in a run's checkpoint folder."""
    whole = [path for path in folder.glob("step_*[0-9]") if is_whole(path)]
    return max(whole, default=None)


def find(path: Path) -> Path:
    """The checkpoint that a user means: a checkpoint itself, or the newest one in a folder of them."""
    found = path if is_whole(path) else latest(path)
    if found is None:
        remedy = "name a folder step_... of a run's checkpoints, or their parent"
        if not path.is_dir():
            raise UserError(f"{path}: no such checkpoint folder; {remedy}")
        kind = "incomplete checkpoint" if path.name.startswith("step_") else "holds no complete checkpoint"
        raise UserError(f"{path}: {kind} ({MARKER} or .metadata is missing); {remedy}")
    return found


def is_whole(path: Path) -> bool:
    return (path / MARKER).is_file() and (path / ".metadata").is_file()


def read_step(path: Path) -> int:
    return json.loads((path / MARKER).read_text())["step"]


def check_fits(path: Path, state: dict[str, dict]) -> None:
    """Every tensor of `state` must be in the checkpoint with its shape, before any is loaded."""
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    for group, tensors in state.items():
        for name, tensor in tensors.items():
            entry = stored.get(f"{group}.{name}")
            if entry is None or entry.size != tensor.shape:
                holds = "does not hold it" if entry is None else f"holds {tuple(entry.size)}"
                raise UserError(
                    f"{path}: the config's {group}.{name} is {tuple(tensor.shape)}, the checkpoint {holds}; "
                    "use the config.yaml that lies beside the run"
                )
