"""A cache of frozen encoder outputs: bf16 tensors by key in safetensors files, with an index of their offsets.

DIR/fingerprint.json            settings the cache was built with; checked before training
DIR/config.yaml                 config for training from the cache
DIR/images.json                 `FileStamp`s of some image files, compared before training
DIR/latents/  text/  pooled/    one `Store` each
DIR/features/                   a `Store` of image features, on the grids of the latents, if the objective wants them

Shards are never written again: entries of images that have changed go to further shards, and the index points to the
last entry of each key.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_left
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from selfe import compare
from selfe.errors import BadSample, UserError
from selfe.io.storage import RemotePath

RECORD = np.dtype(
    [
        ("high", "<u8"),  # the two halves of the 128-bit key
        ("low", "<u8"),
        ("offset", "<u8"),
        ("shard", "<u4"),
        ("width", "<u4"),
        ("rows", "<u2"),
        ("columns", "<u2"),
    ]
)
AGAIN = "run selfe precompute again"


def digest(text: str) -> str:
    """The key of an entry: 32 hex digits of a caption, or of the string that `latent_key` forms for an image."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def latent_key(split: str, source: int, index: int, shape: tuple[int, int], flipped: bool) -> str:
    """The key of the latents of an image at a bucket shape (height, width)."""
    return digest(f"{split} {source} {index} {shape[0]}x{shape[1]}{' flipped' if flipped else ''}")


class Store:
    """Read-only tensors (rows, columns, width) of a directory, by key."""

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / "entries.index").is_file():
            raise UserError(f"{folder}: no complete cache; {AGAIN}")
        self.records = np.memmap(folder / "entries.index", RECORD, "r")
        self.opened = lru_cache(maxsize=64)(lambda number: shard_path(folder, number).open("rb", buffering=0))

    def __reduce__(self) -> tuple:
        return Store, (self.folder,)

    def find(self, key: str) -> int | None:
        """The number of the record of a key; None without one."""
        # binary search for the first half of the key, then a scan for the second
        high, low = int(key[:16], 16), int(key[16:], 16)
        at = bisect_left(self.records["high"], high)
        while at < len(self.records) and self.records["high"][at] == high and self.records["low"][at] != low:
            at += 1
        return at if at < len(self.records) and self.records["high"][at] == high else None

    def read(self, key: str, name: str) -> Tensor:
        """The entry of a key, (rows, columns, width), bf16. `name` describes it in error messages.

        Raises:
            BadSample: kind `not cached`.
            UserError: a shard is truncated.
        """
        at = self.find(key)
        if at is None:
            raise BadSample("not cached", f"{self.folder}: does not contain {name}; {AGAIN}")

        # read the tensor by its offset
        record = self.records[at]
        shape = [int(record[name]) for name in ("rows", "columns", "width")]
        size = 2 * shape[0] * shape[1] * shape[2]
        content = os.pread(self.opened(int(record["shard"])).fileno(), size, int(record["offset"]))
        if len(content) < size:
            raise UserError(f"{shard_path(self.folder, record['shard'])}: truncated; remove this file and {AGAIN}")
        return torch.frombuffer(bytearray(content), dtype=torch.bfloat16).reshape(shape)


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard_{number:06d}.safetensors"


def shard_numbers(folder: Path) -> list[int]:
    """Numbers of the complete shards of a directory, in order."""
    return sorted(int(path.stem.removeprefix("shard_")) for path in folder.glob("shard_*.safetensors"))


def write_shard(
    folder: Path, number: int, entries: Mapping[str, Tensor], stamps: Mapping[str, FileStamp] | None = None
) -> None:
    """Write entries, key -> (rows, columns, width), as bf16 under a temporary name, then rename the file.

    `stamps` of the image files, by key, become metadata; images that could not be read have a stamp and no entry.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = shard_path(folder, number).with_suffix(".partial")
    tensors = {key: tensor.to(torch.bfloat16).contiguous().cpu() for key, tensor in entries.items()}
    metadata = {key: json.dumps(stamp) for key, stamp in (stamps or {}).items()}
    save_file(tensors, partial, metadata or None)
    partial.rename(shard_path(folder, number))


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and its length in bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), length


def read_stamps(path: Path) -> dict[str, FileStamp]:
    """The stamps of the image files of a shard, by key."""
    header, _ = read_header(path)
    return {key: FileStamp(*json.loads(stamp)) for key, stamp in header.get("__metadata__", {}).items()}


def write_index(folder: Path, num_shards: int) -> None:
    """Write the index of a directory, from the headers of its first `num_shards` shards and of those added later."""
    records = {}
    for number in sorted({*range(num_shards), *shard_numbers(folder)}):
        header, length = read_header(shard_path(folder, number))
        for key in header.pop("__metadata__", {}):
            records.pop(key, None)  # of an image that could not be read any more
        for key, entry in header.items():
            rows, columns, width = entry["shape"]
            offset = 8 + length + entry["data_offsets"][0]
            records[key] = (int(key[:16], 16), int(key[16:], 16), offset, number, width, rows, columns)

    # sorted by key, for binary search
    records = np.array(list(records.values()), RECORD)
    partial = folder / "entries.partial"
    records[np.argsort(records["high"], kind="stable")].tofile(partial)
    partial.rename(folder / "entries.index")


# ---- stamps: has an image file changed since it was encoded? ----


class FileStamp(NamedTuple):
    """Identity of the bytes of an image."""

    size: int  # bytes
    modified: int  # time of the last change of its file, ns
    content: str  # digest of sampled bytes


Location = tuple[
    Path | RemotePath, int, int | None
]  # file, offset and number of bytes of an image; None: to the end of the file


def file_stamp(location: Location) -> FileStamp:
    """The stamp of an image now; `ABSENT` if it cannot be read."""
    path, offset, size = location
    try:
        facts = stat(path)
        size = facts.st_size - offset if size is None else size
        if isinstance(path, RemotePath):
            return FileStamp(size, facts.st_mtime_ns, f"{facts.st_mtime_ns:x}")  # the version says enough
        return FileStamp(size, facts.st_mtime_ns, sampled_digest(path, offset, size))
    except OSError:
        return ABSENT


ABSENT = FileStamp(0, 0, "")


def stat(path: Path | RemotePath) -> Any:
    """Size and modification time; of a remote file, its version, for which the store is asked once."""
    return path.known if isinstance(path, RemotePath) else path.stat()


def sampled_digest(path: Path, offset: int, size: int) -> str:
    """Digest of up to 16 KiB at the beginning, in the middle and at the end of these bytes of a file."""
    digest, length = hashlib.blake2b(digest_size=8), 1 << 14
    with path.open("rb", buffering=0) as file:
        for start in sorted({0, max(size // 2 - length // 2, 0), max(size - length, 0)}):
            digest.update(os.pread(file.fileno(), min(length, size), offset + start))
    return digest.hexdigest()


def has_changed(stamp: FileStamp, location: Location) -> bool:
    """Whether an image differs from its stamp. Reads the file only if its size or modification time differs."""
    path, offset, size = location
    try:
        facts = stat(path)
    except OSError:
        return stamp != ABSENT
    size = facts.st_size - offset if size is None else size
    if (size, facts.st_mtime_ns) == (stamp.size, stamp.modified):
        return False
    return size != stamp.size or file_stamp(location).content != stamp.content


# ---- fingerprint: the settings a cache was built with ----


def describe(name: str, part: Any) -> dict[str, Any]:
    """The settings of an encoder that change its entries, by key path."""
    facts = compare.describe(name, part)
    facts.pop(f"{name}.params.decode_pixels", None)  # for decoding only
    return facts


def check(folder: Path, facts: Mapping[str, Any]) -> None:
    """Compare settings with those of the cache. Only components named in `facts` are compared.

    Raises:
        UserError: there is no cache, or it is stale; the message lists the changed settings.
    """
    path = folder / "fingerprint.json"
    if not path.is_file():
        raise UserError(f"{folder}: no such cache; create it with selfe precompute CONFIG --out {folder}")

    parts = {key.split(".")[0] for key in facts}
    stored = {key: value for key, value in json.loads(path.read_text()).items() if key.split(".")[0] in parts}
    changed = [f"{key} was {before}, is now {now}" for key, (before, now) in compare.differences(stored, facts).items()]

    if changed:
        raise UserError(f"{folder}: the cache is stale: {'; '.join(changed)}; create a new one with selfe precompute")
