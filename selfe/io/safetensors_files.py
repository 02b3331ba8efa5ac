"""Weights in a safetensors file, or in shards with an index, read tensor by tensor or as row slices.

No file stays open between reads, so that mapped pages are released and peak memory is that of the tensors kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from selfe.types import UserError

INDEX = ".safetensors.index.json"
SHARD_BYTES = 4 * 10**9
AGAIN = "download it again with scripts/cache_pretrained_only.sh"


@dataclass(frozen=True)
class SafetensorsFiles:
    """Named tensors in safetensors files."""

    path: Path  # as given by the user
    files: dict[str, Path]  # tensor name -> file
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def open(cls, path: Path, remedy: str = AGAIN) -> SafetensorsFiles:
        """Open a file, an index of shards, or a directory that contains exactly one of these.

        Raises:
            UserError: a file is missing, truncated or not safetensors; the message ends with `remedy`.
        """
        files, shapes = {}, {}
        for file in shards(path, remedy):
            try:
                with safe_open(file, "pt") as tensors:
                    found = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: cannot be read ({str(error).splitlines()[0]}); {remedy}") from error
            files |= dict.fromkeys(found, file)
            shapes |= found
        return cls(path, files, shapes)

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """A tensor, or a slice of its rows, in CPU memory."""
        with safe_open(self.files[name], "pt") as tensors:
            return tensors.get_slice(name)[rows] if self.shapes[name] else tensors.get_tensor(name)

    def expect(self, wanted: Mapping[str, tuple[int, ...]], what: str, remedy: str = AGAIN) -> None:
        """Check that all wanted tensors are present with their shapes; others are allowed. `what` names the model.

        Raises:
            UserError: a tensor is missing or has another shape.
        """
        for name, shape in wanted.items():
            if (found := self.shapes.get(name)) != tuple(shape):
                holds = "nothing" if found is None else found
                raise UserError(f"{self.path}: {name}: the file contains {holds}, {what} has {tuple(shape)}; {remedy}")


def shards(path: Path, remedy: str) -> list[Path]:
    """The safetensors files of a path: the file itself, the shards of an index, or those of a directory."""
    if path.is_dir():
        indices, files = sorted(path.glob(f"*{INDEX}")), sorted(path.glob("*.safetensors"))
        if len(indices or files) != 1:
            kinds = f"one *.safetensors file or one *{INDEX}"
            raise UserError(f"{path}: the directory must contain {kinds}, found {len(indices or files)}; {remedy}")
        path = (indices or files)[0]

    if not path.is_file():
        raise UserError(f"{path}: no such file; {remedy}")
    if not path.name.endswith(INDEX):
        return [path]

    try:
        names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        return [path.parent / name for name in sorted(names)]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: not an index of safetensors shards; {remedy}") from error


def write(folder: Path, stem: str, sizes: Mapping[str, int], make: Callable[[str], dict[str, Tensor]]) -> list[str]:
    """Write tensors as safetensors shards, with an index if there are several; returns the file names.

    `make(name)` returns the tensors of an entry of `sizes[name]` bytes. One shard at a time is held in memory.
    """
    # group entries into shards, in order
    groups, room = [[]], SHARD_BYTES
    for name, size in sizes.items():
        if groups[-1] and size > room:
            groups.append([])
            room = SHARD_BYTES
        groups[-1].append(name)
        room -= size

    # write each shard under a temporary name and rename it
    places = {}
    for number, group in enumerate(groups, start=1):
        tensors = {name: tensor for key in group for name, tensor in make(key).items()}
        file = f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else f"{stem}.safetensors"
        save_file(tensors, folder / f"{file}.part", metadata={"format": "pt"})
        (folder / f"{file}.part").replace(folder / file)
        places |= dict.fromkeys(tensors, file)

    files = list(dict.fromkeys(places.values()))
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (folder / f"{stem}{INDEX}").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        files.append(f"{stem}{INDEX}")
    return files


def cached(cache_dir: Path | None, name: str) -> Path:
    """The path of a pretrained model in the cache directory.

    Raises:
        UserError: `cache_dir` is not set or lacks the model; the message names the download script.
    """
    remedy = "run scripts/cache_pretrained_only.sh, or set SELFE_SKIP_PRETRAINED=1 for random weights"
    if cache_dir is None:
        raise UserError(
            f"{name} is needed, but SELFE_CACHE_DIR is not set; set it to the directory of the weights, {remedy}"
        )

    path = Path(cache_dir) / name
    if not path.exists():
        raise UserError(f"{path}: not found in SELFE_CACHE_DIR; {remedy}")
    return path
