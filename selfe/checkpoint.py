"""Checkpoints: what one holds, how a good one is told from a damaged one, loaded on any number of processes.

A run keeps them as `<run>/checkpoints/step_00001000/`, in torch's distributed checkpoint format. `step` counts finished
steps, which is all of a run's progress: order, times and noise are functions of it. The marker, written last, holds
size and checksum of every file. `saving.py` writes them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.optim import Optimizer
from torch.serialization import skip_data

from selfe import device, dist, log
from selfe.dist import Group, World
from selfe.types import UserError

Part = Literal["model", "ema", "optimizer", "step"]
PARTS: tuple[Part, ...] = get_args(Part)
MARKER = "progress.json"  # written last: a folder without it is not a checkpoint
METADATA = ".metadata"  # torch's: which tensor lies where
CHUNK = 1 << 22  # bytes that are read or written at once
ALIGNMENT = 64  # of a tensor's first byte, in its file and within what torch.save writes


@dataclass(frozen=True)
class InitFrom:
    """Parts of another run's checkpoint. Of `model` and `ema`, one that is not named takes the other's weights."""

    path: str  # a checkpoint, or a folder of them: then the newest
    parts: tuple[Part, ...] = ("model", "ema")

    def __post_init__(self):
        if not {"model", "ema"} & set(self.parts):
            raise ValueError(f"parts must name model or ema, got {list(self.parts)}")


class Memory(FileSystem):
    """Where torch's writer puts the one file that is asked of it here, `.metadata`."""

    @contextmanager
    def create_stream(self, path: Path, mode: str) -> Iterator[io.BytesIO]:
        self.file = io.BytesIO()
        yield self.file

    def mkdir(self, path: Path) -> None: ...

    def exists(self, path: Path) -> bool:
        return False

    def rename(self, path: Path, new_path: Path) -> None: ...


class Draft(dcp.FileSystemWriter):
    """This rank's part of a checkpoint, in host memory as it will be on the disk: a save copies the state's numbers to
    their places and writes the whole in large pieces.

    Which rank writes what, and `.metadata`, depend on names, shapes and types alone, so torch plans them once, with
    this as its storage. What takes Python's lock per tensor would otherwise run beside every save's training steps.
    """

    def __init__(self, state: dict, world: World, group: Group):
        """Called by every rank; the numbers are not copied yet."""
        super().__init__(Path(), sync_files=False)
        self.world, self.fs, self.planner = world, Memory(), dcp.DefaultSavePlanner()
        self.files: dict[str, memoryview] = {}  # by name, those that this rank writes
        self.num_bytes = 0  # of the files of all ranks; known on the main one
        dcp.save(state, storage_writer=self, planner=self.planner, process_group=group)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """A place for every item of this rank, instead of a file."""
        name = f"{plan.storage_data.prefix}0.distcp"
        self.items, self.places, results, frames, end = plan.items, [], [], {}, 0
        for item in self.items:
            before, size, after = frame(planner.resolve_data(item))
            start, length = end + len(before), len(before) + size + len(after)
            self.places.append(slice(start, start + size))
            frames |= {end: before, start + size: after}
            results.append(WriteResult(item.index, length, _StorageInfo(name, end, length)))
            end = -(-(end + length) // ALIGNMENT) * ALIGNMENT
        image = host_memory(end, self.world)
        self.files[name] = memoryview(image.numpy())
        for start, part in frames.items():
            self.files[name][start : start + len(part)] = part
        self.places = [
            image[place].view(data.dtype).view(data.shape) if isinstance(data, Tensor) else self.files[name][place]
            for place, data in zip(self.places, map(planner.resolve_data, self.items), strict=True)
        ]
        done = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the main rank, with what all ranks have placed."""
        super().finish(metadata, results)
        self.files[METADATA] = self.fs.file.getbuffer()
        self.num_bytes = sum(result.size_in_bytes for of_rank in results for result in of_rank)

    def storage_meta(self) -> None:
        """Not in `.metadata`: it would name a folder."""

    def fill(self, state: dict) -> bool:
        """Copy a state's numbers to their places; False if it is not laid out as the one this was made for."""
        self.planner.set_up_planner(state)
        data = [self.planner.resolve_data(item) for item in self.items]
        pairs = list(zip(self.places, data, strict=True))
        tensors = [(place, value.detach()) for place, value in pairs if isinstance(place, Tensor)]
        others = [(place, value.getbuffer()) for place, value in pairs if not isinstance(place, Tensor)]
        if any(place.shape != value.shape or place.dtype != value.dtype for place, value in tensors):
            return False
        if any(len(place) != len(value) for place, value in others):
            return False
        for place, value in others:
            place[:] = value
        torch._foreach_copy_(*map(list, zip(*tensors, strict=True)), non_blocking=True)
        device.synchronize()
        return True

    def write(self, folder: Path) -> dict[str, list[int]]:
        """This rank's files into a folder, synced to the disk: {name: [bytes, checksum]}."""
        return {name: put(folder / name, data) for name, data in self.files.items()}


def host_memory(num_bytes: int, world: World) -> Tensor:
    """(n,) uint8, for fast copies from an accelerator pinned: torch's stager pins no more than it is asked for."""
    on_device = world.device.type != "cpu"
    options = StagingOptions(on_device, False, False, on_device)
    return DefaultStager(options).stage({"": torch.zeros(num_bytes, dtype=torch.uint8)})[""]


def frame(data: Tensor | io.BytesIO) -> tuple[bytes, int, bytes]:
    """What torch.save writes before and after the numbers of a tensor, and how many bytes these are."""
    if isinstance(data, Tensor):
        return blank(data.shape, data.dtype)
    return b"", len(data.getbuffer()), b""


@lru_cache(maxsize=1024)
def blank(shape: torch.Size, dtype: torch.dtype) -> tuple[bytes, int, bytes]:
    file, tensor = io.BytesIO(), torch.empty(shape, dtype=dtype)
    with skip_data():
        torch.save(tensor, file)
    file.seek(0)
    with FakeTensorMode():
        start = torch.load(file, weights_only=True).untyped_storage()._checkpoint_offset if tensor.numel() else 0
    return file.getvalue()[:start], tensor.nbytes, file.getvalue()[start + tensor.nbytes :]


def put(path: Path, data: memoryview) -> list[int]:
    """Write a file and sync it: [bytes, checksum]. Python's lock is free meanwhile."""
    value = 0
    with path.open("wb") as file:
        for start in range(0, len(data), CHUNK):
            piece = data[start : start + CHUNK]
            value = zlib.crc32(piece, value)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return [len(data), value]


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
        state["optimizer"] = get_optimizer_state_dict(net, optimizer)
    dcp.load(state, checkpoint_id=path)
    if "optimizer" in parts:
        set_optimizer_state_dict(net, optimizer, state["optimizer"])
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
