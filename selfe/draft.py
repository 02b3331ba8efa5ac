"""A checkpoint's files before they are files: laid out in host memory once, filled and written at every save."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from zipfile import ZipFile

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.serialization import skip_data

from selfe import device
from selfe.checkpoint import CHUNK
from selfe.dist import Group, World

METADATA = ".metadata"  # torch's: which tensor lies where
ALIGNMENT = 64  # of a tensor's first byte, in its file and within what torch.save writes


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

    Which rank writes what, and `.metadata`, depend on names, shapes and types alone. So torch plans them once, with
    this as its storage, and nothing is left that takes Python's lock tensor by tensor while training goes on.
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
        self.names, self.items = planner.state_dict.keys(), plan.items
        starts, results, frames, end = [], [], {}, 0
        values = self.values()
        for item, value in zip(self.items, values, strict=True):
            is_tensor = item.type != WriteItemType.BYTE_IO
            before, after = frame(value.shape, value.dtype) if is_tensor else (b"", b"")
            starts.append(end + len(before))
            frames |= {end: before, starts[-1] + value.nbytes: after}
            length = len(before) + value.nbytes + len(after)
            results.append(WriteResult(item.index, length, _StorageInfo(name, end, length)))
            end = -(-(end + length) // ALIGNMENT) * ALIGNMENT
        image = host_memory(end, self.world)
        self.files[name] = memoryview(image.numpy())
        for start, part in frames.items():
            self.files[name][start : start + len(part)] = part
        self.places = [
            image[start : start + value.nbytes].view(value.dtype).view(value.shape)
            for start, value in zip(starts, values, strict=True)
        ]
        done = Future()
        done.set_result(results)
        return done

    def values(self) -> list[Tensor]:
        """What the planner's state holds of this rank's items; those that are no tensors as bytes."""
        found = map(self.planner.resolve_data, self.items)
        return [
            value.detach() if isinstance(value, Tensor) else torch.frombuffer(value.getbuffer(), dtype=torch.uint8)
            for value in found
        ]

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
        if self.planner.state_dict.keys() != self.names:
            return False
        pairs = list(zip(self.places, self.values(), strict=True))
        if any((place.shape, place.dtype) != (value.shape, value.dtype) for place, value in pairs):
            return False
        for place, value in pairs:
            place.copy_(value, non_blocking=True)
        device.synchronize()
        return True

    def write(self, folder: Path) -> dict[str, list[int]]:
        """This rank's files into a folder, synced to the disk: {name: [bytes, checksum]}."""
        return {name: put(folder / name, data) for name, data in self.files.items()}


def host_memory(num_bytes: int, world: World) -> Tensor:
    """(n,) uint8, pinned beside an accelerator; by torch's stager, because tensors that ask for it themselves get up to
    twice as much."""
    pinned = world.device.type != "cpu"
    options = StagingOptions(
        use_pinned_memory=pinned, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
    )
    return DefaultStager(options).stage({"": torch.zeros(num_bytes, dtype=torch.uint8)})[""]


@lru_cache(maxsize=1024)
def frame(shape: torch.Size, dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What torch.save writes before and after the numbers of such a tensor: a zip file's heads and directory.

    Its checksum of the numbers stays empty: torch.load does not look at it, and ours covers the whole.
    """
    file, tensor = io.BytesIO(), torch.empty(shape, dtype=dtype)
    with skip_data():
        torch.save(tensor, file)
    written = file.getvalue()
    with ZipFile(file) as members:
        head = next(member.header_offset for member in members.infolist() if member.filename.endswith("/data/0"))
    start = head + 30 + sum(struct.unpack_from("<HH", written, head + 26))  # the lengths of its name and padding
    return written[:start], written[start + tensor.nbytes :]


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
