"""Conversion between this denoiser's parameter names and FLUX state dicts (black-forest-labs and diffusers).

A parameter maps to one tensor of the other format, or to several concatenated along dimension 0 (diffusers stores q, k,
v and the MLP separately). The embedding of t - s, which FLUX lacks, is named after the time embedding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from selfe.backbones import lora
from selfe.checkpoint import second_time
from selfe.distributed.fsdp import fill
from selfe.encoders.flux_vae import STAGES
from selfe.errors import UserError
from selfe.io.safetensors_files import SafetensorsFiles

Style = Literal["bfl", "diffusers"]
OURS = "a FLUX transformer with the tensor names of black-forest-labs or diffusers"
EDGES = {  # this model: (black-forest-labs, *diffusers)
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
OWN = ("heads.", "position.", "image_in.0.", "image_in.1.")  # parameters that FLUX does not have keep their names
BLOCKS = {"double_blocks": (DOUBLE, "transformer_blocks"), "single_blocks": (SINGLE, "single_transformer_blocks")}


def names_in(style: Style, name: str) -> tuple[str, ...]:
    """Names of the tensors that make up a parameter in the other format, in order of concatenation."""
    if name.startswith(OWN):
        return (name,)

    module, _, kind = name.rpartition(".")
    if block := re.fullmatch(r"(double_blocks|single_blocks)\.(\d+)\.(.+)", module):
        stack, index, inner = block.groups()
        table, theirs = BLOCKS[stack]
        prefix = f"{stack if style == 'bfl' else theirs}.{index}."
    else:
        table, inner, prefix = EDGES, module, ""

    bfl, *diffusers = table[inner]
    if style == "bfl":
        kind = "scale" if bfl.endswith("_norm") else kind
        return (f"{prefix}{bfl}.{kind}",)
    return tuple(f"{prefix}{module}.{kind}" for module in diffusers)


def split(style: Style, name: str, tensor: Tensor, width: int) -> dict[str, Tensor]:
    """Convert one parameter to the tensors of the other format. `width` is the width of the model."""
    names = names_in(style, name)
    sizes = [width] * (len(names) - 1)
    return dict(zip(names, swapped(style, name, tensor).split([*sizes, len(tensor) - sum(sizes)]), strict=True))


def swapped(style: Style, name: str, tensor: Tensor) -> Tensor:
    """Swap the halves of the output modulation for diffusers, which stores it as (scale, shift). Its own inverse."""
    if style == "diffusers" and name.startswith("out_modulation."):
        return torch.cat(tensor.chunk(2)[::-1])
    return tensor


VAE = (  # (FLUX.1 pattern, diffusers replacement)
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
    """Convert an autoencoder state dict to the names and shapes of diffusers' AutoencoderKL."""
    out = {}
    for name, tensor in state.items():
        for ours, theirs in VAE:
            name = re.sub(ours, theirs, name)

        # Decoder stage 0 is the finest in FLUX.1, and the first to run (coarsest) in diffusers.
        name = re.sub(r"up_blocks\.(\d+)", lambda stage: f"up_blocks.{len(STAGES) - 1 - int(stage[1])}", name)

        # Attention projections are 1 x 1 convolutions in FLUX.1 and linear layers in diffusers.
        linear = ".attentions.0.to_" in name and tensor.ndim == 4
        out[name] = tensor[:, :, 0, 0] if linear else tensor
    return out


@dataclass(frozen=True)
class FluxStateDict:
    """The tensors of a FLUX checkpoint, matched with the parameters of this denoiser."""

    weights: SafetensorsFiles
    style: Style
    used: tuple[str, ...]  # parameters of the denoiser that the file has
    missing: tuple[str, ...]  # parameters of the denoiser not in the file
    left_over: tuple[str, ...]  # tensors of the file that are not used

    @classmethod
    def of(cls, path: Path, wanted: Mapping[str, torch.Size]) -> FluxStateDict:
        """Match a safetensors file, an index of shards, or a folder with the parameters (name -> shape) of a denoiser.

        Raises:
            UserError: the file is not a FLUX transformer, is quantised, or a shape does not match.
        """
        # Detect the naming style and match names.
        remedy = f"trainer.init_from takes {OURS}, as a .safetensors file, an index of shards, or a folder with either"
        weights = SafetensorsFiles.open(path, remedy)
        style: Style = "bfl" if any(name.startswith("double_blocks.") for name in weights.shapes) else "diffusers"
        sources = {name: names_in(style, name) for name in wanted}
        weights.refuse_quantised(source for tensors in sources.values() for source in tensors)
        used = tuple(name for name, tensors in sources.items() if weights.shapes.keys() >= set(tensors))
        if not used:
            raise UserError(f"{path}: no tensor name is recognised; {remedy}")
        taken = {source for name in used for source in sources[name]}

        # Check shapes of the concatenated tensors.
        for name in used:
            shapes = [weights.shapes[source] for source in sources[name]]
            if (sum(shape[0] for shape in shapes), *shapes[0][1:]) != tuple(wanted[name]):
                raise UserError(
                    f"{path}: {' + '.join(sources[name])} is {' + '.join(map(str, shapes))}, system.backbone expects "
                    f"{tuple(wanted[name])}; set system.backbone.params to the sizes of the file"
                )
        return cls(
            weights,
            style,
            used,
            missing=tuple(name for name in wanted if name not in used),
            left_over=tuple(sorted(weights.shapes.keys() - taken)),
        )

    def read(self, name: str) -> Tensor:
        """Read a parameter of the denoiser, in the dtype of the file."""
        tensors = [self.weights.read(source) for source in names_in(self.style, name)]
        return swapped(self.style, name, torch.cat(tensors) if len(tensors) > 1 else tensors[0])

    def summary(self, file: Path) -> str:
        """Write `report` to a file and return a one-line summary."""
        file.write_text(self.report(), encoding="utf-8")
        counts = f"{len(self.used)} tensors loaded, {len(self.missing)} missing, {len(self.left_over)} unused"
        return f"starting from {self.weights.path}: {counts}; listed in {file}"

    def report(self) -> str:
        """All tensor names, grouped by outcome, one per line."""
        groups = {
            f"loaded from {self.weights.path}": self.used,
            "missing from the file, kept at initialisation": self.missing,
            "in the file, unused": self.left_over,
        }
        lines = [line for title, names in groups.items() for line in (f"# {len(names)} {title}", *names)]
        return "\n".join(lines) + "\n"


def weights_of(path: Path) -> Path:
    """The path, or the folder of the transformer if it is a folder of a diffusers pipeline."""
    return path / "transformer" if (path / "model_index.json").is_file() else path


def holds_weights(path: Path) -> bool:
    """Whether a path is a safetensors file, an index of shards or a folder with either, rather than a checkpoint."""
    return path.suffix in (".safetensors", ".json") or any(path.glob("*.safetensors"))


@torch.no_grad()
def warm_start(path: Path, *modules: nn.Module) -> FluxStateDict:
    """Initialise sharded denoisers of equal architecture from a FLUX file.

    If the file lacks the embedding of t - s, this has no effect at the start. What else the file does not have, such as
    heads of training aids, keeps its initial values.
    """
    shapes = {name: p.shape for name, p in modules[0].named_parameters() if not lora.is_low_rank(name)}
    source = FluxStateDict.of(path, shapes)
    for name in source.used:
        full = source.read(name)
        for module in modules:
            fill(module.get_parameter(name), full)

    if any(name.startswith(second_time.PREFIX) for name in source.missing):
        for module in modules:
            second_time.silence(module)
    return source
