"""Dual-time MMDiT: the FLUX architecture on packed tokens, with an embedding of t - s (arXiv 2512.22374, S.2)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from selfe import flow
from selfe.backbones.attention import attend
from selfe.backbones.lora import is_low_rank, split_rows
from selfe.backbones.packing import EachToken, PackedLayout, Segments
from selfe.device import to_device
from selfe.errors import UserError
from selfe.rng import philox
from selfe.types import MOST_WIDTH, Packed, Route, TextCond, check_range

SINUSOID = 256  # width of the sinusoidal time embedding
T_MIN = 0.05  # least time by which an error of x0 is divided (JiT)
OUTSIDE = "outside of blocks"


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
        bottleneck: int | None = None,
        prediction: Literal["velocity", "x0"] = "velocity",
        time_scale: float = 1000.0,
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
            bottleneck: width of a linear layer before the input projection, for wide tokens such as patches of pixels
                (JiT, arXiv 2511.13720); null for none.
            prediction: what the output layer predicts. With x0, v = (x_t - x0_hat) / max(t, 0.05), as in JiT: for
                pixels, whose velocity has too many dimensions for the width.
            time_scale: factor of the times in their sinusoidal embedding. FLUX has 1000, whose fastest wave turns by 5
                radians in a time of 0.005: objectives that take differences in time need a smaller one.
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
        check_range("bottleneck", bottleneck, 1, MOST_WIDTH)
        check_range("time_scale", time_scale, 1e-3, 1e6)
        if width != num_heads * sum(rope_axes) or any(axis % 2 for axis in rope_axes):
            raise ValueError(f"rope_axes {rope_axes} must be even and sum to width / num_heads = {width} / {num_heads}")
        self.patch_dim, self.text_dim, self.pooled_dim = patch_dim, text_dim, pooled_dim
        self.width, self.num_heads, self.mlp_ratio = width, num_heads, mlp_ratio
        self.rope_axes, self.rope_theta = rope_axes, rope_theta

        # Input projections, time embeddings and pooled text embedding.
        self.bottleneck, self.prediction, self.time_scale = bottleneck, prediction, time_scale
        if bottleneck is None:
            self.image_in = nn.Linear(patch_dim, width)
        else:
            self.image_in = nn.Sequential(nn.Linear(patch_dim, bottleneck, bias=False), nn.Linear(bottleneck, width))
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

        # Heads of training aids (`add_head`), and the block whose output each of them takes.
        self.heads = nn.ModuleDict()
        self.head_layers: dict[str, str] = {}

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
            "bottleneck": self.bottleneck,
            "prediction": self.prediction,
            "time_scale": self.time_scale,
        }

    @property
    def feature_widths(self) -> dict[str, int]:
        return {name: self.width for name in self.layer_names()}

    def layer_names(self) -> list[str]:
        """The blocks in the order in which they are computed, as `features` names them."""
        names = [f"double_blocks.{number}" for number in range(len(self.double_blocks))]
        return names + [f"single_blocks.{number}" for number in range(len(self.single_blocks))]

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """Name and module of each block, in order."""
        yield from zip(self.layer_names(), [*self.double_blocks, *self.single_blocks], strict=True)

    def add_head(self, name: str, layer: str, head: nn.Module) -> None:
        if layer not in self.feature_widths:
            raise ValueError(f"the backbone has no layer {layer}; its layers are {', '.join(self.feature_widths)}")
        self.heads[name], self.head_layers[name] = head, layer

    def forward(
        self,
        x_t: Packed,
        t: Tensor,
        s: Tensor,
        cond: TextCond,
        features: Sequence[str] = (),
        route: Route | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """x_t (T, patch_dim), times t and s (B,) or (T,) -> v (T, patch_dim), in the dtype of x_t.

        With times per image token, the text of a sample is modulated by their mean. `features` are names of blocks or
        of heads; with names the call returns (v, {name: (T, width of the feature)}), in compute precision.

        Raises:
            UserError: there is no feature of a name, or it is inside of the route.
        """
        dtype, times = self.text_in.weight.dtype, t
        place = tuple(self.rope_axes), self.rope_theta, dtype, x_t.tokens.device
        layout = PackedLayout.of(x_t.grids, cond.text.grids, *place)
        layers, inner = self.layers_of(features, route), {}

        # Conditioning vector: time, time difference and pooled text.
        pooled = self.pooled_in(cond.pooled.to(dtype))
        if len(t) != len(x_t):
            pooled = torch.cat([pooled, layout.image.broadcast(pooled)])
            t, s = (torch.cat([mean_of_tokens(time, x_t), time]) for time in (t, s))
            layout = layout.with_token_times()
        emb = self.t_in(sinusoid(t, self.time_scale).to(dtype))
        if self.s_in is not None:
            emb = emb + self.s_in(sinusoid(t - s, self.time_scale).to(dtype))  # s.9-s.10
        emb = F.silu(emb + pooled)

        # Token stream [all text | all image].
        image = self.image_in(x_t.tokens.to(dtype))
        if self.position is not None:
            image = image + self.position(to_device(places(x_t.grids, self.learned_grid), image.device))
        stream = Stream(torch.cat([self.text_in(cond.text.tokens.to(dtype)), image]), emb, layout)

        for name, block in self.blocks():
            if route is not None and name == route.first:
                routed = PackedLayout.of_route(x_t.grids, cond.text.grids, *place, route.kept)
                kept = to_device(kept_tokens(x_t, layout.num_text, route), image.device)
                skipped, stream = stream, stream.select(kept, routed)

            # Single blocks have the same weights for text and image, so they can keep the order of attention.
            stream = stream.sorted() if isinstance(block, SingleBlock) else stream
            stream = stream.through(block)
            if name in layers:
                inner[name] = stream.image()

            if route is not None and name == route.last:
                stream = skipped.insert(kept, stream)
        image = stream.image()

        # Output head on the image tokens.
        _, image_emb = layout.rows_by_modality(emb)
        shift, scale = self.out_modulation(image_emb).chunk(2, dim=-1)
        v = self.out(modulate(image, shift, scale, layout.image)).to(x_t.tokens.dtype)
        if self.prediction == "x0":
            v = (x_t.tokens - v) / flow.per_token(times, x_t).clamp_min(T_MIN)
        if not features:
            return v

        # Features of blocks, and outputs of heads.
        outputs = {}
        for name in features:
            if name in self.heads:
                outputs[name] = self.heads[name](inner[self.head_layers[name]], x_t)
            else:
                outputs[name] = inner[name]
        return v, outputs

    def layers_of(self, features: Sequence[str], route: Route | None = None) -> set[str]:
        """The blocks whose output these features need. Raises UserError for an unknown name, or one inside of a route.

        A feature of the last block of a route is inside too: not all tokens are there yet.
        """
        names, layers = self.layer_names(), {self.head_layers.get(name, name) for name in features}
        if unknown := sorted(layers - set(names)):
            raise UserError(f"the backbone has no feature {unknown[0]}; it has {', '.join(names)}")
        if inside := sorted(layers & set(self.blocks_of(route))):
            raise UserError(
                f"the feature {inside[0]} is inside of the blocks {route.first} to {route.last}, which some tokens "
                "skip; take one of another block"
            )
        return layers

    def blocks_of(self, route: Route | None) -> list[str]:
        """Names of the blocks of a route."""
        if route is None:
            return []
        names = self.layer_names()
        return names[names.index(route.first) : names.index(route.last) + 1]

    def flops(
        self,
        image_lens: Sequence[int],
        text_lens: Sequence[int],
        *,
        token_times: bool = False,
        features: Sequence[str] = (),
        route: Route | None = None,
    ) -> int:
        """FLOPs of a forward pass over samples with these numbers of image and caption tokens, by formula.

        Matrix products only; a multiply-add counts as two operations. Attention takes two products of n x n x width
        per sample and block, for n text and image tokens.
        """
        inside = self.blocks_of(route)
        total = sum(self.heads[name].flops(sum(image_lens)) for name in features if name in self.heads)
        for name, weights in self.weights_of.items():
            lens = route.lens if name in inside else image_lens
            rows = count_rows(lens, text_lens, token_times)
            total += 2 * sum(rows[kind] * count for kind, count in weights.items())
            if name != OUTSIDE:
                pairs = sum((image + text) ** 2 for image, text in zip(lens, text_lens, strict=True))
                total += 4 * pairs * self.width
        return total

    @cached_property
    def weights_of(self) -> dict[str, dict[str, int]]:
        """Weights of each block, and outside of blocks, by the rows they are multiplied with, see `count_rows`."""
        counts: dict[str, dict[str, int]] = {}
        for name, weight in self.named_parameters():
            if weight.ndim < 2 or name.startswith(("position", "heads.")):
                continue

            if name.startswith("pooled_in") or ".text.modulation" in name:
                kind = "sample"
            elif name.startswith("out_modulation") or ".image.modulation" in name:
                kind = "image_times"
            elif name.startswith(("t_in", "s_in")) or "modulation" in name:
                kind = "times"
            elif name.startswith("single_blocks"):
                kind = "joint"
            else:
                kind = "text" if ".text." in name or name.startswith("text_in") else "image"
            block = ".".join(name.split(".")[:2]) if "_blocks." in name else OUTSIDE
            of_block = counts.setdefault(block, {})
            of_block[kind] = of_block.get(kind, 0) + weight.numel()
        return counts

    def matrices(self, name: str) -> tuple[int, tuple[int, ...]]:
        """How a weight is made of several matrices: the dimension in which they are concatenated, and their sizes in
        it; no sizes for a single matrix. Used by optimizers that treat a matrix as one.
        """
        if is_low_rank(name):
            return 0, ()
        width, hidden = self.width, int(self.width * self.mlp_ratio)
        fused = {
            "qkv_in": (0, (width,) * 3),
            "qkv_mlp_in": (0, (width, width, width, hidden)),
            "attention_mlp_out": (1, (width, hidden)),
            "out_modulation": (0, (width,) * 2),
        }
        if ".modulation." in name:
            return 0, (width,) * (6 if name.startswith("double_blocks") else 3)
        module = name.rpartition(".")[0].rpartition(".")[2]
        return fused.get(module, (0, ()))

    def initial(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """Initial value of a parameter, float32 on the CPU; depends on (seed, name) only.

        As in DiT, modulation and output layers are zero-initialised, so that every block starts as the identity and v
        starts at 0.
        """
        if "norm" in name:
            return torch.ones(shape)
        if name.endswith("bias") or "modulation" in name or name.startswith(("out.", "position.")):
            return torch.zeros(shape)

        # Linear and convolution weights: Xavier uniform; embedding MLPs with standard deviation 0.02.
        area = math.prod(shape[2:])
        fan_out, fan_in = shape[0] * area, shape[1] * area
        if name.startswith(("t_in", "s_in", "pooled_in")):
            bound = 0.02 * math.sqrt(3)
        else:
            bound = math.sqrt(6 / (fan_in + fan_out))
        uniform = torch.from_numpy(philox(seed, "initial", name).random(tuple(shape), dtype="float32"))
        return uniform.mul_(2 * bound).sub_(bound)


@dataclass(frozen=True)
class Stream:
    """The tokens of a forward pass between two blocks."""

    x: Tensor  # (T, width), [all text | all image], or in attention order if `sorted_emb` is given
    emb: Tensor  # conditioning (rows, width), see `PackedLayout`
    layout: PackedLayout
    sorted_emb: Tensor | None = None  # the conditioning in attention order

    def through(self, block: nn.Module) -> Stream:
        """The tokens after a block."""
        emb = self.emb if self.sorted_emb is None else self.sorted_emb
        return replace(self, x=block(self.x, emb, self.layout))

    def sorted(self) -> Stream:
        """The same tokens in attention order."""
        if self.sorted_emb is not None:
            return self
        layout = self.layout
        emb = self.emb if layout.per_token else self.emb.index_select(0, layout.samples)
        return Stream(layout.sort(self.x), self.emb, layout, emb)

    def tokens(self) -> Tensor:
        """(T, width), [all text | all image]."""
        return self.x if self.sorted_emb is None else self.layout.unsort(self.x)

    def image(self) -> Tensor:
        """The image tokens (T_image, width)."""
        return self.tokens()[self.layout.num_text :]

    def select(self, kept: Tensor, layout: PackedLayout) -> Stream:
        """The tokens of these indices in [all text | all image], which include all text, with their layout."""
        x = self.tokens().index_select(0, kept)
        if not self.layout.per_token:
            return Stream(x, self.emb, layout)
        num_text = layout.num_text
        text_emb, image_emb = self.layout.rows_by_modality(self.emb)
        emb = torch.cat([text_emb, image_emb.index_select(0, kept[num_text:] - num_text)])
        return Stream(x, emb, layout.with_token_times())

    def insert(self, kept: Tensor, other: Stream) -> Stream:
        """The tokens of this stream, those of these indices replaced by the tokens of the other, see `select`."""
        return Stream(self.tokens().index_copy(0, kept, other.tokens()), self.emb, self.layout)


class DoubleBlock(nn.Module):
    """Separate text and image streams that share one joint attention."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.text = ModalityStream(width, num_heads, mlp_ratio)
        self.image = ModalityStream(width, num_heads, mlp_ratio)

    def forward(self, x: Tensor, emb: Tensor, layout: PackedLayout) -> Tensor:
        """Stream x (T, width), conditioning emb (rows, width) -> (T, width)."""
        # Modulation: scale and shift before attention, its gate, and the same for the MLP.
        text_emb, image_emb = layout.rows_by_modality(emb)
        text_mod = self.text.modulation(text_emb).chunk(6, dim=-1)
        image_mod = self.image.modulation(image_emb).chunk(6, dim=-1)
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

    def qkv(
        self, x: Tensor, shift: Tensor, scale: Tensor, segments: Segments | EachToken
    ) -> tuple[Tensor, Tensor, Tensor]:
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
        segments: Segments | EachToken,
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
        """x (T, width) in attention order, conditioning emb (rows, width) -> (T, width).

        The rows of emb are samples in attention order; with times per token, they are in stream order.
        """
        shift, scale, gate = layout.joint_rows(self.modulation(emb)).chunk(3, dim=-1)
        h = modulate(x, shift, scale, layout.joint)

        # Apply the fused projection as two matmuls to lower peak memory: the MLP activations are not alive during
        # attention, nor q, k and v during the MLP.
        qkv, mlp = split_rows(self.qkv_mlp_in, h, [3 * x.shape[1], self.hidden])
        attended = self.attend(qkv(), layout)
        mlp = self.gelu(mlp())
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


def sinusoid(t: Tensor, scale: float = 1000.0) -> Tensor:
    """Sinusoidal embedding of times (B,) -> (B, 256): cosines, then sines, of `scale` t; in the dtype of t."""
    half = SINUSOID // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=t.dtype, device=t.device) / half)
    angles = scale * t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def kept_tokens(image: Packed, num_text: int, route: Route) -> Tensor:
    """Indices in [all text | all image] of the tokens that pass a route: all text, and the kept image tokens."""
    starts = accumulate(image.lens, initial=num_text)
    kept = [start + indices for start, indices in zip(starts, route.kept, strict=False)]
    return torch.cat([torch.arange(num_text), *kept])


def count_rows(image_lens: Sequence[int], text_lens: Sequence[int], token_times: bool) -> dict[str, int]:
    """Rows of each kind of matrix product: image tokens, text tokens, both, samples, and rows of times.

    Times have a row per sample; if they are per token, a row per image token (`image_times`), and for what text and
    image share (`times`) one more per sample.
    """
    num_samples, num_image, num_text = len(image_lens), sum(image_lens), sum(text_lens)
    rows = {"image": num_image, "text": num_text, "joint": num_image + num_text, "sample": num_samples}
    if token_times:
        return rows | {"image_times": num_image, "times": num_samples + num_image}
    return rows | {"image_times": num_samples, "times": num_samples}


def mean_of_tokens(values: Tensor, like: Packed) -> Tensor:
    """The mean of values (T,) over the tokens of each sample, (B,)."""
    return flow.mean_per_sample(values[:, None], like)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, segments: Segments | EachToken) -> Tensor:
    """adaLN: layer norm of x (n, width) without affine weights, then scale and shift (rows, width) of each segment."""
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
