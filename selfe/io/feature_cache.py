"""A cache of frozen encoder outputs: bf16 tensors by key in safetensors files, with an index of their offsets.

DIR/fingerprint.json            settings the cache was built with; checked before training
DIR/config.yaml                 config for training from the cache
DIR/latents/  text/  pooled/    one `Store` each
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_left
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from selfe import compare
from selfe.types import BadSample, UserError

FIELDS = "high:<u8 low:<u8 offset:<u8 shard:<u4 width:<u4 rows:<u2 columns:<u2"  # high and low: the 128-bit key
RECORD = np.dtype([tuple(field.split(":")) for field in FIELDS.split()])
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

    def read(self, key: str, name: str) -> Tensor:
        """The entry of a key, (rows, columns, width), bf16. `name` describes it in error messages.

        Raises:
            BadSample: kind `not cached`.
            UserError: a shard is truncated.
        """
        # binary search for the first half of the key, then a scan for the second
        high, low = int(key[:16], 16), int(key[16:], 16)
        at = bisect_left(self.records["high"], high)
        while at < len(self.records) and self.records["high"][at] == high and self.records["low"][at] != low:
            at += 1
        if at == len(self.records) or self.records["high"][at] != high:
            raise BadSample("not cached", f"{self.folder}: does not contain {name}; {AGAIN}")

        # read the tensor by its offset
        record = self.records[at]
        shape = [int(record[name]) for name in ("rows", "columns", "width")]
        size = 2 * shape[0] * shape[1] * shape[2]
        found = os.pread(self.opened(int(record["shard"])).fileno(), size, int(record["offset"]))
        if len(found) < size:
            raise UserError(f"{shard_path(self.folder, record['shard'])}: truncated; remove this file and {AGAIN}")
        return torch.frombuffer(bytearray(found), dtype=torch.bfloat16).reshape(shape)


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard_{number:06d}.safetensors"


def write_shard(folder: Path, number: int, entries: Mapping[str, Tensor]) -> None:
    """Write entries, key -> (rows, columns, width), as bf16 under a temporary name, then rename the file."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = shard_path(folder, number).with_suffix(".partial")
    save_file({key: tensor.to(torch.bfloat16).contiguous().cpu() for key, tensor in entries.items()}, aside)
    aside.rename(shard_path(folder, number))


def write_index(folder: Path, num_shards: int) -> None:
    """Write the index of a directory of complete shards, from the safetensors headers."""
    found = []
    for number in range(num_shards):
        with shard_path(folder, number).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for key, entry in header.items():
            rows, columns, width = entry["shape"]
            offset = 8 + length + entry["data_offsets"][0]
            found.append((int(key[:16], 16), int(key[16:], 16), offset, number, width, rows, columns))

    # sorted by key, for binary search
    records = np.array(found, RECORD)
    aside = folder / "entries.partial"
    records[np.argsort(records["high"], kind="stable")].tofile(aside)
    aside.rename(folder / "entries.index")


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
