"""Dual-time MMDiT: the FLUX architecture on packed tokens, with an embedding of t - s (arXiv 2512.22374, S.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from selfe.backbones.attention import attend
from selfe.backbones.packing import PackedLayout, Segments
from selfe.device import to_device
from selfe.errors import UserError
from selfe.rng import philox
from selfe.types import MOST_WIDTH, Packed, TextCond, check_range

SINUSOID = 256  # width of the sinusoidal time embedding


class MMDiT(nn.Module):
    """V(x_t, t, s, c). The defaults are the paper's 2B model; `s_branch=False` gives a plain FLUX-style denoiser."""

    def __init__(
        self,
        patch_dim: int = 64,
        text_dim: int = 4096,
        pooled_dim: int = 768,
        width: int = 2048,
        num_heads: int = 16,
        num_double_blocks: int = 8,
        num_single_blocks: int = 16,
        rope_axes: tuple[int, int, int] = (16, 56, 56),
        rope_theta: float = 10000.0,
        mlp_ratio: float = 4.0,
        s_branch: bool = True,
        learned_grid: tuple[int, int] | None = None,
    ):
        """
        Args:
            patch_dim: width of a token of the autoencoder.
            text_dim: width of a token of the text encoder.
            pooled_dim: width of the pooled vector of the text encoder.
            width: channels of the blocks; num_heads times the sum of rope_axes.
            num_heads: attention heads.
            num_double_blocks: blocks in which text and image have weights of their own.
            num_single_blocks: blocks in which they share weights; these follow the double blocks.
            rope_axes: channels of a head that encode frame, row and column, each even.
            rope_theta: base of the rotary position embedding.
            mlp_ratio: width of the MLPs, in units of `width`.
            s_branch: add an embedding of t - s to the time embedding (s.9-s.10).
            learned_grid: (rows, columns) of the largest image, in patches. Adds a learned position embedding per patch
                on top of RoPE. Not in the paper; helps small networks on images of few patches.
        """
        super().__init__()
        for name, size in {"patch_dim": patch_dim, "text_dim": text_dim, "pooled_dim": pooled_dim}.items():
            check_range(name, size, 1, MOST_WIDTH)
        check_range("width", width, 1, MOST_WIDTH)
        check_range("num_heads", num_heads, 1, width)
        check_range("num_double_blocks", num_double_blocks, 0, 1000)
        check_range("num_single_blocks", num_single_blocks, 0, 1000)
        check_range("rope_axes", rope_axes, 2, MOST_WIDTH)
        check_range("rope_theta", rope_theta, 1, 1e9)
        check_range("mlp_ratio", mlp_ratio, 1 / width, 64)
        check_range("learned_grid", learned_grid, 1, 4096)
        if width != num_heads * sum(rope_axes) or any(axis % 2 for axis in rope_axes):
            raise ValueError(f"rope_axes {rope_axes} must be even and sum to width / num_heads = {width} / {num_heads}")
        self.patch_dim, self.text_dim, self.pooled_dim = patch_dim, text_dim, pooled_dim
        self.width, self.num_heads, self.mlp_ratio = width, num_heads, mlp_ratio
        self.rope_axes, self.rope_theta = rope_axes, rope_theta

        # Input projections, time embeddings and pooled text embedding.
        self.image_in = nn.Linear(patch_dim, width)
        self.learned_grid = learned_grid
        self.position = nn.Embedding(math.prod(learned_grid), width) if learned_grid else None
        self.text_in = nn.Linear(text_dim, width)
        self.t_in = embedder(SINUSOID, width)
        self.s_in = embedder(SINUSOID, width) if s_branch else None
        self.pooled_in = embedder(pooled_dim, width)

        # Transformer blocks and output head.
        self.double_blocks = nn.ModuleList(DoubleBlock(width, num_heads, mlp_ratio) for _ in range(num_double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(width, num_heads, mlp_ratio) for _ in range(num_single_blocks))
        self.out_modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, patch_dim)
        self.weights_of = self.count_weights()

    def output_settings(self) -> dict[str, Any]:
        return {
            "patch_dim": self.patch_dim,
            "text_dim": self.text_dim,
            "pooled_dim": self.pooled_dim,
            "width": self.width,
            "num_heads": self.num_heads,
            "num_double_blocks": len(self.double_blocks),
            "num_single_blocks": len(self.single_blocks),
            "rope_axes": self.rope_axes,
            "rope_theta": self.rope_theta,
            "mlp_ratio": self.mlp_ratio,
            "s_branch": self.s_in is not None,
            "learned_grid": self.learned_grid,
        }

    def forward(self, x_t: Packed, t: Tensor, s: Tensor, cond: TextCond) -> Tensor:
        """x_t (T, patch_dim), times t and s (B,) -> v (T, patch_dim), in the dtype of x_t."""
        dtype = self.image_in.weight.dtype
        axes, device = tuple(self.rope_axes), x_t.tokens.device
        layout = PackedLayout.of(x_t.grids, cond.text.grids, axes, self.rope_theta, dtype, device)

        # Conditioning vector: time, time difference and pooled text.
        emb = self.t_in(sinusoid(t).to(dtype))
        if self.s_in is not None:
            emb = emb + self.s_in(sinusoid(t - s).to(dtype))  # s.9-s.10
        emb = F.silu(emb + self.pooled_in(cond.pooled.to(dtype)))

        # Token stream [all text | all image].
        image = self.image_in(x_t.tokens.to(dtype))
        if self.position is not None:
            image = image + self.position(to_device(places(x_t.grids, self.learned_grid), image.device))
        x = torch.cat([self.text_in(cond.text.tokens.to(dtype)), image])

        for block in self.double_blocks:
            x = block(x, emb, layout)

        # Single blocks have the same weights for text and image, so they can keep the order of attention.
        x, emb_sorted = layout.sort(x), emb.index_select(0, layout.samples)
        for block in self.single_blocks:
            x = block(x, emb_sorted, layout)
        image = layout.unsort(x)[layout.num_text :]

        # Output head on the image tokens.
        shift, scale = self.out_modulation(emb).chunk(2, dim=-1)
        return self.out(modulate(image, shift, scale, layout.image)).to(x_t.tokens.dtype)

    def flops(self, image_lens: Sequence[int], text_lens: Sequence[int]) -> int:
        """FLOPs of a forward pass over samples with these numbers of image and caption tokens, by formula.

        Matrix products only; a multiply-add counts as two operations. Attention takes two products of n x n x width
        per sample and block, for n text and image tokens.
        """
        rows = {"image": sum(image_lens), "text": sum(text_lens), "sample": len(image_lens)}
        rows["joint"] = rows["image"] + rows["text"]
        weights = sum(rows[kind] * count for kind, count in self.weights_of.items())

        pairs = sum((image + text) ** 2 for image, text in zip(image_lens, text_lens, strict=True))
        num_blocks = len(self.double_blocks) + len(self.single_blocks)
        return 2 * (weights + 2 * pairs * self.image_in.out_features * num_blocks)

    def count_weights(self) -> dict[str, int]:
        """Number of weights that are multiplied with each image token, text token, token of both, and sample."""
        counts = {"image": 0, "text": 0, "joint": 0, "sample": 0}
        for name, weight in self.named_parameters():
            if weight.ndim < 2 or name.startswith("position"):
                continue

            if "modulation" in name or name.startswith(("t_in", "s_in", "pooled_in")):
                kind = "sample"
            elif name.startswith("single_blocks"):
                kind = "joint"
            else:
                kind = "text" if ".text." in name or name.startswith("text_in") else "image"
            counts[kind] += weight.numel()
        return counts

    def initial(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """Initial value of a parameter, float32 on the CPU; depends on (seed, name) only.

        As in DiT, modulation and output layers are zero-initialised, so that every block starts as the identity and v
        starts at 0.
        """
        if "norm" in name:
            return torch.ones(shape)
        if name.endswith("bias") or "modulation" in name or name.startswith(("out.", "position.")):
            return torch.zeros(shape)

        # Linear weights: Xavier uniform; embedding MLPs with standard deviation 0.02.
        fan_out, fan_in = shape
        if name.startswith(("t_in", "s_in", "pooled_in")):
            bound = 0.02 * math.sqrt(3)
        else:
            bound = math.sqrt(6 / (fan_in + fan_out))
        uniform = torch.from_numpy(philox(seed, "initial", name).random(tuple(shape), dtype="float32"))
        return uniform.mul_(2 * bound).sub_(bound)


class DoubleBlock(nn.Module):
    """Separate text and image streams that share one joint attention."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.text = ModalityStream(width, num_heads, mlp_ratio)
        self.image = ModalityStream(width, num_heads, mlp_ratio)

    def forward(self, x: Tensor, emb: Tensor, layout: PackedLayout) -> Tensor:
        """Stream x (T, width), conditioning emb (B, width) -> (T, width)."""
        # Modulation: scale and shift before attention, its gate, and the same for the MLP.
        text_mod = self.text.modulation(emb).chunk(6, dim=-1)
        image_mod = self.image.modulation(emb).chunk(6, dim=-1)
        text, image = x[: layout.num_text], x[layout.num_text :]

        # Joint attention.
        text_qkv = self.text.qkv(text, *text_mod[:2], layout.text)
        image_qkv = self.image.qkv(image, *image_mod[:2], layout.image)
        q, k, v = (layout.sort(torch.cat(pair)) for pair in zip(text_qkv, image_qkv, strict=True))
        del text_qkv, image_qkv  # not needed during attention, where memory peaks
        attended = layout.unsort(attention(q, k, v, layout))

        # Output projection and MLP of each stream.
        text = self.text.finish(text, attended[: layout.num_text], *text_mod[2:], layout.text)
        image = self.image.finish(image, attended[layout.num_text :], *image_mod[2:], layout.image)
        return torch.cat([text, image])


class ModalityStream(nn.Module):
    """The layers of one modality (text or image) in a double block."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.num_heads = num_heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv_in = nn.Linear(width, 3 * width)
        self.qk_norm = QKNorm(width // num_heads)
        self.attention_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))

    def qkv(self, x: Tensor, shift: Tensor, scale: Tensor, segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
        """x (n, width) -> q, k, v (n, heads, head_dim)."""
        qkv = self.qkv_in(modulate(x, shift, scale, segments))
        q, k, v = rearrange(qkv, "n (three heads d) -> three n heads d", three=3, heads=self.num_heads)
        return *self.qk_norm(q, k), v

    def finish(
        self,
        x: Tensor,
        attended: Tensor,
        gate: Tensor,
        shift: Tensor,
        scale: Tensor,
        mlp_gate: Tensor,
        segments: Segments,
    ) -> Tensor:
        """Residual branches: output projection of `attended` (n, width), then the MLP. Returns x (n, width)."""
        x = segments.addcmul(x, self.attention_out(attended), gate)
        return segments.addcmul(x, self.mlp(modulate(x, shift, scale, segments)), mlp_gate)


class SingleBlock(nn.Module):
    """Text and image in one stream; attention and MLP in parallel, with fused input and output projections."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.num_heads, self.hidden = num_heads, int(width * mlp_ratio)
        self.modulation = nn.Linear(width, 3 * width)
        self.qkv_mlp_in = nn.Linear(width, 3 * width + self.hidden)
        self.qk_norm = QKNorm(width // num_heads)
        self.gelu = nn.GELU(approximate="tanh")
        self.attention_mlp_out = nn.Linear(width + self.hidden, width)

    def forward(self, x: Tensor, emb: Tensor, layout: PackedLayout) -> Tensor:
        """x (T, width) and conditioning emb (B, width), both in attention order -> (T, width)."""
        shift, scale, gate = self.modulation(emb).chunk(3, dim=-1)
        h = modulate(x, shift, scale, layout.joint)

        # Apply the fused projection as two matmuls to lower peak memory: the MLP activations are not alive during
        # attention, nor q, k and v during the MLP.
        sizes = [3 * x.shape[1], self.hidden]
        qkv_in, mlp_in = zip(self.qkv_mlp_in.weight.split(sizes), self.qkv_mlp_in.bias.split(sizes), strict=True)
        attended = self.attend(F.linear(h, *qkv_in), layout)
        mlp = self.gelu(F.linear(h, *mlp_in))
        return layout.joint.addcmul(x, self.attention_mlp_out(torch.cat([attended, mlp], dim=-1)), gate)

    def attend(self, qkv: Tensor, layout: PackedLayout) -> Tensor:
        """qkv (T, 3 width) -> (T, width)."""
        q, k, v = rearrange(qkv, "n (three heads d) -> three n heads d", three=3, heads=self.num_heads)
        return attention(*self.qk_norm(q, k), v, layout)


class QKNorm(nn.Module):
    """RMS norm of queries and keys, per head."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.q_norm = nn.RMSNorm(head_dim, eps=1e-6)
        self.k_norm = nn.RMSNorm(head_dim, eps=1e-6)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_norm(q), self.k_norm(k)


def embedder(width_in: int, width: int) -> nn.Sequential:
    """Two-layer MLP for time embeddings and pooled text."""
    return nn.Sequential(nn.Linear(width_in, width), nn.SiLU(), nn.Linear(width, width))


def sinusoid(t: Tensor) -> Tensor:
    """Sinusoidal embedding of times (B,) -> (B, 256): cosines, then sines, of 1000 t; in the dtype of t."""
    half = SINUSOID // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=t.dtype, device=t.device) / half)
    angles = 1000 * t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, segments: Segments) -> Tensor:
    """adaLN: layer norm of x (n, width) without affine weights, then per-sample scale and shift (B, width)."""
    return segments.addcmul(segments.broadcast(shift), F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


@lru_cache(maxsize=16)
def places(grids: tuple[tuple[int, int], ...], largest: tuple[int, int]) -> Tensor:
    """Position indices (T,) of all patches in the largest grid, row-major.

    Raises:
        UserError: a grid is larger than `largest`.
    """
    for grid in set(grids):
        if grid[0] > largest[0] or grid[1] > largest[1]:
            raise UserError(
                f"system.backbone.params.learned_grid: {largest} is too small for an image of {grid} patches"
            )

    table = torch.arange(math.prod(largest)).view(largest)
    return torch.cat([table[:rows, :columns].flatten() for rows, columns in grids])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """RoPE on adjacent pairs of x (T, heads, head_dim), computed in the dtype of `rotation` (2, T, 1, head_dim)."""
    cos, sin = rotation
    wide = x.to(rotation.dtype)
    swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(wide * cos, swapped, sin).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    """Joint attention over the text and image tokens of each sample, in attention order.

    q, k, v (T, heads, head_dim) -> (T, width).
    """
    q, k = rotate(q, layout.rotation), rotate(k, layout.rotation)
    return attend(q, k, v, layout.sequences).flatten(1)
