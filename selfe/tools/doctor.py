"""The verb `selfe doctor`: what this machine offers to a training run, a line for each check, with its remedy.

With a config, the frozen encoders that it names are checked, otherwise what `selfe cache-pretrained` has downloaded.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from selfe import config, device
from selfe.encoders import hf_folder
from selfe.encoders.t5_clip import CLIP_FOLDER, T5_FOLDER
from selfe.errors import UserError
from selfe.io.model_folder import find_model
from selfe.io.safetensors_files import SafetensorsFiles, cached
from selfe.tools.cache_pretrained import read_record

HF_VISION = "selfe.encoders.hf_vision.HFVision"
GIB = 2**30
SHARED_MEMORY = 2 * GIB  # enough for the loader workers of a process with the default settings
OPEN_FILES = 4096
WEIGHTS = {"t5": T5_FOLDER, "clip": CLIP_FOLDER, "autoencoder": "ae.safetensors"}  # in SELFE_CACHE_DIR
# those of WEIGHTS that a part reads
READS = {
    "selfe.encoders.t5_clip.T5Clip": (T5_FOLDER, CLIP_FOLDER),
    "selfe.encoders.flux_vae.FluxVAE": ("ae.safetensors",),
}


@dataclass(frozen=True)
class CheckResult:
    """The result of one check."""

    subject: str
    status: Literal["ok", "warning", "error"]
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.status:8} {self.subject:14} {self.text}{remedy}"


def main(options: argparse.Namespace) -> None:
    """Print all results. Raises UserError if one is an error."""
    settings = options.config and config.load(options.config, options.overrides)
    results = list(examine(options.cache_dir, options.output_dir, settings))
    for result in results:
        print(result)

    num_errors = sum(result.status == "error" for result in results)
    if num_errors:
        raise UserError(f"{num_errors} of {len(results)} checks failed; the lines above name the remedies")


def examine(cache_dir: str | None, output_dir: Path, settings: dict | None = None) -> Iterator[CheckResult]:
    """All results.

    Args:
        cache_dir: weights of the frozen encoders.
        output_dir: where runs are written.
        settings: of a config, whose encoders are checked.
    """
    yield CheckResult("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield torch_build()
    yield from accelerators()
    yield shared_memory(Path("/dev/shm"))
    yield open_files()
    yield disk(output_dir)
    if settings is None:
        yield from encoder_weights(cache_dir)
    else:
        yield from encoders_of(settings, cache_dir)


def torch_build() -> CheckResult:
    """Version of torch, and whether its build fits the machine: a GPU needs a build for CUDA."""
    driver = driver_version()
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    text = f"{torch.__version__}, build for {build}"
    if driver and not torch.version.cuda:
        return CheckResult("torch", "error", f"{text}, but there is a GPU", "install the build of torch for its driver")
    if driver and not torch.cuda.is_available():
        remedy = f"install the build of torch that fits driver {driver}, or a newer driver"
        return CheckResult("torch", "error", f"{text}, which cannot use the GPU", remedy)
    return CheckResult("torch", "ok", text)


def driver_version() -> str | None:
    """Version of the NVIDIA driver, None without one."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None


def accelerators() -> Iterator[CheckResult]:
    """Accelerators that torch can use, and the library that connects them; without one, the CPU."""
    count = device.accelerator_count()
    if not count:
        cores = f"{os.cpu_count()} CPU cores, {torch.backends.cpu.get_cpu_capability()}"
        yield CheckResult("devices", "ok", f"no GPU; processes run on {cores}")
        return

    if not torch.cuda.is_available():
        yield CheckResult("devices", "ok", f"{count} x {device.choose_device(0).type}")
        return

    cards = [torch.cuda.get_device_properties(index) for index in range(count)]
    for name in dict.fromkeys(card.name for card in cards):
        same = [card for card in cards if card.name == name]
        text = f"{len(same)} x {name}, {same[0].total_memory / GIB:.0f} GiB, driver {driver_version()}"
        if device.has_fast_bf16(torch.device("cuda")):
            yield CheckResult("devices", "ok", text)
        else:
            yield CheckResult(
                "devices",
                "warning",
                f"{text}, without bf16",
                "trainer.precision=auto uses fp32, at a fraction of the speed",
            )
    yield CheckResult("nccl", "ok", ".".join(map(str, torch.cuda.nccl.version())))


def shared_memory(folder: Path) -> CheckResult:
    """Room in /dev/shm, through which loader workers pass their batches."""
    if not folder.is_dir():
        return CheckResult("shared memory", "ok", f"no {folder} on this system")
    size = shutil.disk_usage(folder).total
    if size < SHARED_MEMORY:
        remedy = "start the container with --shm-size=8g or --ipc=host, or train with trainer.num_workers=0"
        return CheckResult("shared memory", "warning", f"{folder} holds only {size / 2**20:.0f} MiB", remedy)
    return CheckResult("shared memory", "ok", f"{folder} holds {size / GIB:.1f} GiB")


def open_files() -> CheckResult:
    """The limit on open files; workers and shards need many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < OPEN_FILES:
        remedy = f"raise it with ulimit -n {OPEN_FILES if hard < 0 else min(OPEN_FILES, hard)}"
        return CheckResult("open files", "warning", f"at most {soft} per process", remedy)
    return CheckResult("open files", "ok", f"at most {soft} per process")


def disk(output_dir: Path) -> CheckResult:
    """Free space where runs are written, and whether they can be."""
    parent = output_dir.expanduser().resolve()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free / GIB
    if not os.access(parent, os.W_OK):
        return CheckResult("disk", "error", f"{parent} is not writable", "choose another trainer.output_dir")
    if free < 10:
        remedy = "`selfe plan CONFIG` states what the checkpoints of a run need"
        return CheckResult("disk", "warning", f"{free:.1f} GiB free in {parent}", remedy)
    return CheckResult("disk", "ok", f"{free:.0f} GiB free in {parent}")


def encoder_weights(cache_dir: str | None) -> Iterator[CheckResult]:
    """Whether the weights of the frozen encoders are in the cache folder, with readable headers."""
    if cache_dir is None:
        remedy = "`selfe cache-pretrained` downloads the weights; SELFE_SKIP_PRETRAINED=1 replaces them by random ones"
        yield CheckResult("encoders", "warning", "SELFE_CACHE_DIR is not set", remedy)
        return

    for subject, name in WEIGHTS.items():
        try:
            weights = SafetensorsFiles.open(cached(cache_dir, name))
        except UserError as error:
            yield CheckResult(subject, "warning", str(error))
        else:
            yield CheckResult(subject, "ok", described(weights))

    # models that were downloaded by name
    folders = {entry.rpartition("/")[0] for entry in read_record(Path(cache_dir))}
    for name in sorted(folders - {".", *WEIGHTS.values()}):
        try:
            weights = SafetensorsFiles.open(Path(cache_dir) / name)
        except UserError as error:
            yield CheckResult("model", "error", str(error), "run selfe cache-pretrained for it again")
        else:
            yield CheckResult("model", "ok", described(weights))


def encoders_of(settings: dict, cache_dir: str | None) -> Iterator[CheckResult]:
    """Whether the frozen parts of a config find their files, and can be built from them."""
    for name in ("text_encoder", "autoencoder"):
        pretrained = list(config.pretrained_parts(settings["system"][name], name))
        if not pretrained:
            yield CheckResult(name, "ok", f"{settings['system'][name]['module']} needs no files")
        for path, part in pretrained:
            try:
                yield CheckResult(path.split(".")[-1], "ok", check_part(path, part, cache_dir))
            except UserError as error:
                yield CheckResult(path.split(".")[-1], "error", str(error))

    # the encoder of a training aid, whose features precompute stores
    for part in feature_encoders(settings["system"].get("objective", {})):
        try:
            yield CheckResult("features", "ok", check_part("objective", part, cache_dir))
        except UserError as error:
            yield CheckResult("features", "error", str(error))


def feature_encoders(objective: dict) -> Iterator[dict]:
    """The vision encoders of an objective, or of those that it holds."""
    for value in (objective.get("params") or {}).values():
        if isinstance(value, dict) and value.get("module") == HF_VISION:
            yield value
        elif isinstance(value, dict):
            yield from feature_encoders(value)


def check_part(path: str, part: dict, cache_dir: str | None) -> str:
    """What a pretrained part at a key path of `system` reads; config and tokenizer are loaded, weights only opened.

    Raises:
        UserError: a file is missing, damaged or of another model.
    """
    part = part | {"params": part["params"] | ({"cache_dir": cache_dir} if cache_dir else {})}
    params = part["params"]
    if params.get("skip_pretrained"):
        return f"{part['module']} has random weights (skip_pretrained)"
    if names := READS.get(part["module"]):
        return ", ".join(described(SafetensorsFiles.open(cached(params.get("cache_dir"), name))) for name in names)

    encoder = config.build_part(part, f"system.{path}")
    if part["module"] != HF_VISION:  # which has no load without weights
        encoder.load(torch.device("meta"))
    if part["module"] == "selfe.encoders.hf_text.HFText":
        folder = hf_folder.model_folder(encoder.model, encoder.cache_dir)
    else:
        folder = find_model(encoder.model, encoder.cache_dir, f"system.{path}.params.model", "download it")
    return described(SafetensorsFiles.open(folder))


def described(weights: SafetensorsFiles) -> str:
    return f"{len(weights.shapes)} tensors in {weights.path}"
