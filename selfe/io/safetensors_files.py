"""Weights in a safetensors file, or in shards with an index, read tensor by tensor or as row slices.

No file stays open between reads, so that mapped pages are released and peak memory is that of the tensors kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from selfe.errors import UserError

INDEX = ".safetensors.index.json"
SHARD_BYTES = 4 * 10**9
AGAIN = "download it again with scripts/cache_pretrained_only.sh"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
FULL_PRECISION = "use the bf16, fp16 or fp32 weights of this model"
# Names that quantisation tools give to tensors beside a weight: scale_weight and scaled_fp8 (ComfyUI), SCB,
# weight_format, absmax, quant_map and quant_state (bitsandbytes), weight_scale_inv (DeepSeek), qweight, qzeros, scales
# and g_idx (GPTQ, AWQ), zero_point, weight_packed (compressed-tensors).
QUANTISED = re.compile(r"scale|SCB|absmax|quant|qweight|qzeros|g_idx|zero_point|weight_(format|packed)")


@dataclass(frozen=True)
class SafetensorsFiles:
    """Named tensors in safetensors files."""

    path: Path  # as given by the user
    files: dict[str, Path]  # tensor name -> file
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]  # as safetensors names them: F32, BF16, F8_E4M3, I8, ...

    @classmethod
    def open(cls, path: Path, remedy: str = AGAIN) -> SafetensorsFiles:
        """Open a file, an index of shards, or a directory that contains exactly one of these.

        Raises:
            UserError: a file is missing, truncated or not safetensors; the message ends with `remedy`.
        """
        files, shapes, dtypes = {}, {}, {}
        for file in shards(path, remedy):
            refuse_pointer(file, remedy)
            try:
                with safe_open(file, "pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 - a safetensors file is not iterable
                        header = tensors.get_slice(name)
                        files[name], dtypes[name] = file, header.get_dtype()
                        shapes[name] = tuple(header.get_shape())
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: cannot be read ({str(error).splitlines()[0]}); {remedy}") from error
        return cls(path, files, shapes, dtypes)

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """A tensor, or a slice of its rows, in CPU memory."""
        with safe_open(self.files[name], "pt") as tensors:
            return tensors.get_slice(name)[rows] if self.shapes[name] else tensors.get_tensor(name)

    def expect(self, wanted: Mapping[str, tuple[int, ...]], what: str, remedy: str = AGAIN) -> None:
        """Check that all wanted tensors are present with their shapes, in floating point and not quantised; others are
        allowed. `what` names the model.

        Raises:
            UserError: a tensor is missing, quantised or has another shape.
        """
        self.refuse_quantised(wanted)
        for name, shape in wanted.items():
            if (stored := self.shapes.get(name)) != tuple(shape):
                contains = "nothing" if stored is None else stored
                raise UserError(
                    f"{self.path}: {name}: the file contains {contains}, {what} has {tuple(shape)}; {remedy}"
                )

    def refuse_quantised(self, wanted: Iterable[str]) -> None:
        """Check that the wanted tensors are plain numbers. Quantised weights have the right names and shapes, but are
        meaningless without the scales stored beside them.

        Raises:
            UserError: names the file and the first tensor that shows quantisation.
        """
        wanted = set(wanted)
        modules = {name.rpartition(".")[0] for name in wanted} - {""}

        # A scale beside a wanted weight: x.scale_weight or x.weight.absmax beside x.weight.
        for name in sorted(self.shapes.keys() - wanted):
            module = next((parent for parent in parents(name) if parent in modules), None)
            if module is not None and QUANTISED.search(name[len(module) :]):
                raise UserError(f"{self.files[name]}: {name}: the weights are quantised; {FULL_PRECISION}")
        if mark := self.files.get("scaled_fp8"):
            raise UserError(f"{mark}: scaled_fp8: the weights are quantised; {FULL_PRECISION}")

        for name in sorted(self.shapes.keys() & wanted):
            if not self.dtypes[name].startswith(("F", "BF")):
                raise UserError(
                    f"{self.files[name]}: {name}: stored as {self.dtypes[name]}, the weights are quantised; "
                    f"{FULL_PRECISION}"
                )

        config = (self.path if self.path.is_dir() else self.path.parent) / "config.json"
        of_this_model = config.is_file() and self.path.suffix != ".safetensors"
        if of_this_model and "quantization_config" in read_json(config):
            raise UserError(f"{config}: quantization_config: the weights are quantised; {FULL_PRECISION}")


def parents(name: str) -> Iterator[str]:
    """The modules that contain a tensor, innermost first: a.b.c -> a.b, a."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def shards(path: Path, remedy: str) -> list[Path]:
    """The safetensors files of a path: the file itself, the shards of an index, or those of a directory."""
    if path.is_dir():
        indices, files = sorted(path.glob(f"*{INDEX}")), sorted(path.glob("*.safetensors"))
        if len(indices or files) != 1:
            kinds = f"one *.safetensors file or one *{INDEX}"
            raise UserError(f"{path}: the directory must contain {kinds}, found {len(indices or files)}; {remedy}")
        path = (indices or files)[0]

    # the shards of an index
    if not path.is_file():
        raise UserError(f"{path}: no such file; {remedy}")
    if not path.name.endswith(INDEX):
        return [path]

    refuse_pointer(path, remedy)
    try:
        names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        return [path.parent / name for name in sorted(names)]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: not an index of safetensors shards; {remedy}") from error


def refuse_pointer(path: Path, remedy: str = AGAIN) -> None:
    """Raise UserError if a file is a git-LFS pointer, which a clone without git-LFS leaves in place of a large file."""
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise UserError(f"{path}: a git-LFS pointer, not the file itself; run git lfs pull, or {remedy}")


def read_json(path: Path, remedy: str = AGAIN) -> dict[str, Any]:
    """The object in a JSON file of a pretrained model.

    Raises:
        UserError: the file is missing, a git-LFS pointer, or not a JSON object.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; {remedy}")
    refuse_pointer(path, remedy)

    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON, the file is damaged; {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, the file is damaged; {remedy}")
    return value


def write(folder: Path, stem: str, sizes: Mapping[str, int], make: Callable[[str], dict[str, Tensor]]) -> list[str]:
    """Write tensors as safetensors shards, with an index if there are several; returns the file names.

    `make(name)` returns the tensors of an entry of `sizes[name]` bytes. One shard at a time is held in memory.
    """
    split = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern=stem + "{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )

    # write each shard under a temporary name and rename it
    places = {}
    for file, entries in split.filename_to_tensors.items():
        tensors = {}
        for entry in entries:
            tensors |= make(entry)
        save_file(tensors, folder / f"{file}.part", metadata={"format": "pt"})
        (folder / f"{file}.part").replace(folder / file)
        places |= dict.fromkeys(tensors, file)

    files = list(split.filename_to_tensors)
    if split.is_sharded:
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
        raise UserError(f"{path}: not found; set SELFE_CACHE_DIR to the directory of the weights, {remedy}")
    return path
