"""The settings of a run that has started, for tools that load its checkpoints on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from selfe import compare, config

SAMPLING = ("num_steps", "cfg_scale", "s_ratio", "guidance_interval", "sampler")  # settings of sample grids


def load_settings(path: Path, trust: bool) -> dict:
    """Settings of a run's `config.yaml`, with the pretrained encoders of this machine and without feature caches.

    The file records where the encoders were during training. SELFE_CACHE_DIR, if set, takes its place.

    Args:
        trust: the file may name modules that are not part of this package, which runs their code.
    """
    settings = config.load(path, trust=trust)
    settings["system"] = compare.uncached(settings["system"])
    if folder := os.environ.get("SELFE_CACHE_DIR"):
        for name, part in settings["system"].items():
            for _, pretrained in config.pretrained_parts(part, name):
                pretrained["params"]["cache_dir"] = folder
    return settings


def image_size(settings: dict) -> tuple[int, int] | None:
    """Height and width of the images that a run's settings ask for: its sample grids, or its inferencer's images."""
    if size := settings.get("trainer", {}).get("samples", {}).get("size"):
        return tuple(size)
    defaults = settings.get("inferencer", {}).get("defaults", {})
    return (defaults["height"], defaults["width"]) if {"height", "width"} <= defaults.keys() else None


def sampling_defaults(settings: dict) -> dict[str, Any]:
    """Values of `inferencer.defaults` that a run's settings ask for: its inferencer's, otherwise its sample grids'."""
    grids = settings.get("trainer", {}).get("samples", {})
    shared = {name: grids[name] for name in SAMPLING if name in grids}
    return shared | settings.get("inferencer", {}).get("defaults", {})


def example_prompts(settings: dict) -> list[str]:
    """The prompts that a run's settings name: its inferencer's, otherwise those of its sample grids."""
    own = settings.get("inferencer", {}).get("prompts")
    return list(own or settings.get("trainer", {}).get("samples", {}).get("prompts", ()))
