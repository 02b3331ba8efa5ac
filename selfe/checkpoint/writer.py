"""Checkpoint writer: file buffers in host memory, planned once, then filled and written at every save."""

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
from selfe.checkpoint.verify import CHUNK
from selfe.distributed.collectives import Group, World

METADATA = ".metadata"  # torch's index of tensors and their locations
ALIGNMENT = 64  # of tensor data in a file, in bytes; torch.save uses the same


class Memory(FileSystem):
    """An in-memory file system for torch's writer, which only writes `.metadata` here."""

    @contextmanager
    def create_stream(self, path: Path, mode: str) -> Iterator[io.BytesIO]:
        self.file = io.BytesIO()
        yield self.file

    def mkdir(self, path: Path) -> None: ...

    def exists(self, path: Path) -> bool:
        return False

    def rename(self, path: Path, new_path: Path) -> None: ...


class Draft(dcp.FileSystemWriter):
    """Host-memory buffers of the checkpoint files that this rank writes.

    The assignment of tensors to ranks and `.metadata` depend on names, shapes and dtypes only, so torch plans them
    once, with this object as storage writer. A save then copies tensor values into the buffers and writes these in
    large chunks, without per-tensor Python work that would hold the GIL during training.
    """

    def __init__(self, state: dict, world: World, group: Group):
        """Plan the files for a state; must be called by every rank. Values are not copied yet."""
        super().__init__(Path(), sync_files=False)
        self.world, self.fs, self.planner = world, Memory(), dcp.DefaultSavePlanner()
        self.files: dict[str, memoryview] = {}  # name -> contents, for the files this rank writes
        self.num_bytes = 0  # size of all ranks' files; known on rank 0 only
        dcp.save(state, storage_writer=self, planner=self.planner, process_group=group)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Reserve space for every item of this rank, instead of writing a file."""
        # Byte offsets of every item, framed as torch.save would write it.
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

        # Allocate the file buffer, write the frames, and keep views of where values go.
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
        """The values of this rank's items; items that are not tensors are returned as uint8 bytes."""
        found = map(self.planner.resolve_data, self.items)
        return [
            value.detach() if isinstance(value, Tensor) else torch.frombuffer(value.getbuffer(), dtype=torch.uint8)
            for value in found
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called on rank 0 with the results of all ranks: keeps `.metadata` and the total size."""
        super().finish(metadata, results)
        self.files[METADATA] = self.fs.file.getbuffer()
        self.num_bytes = sum(result.size_in_bytes for of_rank in results for result in of_rank)

    def storage_meta(self) -> None:
        """Omitted from `.metadata`, because it would record a folder name."""

    def fill(self, state: dict) -> bool:
        """Copy the values of a state into the buffers; False if names, shapes or dtypes differ from the plan."""
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
        """Write and sync this rank's files to a folder. Returns {name: [size in bytes, CRC-32]}."""
        return {name: put(folder / name, data) for name, data in self.files.items()}


def host_memory(num_bytes: int, world: World) -> Tensor:
    """Allocate (n,) uint8 host memory, pinned if there is an accelerator.

    Uses torch's stager, because `pin_memory` may allocate up to twice the requested size.
    """
    pinned = world.device.type != "cpu"
    options = StagingOptions(
        use_pinned_memory=pinned, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
    )
    return DefaultStager(options).stage({"": torch.zeros(num_bytes, dtype=torch.uint8)})[""]


@lru_cache(maxsize=1024)
def frame(shape: torch.Size, dtype: torch.dtype) -> tuple[bytes, bytes]:
    """The bytes that torch.save writes before and after the values of such a tensor (zip headers and directory).

    The zip checksum of the values is left empty: torch.load ignores it, and the marker stores one for the entire file.
    """
    file, tensor = io.BytesIO(), torch.empty(shape, dtype=dtype)
    with skip_data():
        torch.save(tensor, file)
    written = file.getvalue()
    with ZipFile(file) as members:
        head = next(member.header_offset for member in members.infolist() if member.filename.endswith("/data/0"))
    start = (
        head + 30 + sum(struct.unpack_from("<HH", written, head + 26))
    )  # lengths of name and padding in the local header
    return written[:start], written[start + tensor.nbytes :]


def put(path: Path, data: memoryview) -> list[int]:
    """Write and sync a file, releasing the GIL during I/O and checksums. Returns [size in bytes, CRC-32]."""
    value = 0
    with path.open("wb") as file:
        for start in range(0, len(data), CHUNK):
            piece = data[start : start + CHUNK]
            value = zlib.crc32(piece, value)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return [len(data), value]
