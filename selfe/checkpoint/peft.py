"""The low-rank matrices of a fine-tuning run as files that other libraries read: PEFT's, and diffusers'."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from selfe.backbones import lora
from selfe.checkpoint import flux
from selfe.checkpoint.adapter import AdapterRecord

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # of PEFT
DIFFUSERS = "pytorch_lora_weights.safetensors"  # the name that `load_lora_weights` looks for
PREFIX = "base_model.model."  # of all names in PEFT's files


def write_peft(folder: Path, matrices: Mapping[str, Tensor], record: AdapterRecord, dtype: torch.dtype) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained(MMDiT(...), folder)` loads.

    Args:
        matrices: all low-rank matrices, by parameter name.
    """
    tensors = {PREFIX + name: tensor.to(dtype) for name, tensor in matrices.items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "r": record.rank,
        "lora_alpha": record.alpha,
        "target_modules": [name.removesuffix(lora.A) for name in matrices if name.endswith(lora.A)],
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_diffusers(
    folder: Path, matrices: Mapping[str, Tensor], record: AdapterRecord, dtype: torch.dtype, width: int
) -> None:
    """Write a file that `load_lora_weights` of an exported pipeline loads; `width` is that of the denoiser.

    The factor alpha / rank is multiplied into B, because readers take it for 1 where a file does not have it.
    """
    tensors = {}
    for name, a in matrices.items():
        if not name.endswith(lora.A):
            continue
        layer = name.removesuffix(lora.A)
        b = record.scale * matrices[layer + lora.B]

        # diffusers stores the parts of a fused layer as layers of their own: they share A, and each has its rows of B
        for theirs, rows in flux.split("diffusers", f"{layer}.weight", b, width).items():
            prefix = f"transformer.{theirs.removesuffix('.weight')}"
            tensors[prefix + lora.A] = a.to(dtype, copy=True)
            tensors[prefix + lora.B] = rows.to(dtype).contiguous()
    save_file(tensors, folder / DIFFUSERS, {"format": "pt"})
