"""FLUX's transformer with a second time s (arXiv 2512.22374, s.9-s.10). Copied into exported pipelines, which diffusers
loads with trust_remote_code; imports nothing from selfe."""

from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings, TimestepEmbedding

# read now: diffusers may copy the code of another model over this file later
CODE = Path(__file__).read_text(encoding="utf-8")
# diffusers executes this file again for every pipeline that it loads
EARLIER = {name: globals().get(name) for name in ("DualTimeFlux", "TimesAndPooledText")}


class DualTimeFlux(FluxTransformer2DModel):
    """V(x_t, t, s, c). Only the time embedding differs from FLUX, so tools for a FLUX transformer apply."""

    code = CODE
    ignore_for_config = ["guidance_embeds", "out_channels", "patch_size"]  # noqa: RUF012 - of the base class, fixed

    @register_to_config
    def __init__(
        self,
        in_channels: int = 64,
        num_layers: int = 8,
        num_single_layers: int = 16,
        attention_head_dim: int = 128,
        num_attention_heads: int = 16,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        second_time: bool = True,
    ):
        """
        Args:
            second_time: embed t - s as well; without it, s is ignored.
        """
        super().__init__(
            in_channels=in_channels,
            num_layers=num_layers,
            num_single_layers=num_single_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            pooled_projection_dim=pooled_projection_dim,
            axes_dims_rope=tuple(axes_dims_rope),
        )
        self.time_text_embed = TimesAndPooledText(self.inner_dim, pooled_projection_dim, second_time)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        t: torch.Tensor,
        s: torch.Tensor,
        img_ids: torch.Tensor,
        txt_ids: torch.Tensor,
    ) -> torch.Tensor:
        """Velocity noise - x0 (B, n, in_channels), for tokens of the same shape and captions of one length.

        Args:
            t, s: times (B,) in [0, 1], float32.
        """
        emb = self.time_text_embed.embed(t, s, pooled_projections)
        return super().forward(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=emb,
            timestep=t,
            img_ids=img_ids,
            txt_ids=txt_ids,
            return_dict=False,
        )[0]


class TimesAndPooledText(CombinedTimestepTextProjEmbeddings):
    """Embedding of t, t - s and the pooled caption as one vector.

    The base model rounds times to half precision. `embed` is therefore called beforehand with float32 times, and
    `forward`, called by the base model, returns its result unchanged.
    """

    def __init__(self, embedding_dim: int, pooled_projection_dim: int, second_time: bool):
        super().__init__(embedding_dim, pooled_projection_dim)
        self.second_embedder = TimestepEmbedding(256, embedding_dim) if second_time else None

    def embed(self, t: torch.Tensor, s: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        emb = self.timestep_embedder(self.time_proj(1000 * t).to(pooled.dtype))
        if self.second_embedder is not None:
            emb = emb + self.second_embedder(self.time_proj(1000 * (t - s)).to(pooled.dtype))
        return emb + self.text_embedder(pooled)

    def forward(self, timestep: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        return embedded


if getattr(EARLIER["DualTimeFlux"], "code", None) == CODE:
    globals().update(EARLIER)  # one class for all models of this code: serialisation looks it up by name
