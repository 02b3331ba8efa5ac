"""Weights on disk: a safetensors file, or shards beside their index, read tensor by tensor and row by row.

No file stays open between two reads, so that loading costs the memory of what is kept, not that of the file.
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
AGAIN = "fetch it again with scripts/cache_pretrained_only.sh"


@dataclass(frozen=True)
class SafetensorsFiles:
    """Named tensors in safetensors files."""

    path: Path  # as the user named it
    files: dict[str, Path]  # of each tensor
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def open(cls, path: Path, remedy: str = AGAIN) -> SafetensorsFiles:
        """The tensors of a file, of the files an index names, or of a folder that holds one of the two.

        Raises:
            UserError: nothing is there, or a file is cut short or of another kind; ends with `remedy`.
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
        """A tensor, or only these rows of it, on the host."""
        with safe_open(self.files[name], "pt") as tensors:
            return tensors.get_slice(name)[rows] if self.shapes[name] else tensors.get_tensor(name)

    def expect(self, wanted: Mapping[str, tuple[int, ...]], what: str, remedy: str = AGAIN) -> None:
        """Every tensor of `what` must be here with its shape; others may be."""
        for name, shape in wanted.items():
            if (found := self.shapes.get(name)) != tuple(shape):
                holds = "nothing" if found is None else found
                raise UserError(f"{self.path}: {name}: the file holds {holds}, {what} has {tuple(shape)}; {remedy}")


def shards(path: Path, remedy: str) -> list[Path]:
    """The safetensors files that a path stands for."""
    if path.is_dir():
        indices, files = sorted(path.glob(f"*{INDEX}")), sorted(path.glob("*.safetensors"))
        if len(indices or files) != 1:
            kinds = f"one *.safetensors file or one *{INDEX}"
            raise UserError(f"{path}: the folder must hold {kinds}, found {len(indices or files)}; {remedy}")
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
    """Tensors as safetensors in shards, with an index if there are several; returns the names of the files.

    `make(name)` gives the tensors behind a name, of `sizes[name]` bytes. Only one shard is in memory.
    """
    groups, room = [[]], SHARD_BYTES
    for name, size in sizes.items():
        if groups[-1] and size > room:
            groups.append([])
            room = SHARD_BYTES
        groups[-1].append(name)
        room -= size
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


def cached(cache_dir: str | None, name: str) -> Path:
    """The path of a frozen part's files, or one line that says how to get them."""
    remedy = "run scripts/cache_pretrained_only.sh, or set SELFE_SKIP_PRETRAINED=1 for random weights"
    if cache_dir is None:
        raise UserError(
            f"{name} is needed, but SELFE_CACHE_DIR is not set; set it to the folder of the weights, {remedy}"
        )
    path = Path(cache_dir) / name
    if not path.exists():
        raise UserError(f"{path}: not found in SELFE_CACHE_DIR; {remedy}")
    return path
