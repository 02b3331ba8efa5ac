"""Checkpoints: what one holds, how a good one is told from a damaged one, loaded on any number of processes.

A run keeps them as `<run>/checkpoints/step_00001000/`, in torch's distributed checkpoint format. `step` counts finished
steps, which is all of a run's progress: order, times and noise are functions of it. The marker, written last, holds
size and checksum of every file. `draft.py` and `saving.py` write them.
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from selfe import dist, log
from selfe.dist import World
from selfe.types import UserError

Part = Literal["model", "ema", "optimizer", "step"]
PARTS: tuple[Part, ...] = get_args(Part)
MARKER = "progress.json"  # written last: a folder without it is not a checkpoint
CHUNK = 1 << 22  # bytes that are read or written at once


@dataclass(frozen=True)
class InitFrom:
    """Parts of another run's checkpoint. Of `model` and `ema`, one that is not named takes the other's weights."""

    path: str  # a checkpoint, or a folder of them: then the newest
    parts: tuple[Part, ...] = ("model", "ema")

    def __post_init__(self):
        if not {"model", "ema"} & set(self.parts):
            raise ValueError(f"parts must name model or ema, got {list(self.parts)}")


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def load(path: Path, net: nn.Module, ema: nn.Module, optimizer: Optimizer | None, parts: Sequence[Part] = PARTS) -> int:
    """Load parts of a training state in place; called by every rank. Returns the finished steps, 0 without `step`.

    Of `model` and `ema`, one that is not asked for gets the weights of the other.
    """
    names = {"model": "net", "ema": "ema", "optimizer": "optimizer"}
    modules = {"model": net, "ema": ema}
    state = {names[part]: get_model_state_dict(modules[part]) for part in modules if part in parts}
    check_fits(path, state)
    if "optimizer" in parts:
        asked = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        state["optimizer"] = get_optimizer_state_dict(net, optimizer)
    dcp.load(state, checkpoint_id=path)
    if "optimizer" in parts:
        set_optimizer_state_dict(net, optimizer, state["optimizer"])
        for group, settings in zip(optimizer.param_groups, asked, strict=True):
            group.update(settings)  # moments go on; weight decay and the like are the config's
    for there, missing in (("model", "ema"), ("ema", "model")):
        if missing not in parts:
            set_model_state_dict(modules[missing], state[names[there]])
    return read_step(path) if "step" in parts else 0


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


def newest_good(folder: Path, world: World) -> Path | None:
    """The newest checkpoint of a run that is as it was written, checksums included; called by every rank.

    One that is not is told and left alone, and the one before it is tried. A run that has nothing but damaged ones must
    not start again from nothing unasked: that raises.
    """
    paths = dist.broadcast(candidates(folder), world)
    for path in paths:
        # each rank reads its share of the files
        found = dist.gather(damage(path, world.rank, world.size), world)
        problem = dist.broadcast(next(filter(None, found), None), world)
        if problem is None:
            return path
        if world.is_main:
            log.say(f"{path}: damaged, left alone ({problem}); trying the one before it")
    if paths:
        raise UserError(f"{folder}: no checkpoint is readable; move them away to start again from the first step")
    return None


def candidates(folder: Path) -> list[Path]:
    """A run's checkpoints, whole or not, the newest first."""
    return sorted((path for path in folder.glob("step_*") if path.name[5:].isdecimal()), reverse=True)


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint in a run's checkpoint folder, judged by the sizes of its files."""
    return next((path for path in candidates(folder) if is_whole(path)), None)


def find(path: Path) -> Path:
    """The checkpoint that a user means: a checkpoint itself, or the newest one in a folder of them."""
    found = path if is_whole(path) else latest(path)
    if found is None:
        remedy = "name a folder step_... of a run's checkpoints, or their parent"
        if not path.is_dir():
            raise UserError(f"{path}: no such checkpoint folder; {remedy}")
        if path.name.startswith("step_"):
            raise UserError(f"{path}: incomplete checkpoint ({damage(path, contents=False)}); {remedy}")
        raise UserError(f"{path}: holds no complete checkpoint; {remedy}")
    return found


def is_whole(path: Path) -> bool:
    return damage(path, contents=False) is None


def damage(path: Path, rank: int = 0, size: int = 1, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint or None: a rank's share of its files, by size and (`contents`) checksum."""
    try:
        marker = read_marker(path)
        if path.name[5:].isdecimal() and marker["step"] != int(path.name[5:]):
            return f"{MARKER} speaks of step {marker['step']}"
        for name, (length, crc) in sorted(marker["files"].items())[rank::size]:
            if (found := (path / name).stat().st_size) != length:
                return f"{name} has {found} of {length} bytes"
            if contents and checksum(path / name) != crc:
                return f"the checksum of {name} is wrong"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError) as error:
        return f"{MARKER} cannot be read: {error!r}"
    return None


def read_marker(path: Path) -> dict:
    return json.loads((path / MARKER).read_text())


def read_step(path: Path) -> int:
    return read_marker(path)["step"]


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
