"""A cache of what frozen encoders give: bf16 tensors by key in safetensors files, and an index to read one by offset.

DIR/fingerprint.json    what it was made from; training compares
DIR/config.yaml         the configuration to train from it
DIR/latents/  text/  pooled/    a `Store` each
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from selfe.types import BadSample, UserError

FIELDS = "high:<u8 low:<u8 offset:<u8 shard:<u4 width:<u4 rows:<u2 columns:<u2"  # the first two are the key
RECORD = np.dtype([tuple(field.split(":")) for field in FIELDS.split()])
PLAIN = (str, int, float, bool, tuple, type(None), torch.dtype)
ELSEWHERE = {"cache_dir", "decode_pixels"}  # where weights lie, or how much is decoded at a time, changes no entry
AGAIN = "run selfe precompute again"


def digest(text: str) -> str:
    """The key of an entry: a caption, or what `latent_key` says of a picture."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def latent_key(split: str, source: int, index: int, shape: tuple[int, int], flipped: bool) -> str:
    return digest(f"{split} {source} {index} {shape[0]}x{shape[1]}{' flipped' if flipped else ''}")


class Store:
    """Tensors (rows, columns, width) of a folder by key."""

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / "entries.index").is_file():
            raise UserError(f"{folder}: no finished cache; {AGAIN}")
        self.records = np.memmap(folder / "entries.index", RECORD, "r")
        self.opened = lru_cache(maxsize=64)(lambda number: shard_path(folder, number).open("rb", buffering=0))

    def __reduce__(self) -> tuple:
        return Store, (self.folder,)

    def read(self, key: str, name: str) -> Tensor:
        """The entry of a key, bf16.

        Raises:
            BadSample: kind `not cached`; `name` is how the message calls it.
        """
        high, low = int(key[:16], 16), int(key[16:], 16)
        at = bisect_left(self.records["high"], high)
        while at < len(self.records) and self.records["high"][at] == high and self.records["low"][at] != low:
            at += 1
        if at == len(self.records) or self.records["high"][at] != high:
            raise BadSample("not cached", f"{self.folder}: does not hold {name}; {AGAIN}")
        record = self.records[at]
        shape = [int(record[name]) for name in ("rows", "columns", "width")]
        size = 2 * shape[0] * shape[1] * shape[2]
        found = os.pread(self.opened(int(record["shard"])).fileno(), size, int(record["offset"]))
        if len(found) < size:
            raise UserError(f"{shard_path(self.folder, record['shard'])}: cut short; remove this file and {AGAIN}")
        return torch.frombuffer(bytearray(found), dtype=torch.bfloat16).reshape(shape)


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard_{number:06d}.safetensors"


def write_shard(folder: Path, number: int, entries: Mapping[str, Tensor]) -> None:
    """Key -> (rows, columns, width), written aside and renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = shard_path(folder, number).with_suffix(".partial")
    save_file({key: tensor.to(torch.bfloat16).contiguous().cpu() for key, tensor in entries.items()}, aside)
    aside.rename(shard_path(folder, number))


def write_index(folder: Path, num_shards: int) -> None:
    """Index all entries of a folder of whole shards, by the headers of the files."""
    found = []
    for number in range(num_shards):
        with shard_path(folder, number).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for key, entry in header.items():
            rows, columns, width = entry["shape"]
            offset = 8 + length + entry["data_offsets"][0]
            found.append((int(key[:16], 16), int(key[16:], 16), offset, number, width, rows, columns))
    records = np.array(found, RECORD)
    aside = folder / "entries.partial"
    records[np.argsort(records["high"], kind="stable")].tofile(aside)
    aside.rename(folder / "entries.index")


# ---- what a cache was made from ----


def describe(name: str, part: Any) -> dict[str, str]:
    """The settings of a part that is built but not loaded, by key path."""
    plain = {k: v for k, v in vars(part).items() if isinstance(v, PLAIN) or is_dataclass(v)}
    return {f"{name}.module": type(part).__qualname__} | {
        f"{name}.{key}": str(value) for key, value in plain.items() if key not in ELSEWHERE
    }


def check(folder: Path, facts: Mapping[str, str]) -> None:
    """Facts must be those of the cache, as far as both speak of the same parts.

    Raises:
        UserError: there is no cache, or it says otherwise; names what changed.
    """
    path = folder / "fingerprint.json"
    if not path.is_file():
        raise UserError(f"{folder}: no such cache; make it with selfe precompute CONFIG --out {folder}")
    parts = {key.split(".")[0] for key in facts}
    stored = {key: value for key, value in json.loads(path.read_text()).items() if key.split(".")[0] in parts}
    changed = [
        f"{key} was {stored.get(key, 'not set')}, is now {facts.get(key, 'not set')}"
        for key in sorted(stored.keys() | facts.keys())
        if stored.get(key) != facts.get(key)
    ]
    if changed:
        raise UserError(f"{folder}: the cache is stale: {'; '.join(changed)}; make another with selfe precompute")
