"""The denoiser's weights under the names that others use: black-forest-labs' FLUX files and diffusers' folders.

A tensor of ours is one tensor there, or several laid end to end (diffusers keeps q, k, v and the MLP apart). The second
clock, which FLUX lacks, is named like the first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from selfe.dist import fill
from selfe.encoders.flux_vae import STAGES
from selfe.types import UserError
from selfe.weights import Weights

Style = Literal["bfl", "diffusers"]
OURS = "a FLUX transformer: the names of black-forest-labs or of diffusers"
EDGES = {  # ours: black-forest-labs, diffusers
    "image_in": ("img_in", "x_embedder"),
    "text_in": ("txt_in", "context_embedder"),
    "t_in.0": ("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
    "t_in.2": ("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
    "s_in.0": ("s_in.in_layer", "time_text_embed.second_embedder.linear_1"),
    "s_in.2": ("s_in.out_layer", "time_text_embed.second_embedder.linear_2"),
    "pooled_in.0": ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    "pooled_in.2": ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
    "out_modulation": ("final_layer.adaLN_modulation.1", "norm_out.linear"),
    "out": ("final_layer.linear", "proj_out"),
}
DOUBLE = {
    "image.modulation": ("img_mod.lin", "norm1.linear"),
    "image.qkv_in": ("img_attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    "image.qk_norm.q_norm": ("img_attn.norm.query_norm", "attn.norm_q"),
    "image.qk_norm.k_norm": ("img_attn.norm.key_norm", "attn.norm_k"),
    "image.attention_out": ("img_attn.proj", "attn.to_out.0"),
    "image.mlp.0": ("img_mlp.0", "ff.net.0.proj"),
    "image.mlp.2": ("img_mlp.2", "ff.net.2"),
    "text.modulation": ("txt_mod.lin", "norm1_context.linear"),
    "text.qkv_in": ("txt_attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "text.qk_norm.q_norm": ("txt_attn.norm.query_norm", "attn.norm_added_q"),
    "text.qk_norm.k_norm": ("txt_attn.norm.key_norm", "attn.norm_added_k"),
    "text.attention_out": ("txt_attn.proj", "attn.to_add_out"),
    "text.mlp.0": ("txt_mlp.0", "ff_context.net.0.proj"),
    "text.mlp.2": ("txt_mlp.2", "ff_context.net.2"),
}
SINGLE = {
    "modulation": ("modulation.lin", "norm.linear"),
    "qkv_mlp_in": ("linear1", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "qk_norm.q_norm": ("norm.query_norm", "attn.norm_q"),
    "qk_norm.k_norm": ("norm.key_norm", "attn.norm_k"),
    "attention_mlp_out": ("linear2", "proj_out"),
}
BLOCKS = {"double_blocks": (DOUBLE, "transformer_blocks"), "single_blocks": (SINGLE, "single_transformer_blocks")}


def names_in(style: Style, name: str) -> tuple[str, ...]:
    """Where a parameter of ours lies in the other format, part after part."""
    module, _, kind = name.rpartition(".")
    if block := re.fullmatch(r"(double_blocks|single_blocks)\.(\d+)\.(.+)", module):
        stack, number, inner = block.groups()
        table, theirs = BLOCKS[stack]
        prefix = f"{stack if style == 'bfl' else theirs}.{number}."
    else:
        table, inner, prefix = EDGES, module, ""
    bfl, *diffusers = table[inner]
    if style == "bfl":
        kind = "scale" if bfl.endswith("_norm") else kind
        return (f"{prefix}{bfl}.{kind}",)
    return tuple(f"{prefix}{part}.{kind}" for part in diffusers)


def split(style: Style, name: str, tensor: Tensor, width: int) -> dict[str, Tensor]:
    """A parameter of ours as the other format has it."""
    names = names_in(style, name)
    sizes = [width] * (len(names) - 1)
    return dict(zip(names, swapped(style, name, tensor).split([*sizes, len(tensor) - sum(sizes)]), strict=True))


def swapped(style: Style, name: str, tensor: Tensor) -> Tensor:
    """diffusers' last modulation is (scale, shift), all others are (shift, scale). Its own inverse."""
    if style == "diffusers" and name.startswith("out_modulation."):
        return torch.cat(tensor.chunk(2)[::-1])
    return tensor


VAE = (  # FLUX.1's names: diffusers'
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\3samplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)


def vae_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The autoencoder's tensors as diffusers' AutoencoderKL has them."""
    out = {}
    for name, tensor in state.items():
        for ours, theirs in VAE:
            name = re.sub(ours, theirs, name)
        # FLUX.1 counts the decoder's stages from the finest up, diffusers in the order they run
        name = re.sub(r"up_blocks\.(\d+)", lambda stage: f"up_blocks.{len(STAGES) - 1 - int(stage[1])}", name)
        linear = ".attentions.0.to_" in name and tensor.ndim == 4
        out[name] = tensor[:, :, 0, 0] if linear else tensor
    return out


@dataclass(frozen=True)
class Import:
    """What a file of FLUX weights has for a denoiser of ours."""

    weights: Weights
    style: Style
    used: tuple[str, ...]  # names of ours
    missing: tuple[str, ...]  # names of ours
    left_over: tuple[str, ...]  # names of the file

    @classmethod
    def of(cls, path: Path, wanted: Mapping[str, torch.Size]) -> Import:
        """Match a file, its shards or their folder with the parameters of a denoiser.

        Raises:
            UserError: it is no FLUX transformer, or a tensor has another shape.
        """
        remedy = f"trainer.init_from takes {OURS}, as .safetensors file, index of shards, or their folder"
        weights = Weights.open(path, remedy)
        style: Style = "bfl" if any(name.startswith("double_blocks.") for name in weights.shapes) else "diffusers"
        sources = {name: names_in(style, name) for name in wanted}
        used = tuple(name for name, parts in sources.items() if weights.shapes.keys() >= set(parts))
        if not used:
            raise UserError(f"{path}: no tensor of the file is known; {remedy}")
        taken = {part for name in used for part in sources[name]}
        found = cls(
            weights,
            style,
            used,
            missing=tuple(name for name in wanted if name not in used),
            left_over=tuple(sorted(weights.shapes.keys() - taken)),
        )
        for name in used:
            shapes = [weights.shapes[part] for part in sources[name]]
            if (sum(shape[0] for shape in shapes), *shapes[0][1:]) != tuple(wanted[name]):
                raise UserError(
                    f"{path}: {' + '.join(sources[name])} is {' + '.join(map(str, shapes))}, system.backbone wants "
                    f"{tuple(wanted[name])}; give system.backbone.params the sizes of the file"
                )
        return found

    def read(self, name: str) -> Tensor:
        """A parameter of ours, in the dtype of the file."""
        parts = [self.weights.read(part) for part in names_in(self.style, name)]
        return swapped(self.style, name, torch.cat(parts) if len(parts) > 1 else parts[0])

    def tell(self, file: Path) -> str:
        """Write `report` to a file; returns a line that sums it up."""
        file.write_text(self.report(), encoding="utf-8")
        counts = f"{len(self.used)} tensors taken, {len(self.missing)} not in it, {len(self.left_over)} left over"
        return f"starting from {self.weights.path}: {counts}; names in {file}"

    def report(self) -> str:
        """Every name, one a line."""
        groups = {
            f"taken from {self.weights.path}": self.used,
            "not in the file, left at their start": self.missing,
            "in the file, not used": self.left_over,
        }
        lines = [line for title, names in groups.items() for line in (f"# {len(names)} {title}", *names)]
        return "\n".join(lines) + "\n"


def holds_weights(path: Path) -> bool:
    """A safetensors file, an index of shards, or a folder with either; a checkpoint is something else."""
    return path.suffix in (".safetensors", ".json") or any(path.glob("*.safetensors"))


@torch.no_grad()
def warm_start(path: Path, *modules: nn.Module) -> Import:
    """Fill sharded denoisers, all alike, from a FLUX file. A second clock that the file lacks starts without effect."""
    found = Import.of(path, {name: p.shape for name, p in modules[0].named_parameters()})
    for name in found.used:
        full = found.read(name)
        for module in modules:
            fill(module.get_parameter(name), full)
    for name in found.missing:
        if name.startswith("s_in.2."):
            for module in modules:
                module.get_parameter(name).zero_()
    return found
