"""Dual-time MMDiT: FLUX's denoiser on packed tokens, with a second clock (arXiv 2512.22374, S.2).

The stream lies as [all text | all image], so that each modality's weights see one contiguous slice; attention alone
needs [text_i | image_i] sample by sample, and reaches it through index maps made once per call (`Layout`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from selfe.attention import Sequences, attend
from selfe.draws import generator
from selfe.types import Packed, TextCond, UserError

SINUSOID = 256  # width of the clock's encoding


class MMDiT(nn.Module):
    """V(x_t, t, s, c). The defaults are the paper's 2B model; `s_branch=False` leaves a plain FLUX-style denoiser."""

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
            s_branch: the second clock.
            learned_grid: rows and columns of the largest picture, in patches, to give every place in it a vector of its
                own beside RoPE. Not in the paper; helps small networks on pictures of few patches.
        """
        super().__init__()
        if width != num_heads * sum(rope_axes) or any(axis % 2 for axis in rope_axes):
            raise ValueError(
                f"rope_axes {rope_axes} must be even and add up to width / num_heads = {width} / {num_heads}"
            )
        self.patch_dim, self.text_dim, self.pooled_dim = patch_dim, text_dim, pooled_dim
        self.rope_axes, self.rope_theta = rope_axes, rope_theta
        self.image_in = nn.Linear(patch_dim, width)
        self.learned_grid = learned_grid
        self.position = nn.Embedding(math.prod(learned_grid), width) if learned_grid else None
        self.text_in = nn.Linear(text_dim, width)
        self.t_in = embedder(SINUSOID, width)
        self.s_in = embedder(SINUSOID, width) if s_branch else None
        self.pooled_in = embedder(pooled_dim, width)
        self.double_blocks = nn.ModuleList(DoubleBlock(width, num_heads, mlp_ratio) for _ in range(num_double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(width, num_heads, mlp_ratio) for _ in range(num_single_blocks))
        self.out_modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, patch_dim)

    def forward(self, x_t: Packed, t: Tensor, s: Tensor, cond: TextCond) -> Tensor:
        """x_t (T, patch_dim), times t and s (B,) -> v (T, patch_dim), in the dtype of x_t."""
        dtype = self.image_in.weight.dtype
        layout = Layout.of(x_t, cond.text, self.rope_axes, self.rope_theta)
        clock = self.t_in(sinusoid(t).to(dtype))
        if self.s_in is not None:
            clock = clock + self.s_in(sinusoid(t - s).to(dtype))  # s.9-s.10
        clock = F.silu(clock + self.pooled_in(cond.pooled.to(dtype)))

        image = self.image_in(x_t.tokens.to(dtype))
        if self.position is not None:
            image = image + self.position(places(x_t.grids, self.learned_grid).to(image.device))
        x = torch.cat([self.text_in(cond.text.tokens.to(dtype)), image])
        for block in self.double_blocks:
            x = block(x, clock, layout)
        for block in self.single_blocks:
            x = block(x, clock, layout)
        shift, scale = self.out_modulation(clock).chunk(2, dim=-1)
        x = modulate(x[layout.num_text :], shift, scale, layout.image)
        return self.out(x).to(x_t.tokens.dtype)

    def initial(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """The starting value of a parameter, float32 on the host: a function of (seed, name) alone.

        As in DiT: modulations and output start at zero, so every block starts as the identity and v as 0.
        """
        if "norm" in name:
            return torch.ones(shape)
        if name.endswith("bias") or "modulation" in name or name.startswith(("out.", "position.")):
            return torch.zeros(shape)
        fan_out, fan_in = shape
        if name.startswith(("t_in", "s_in", "pooled_in")):
            bound = 0.02 * math.sqrt(3)  # a uniform of standard deviation 0.02
        else:
            bound = math.sqrt(6 / (fan_in + fan_out))
        uniform = torch.from_numpy(generator(seed, "initial", name).random(tuple(shape), dtype="float32"))
        return uniform.mul_(2 * bound).sub_(bound)


class DoubleBlock(nn.Module):
    """Text and image with weights of their own, meeting in one attention."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.text = Half(width, num_heads, mlp_ratio)
        self.image = Half(width, num_heads, mlp_ratio)

    def forward(self, x: Tensor, clock: Tensor, layout: Layout) -> Tensor:
        """Stream x (T, width), clock (B, width) -> (T, width)."""
        n = layout.num_text
        halves = (self.text, x[:n], layout.text), (self.image, x[n:], layout.image)
        mods = [half.modulation(clock).chunk(6, dim=-1) for half, _, _ in halves]
        qkv = [half.qkv(x, *mod[:2], runs) for (half, x, runs), mod in zip(halves, mods, strict=True)]
        attended = attention(*(torch.cat(parts) for parts in zip(*qkv, strict=True)), layout)
        parts = (attended[:n], attended[n:])
        return torch.cat(
            [
                half.finish(x, part, *mod[2:], runs)
                for (half, x, runs), part, mod in zip(halves, parts, mods, strict=True)
            ]
        )


class Half(nn.Module):
    """One modality's share of a double block."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.num_heads = num_heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv_in = nn.Linear(width, 3 * width)
        self.qk_norm = QKNorm(width // num_heads)
        self.attention_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))

    def qkv(self, x: Tensor, shift: Tensor, scale: Tensor, runs: Runs) -> tuple[Tensor, Tensor, Tensor]:
        """x (n, width) -> q, k, v (n, heads, head_dim)."""
        qkv = self.qkv_in(modulate(x, shift, scale, runs))
        q, k, v = rearrange(qkv, "n (three heads d) -> three n heads d", three=3, heads=self.num_heads)
        return *self.qk_norm(q, k), v

    def finish(
        self, x: Tensor, attended: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, mlp_gate: Tensor, runs: Runs
    ) -> Tensor:
        """Residual of the attention (n, width), then of the MLP."""
        x = torch.addcmul(x, runs.spread(gate), self.attention_out(attended))
        return torch.addcmul(x, runs.spread(mlp_gate), self.mlp(modulate(x, shift, scale, runs)))


class SingleBlock(nn.Module):
    """Text and image as one stream; attention and MLP in parallel, their projections fused."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.num_heads, self.hidden = num_heads, int(width * mlp_ratio)
        self.modulation = nn.Linear(width, 3 * width)
        self.qkv_mlp_in = nn.Linear(width, 3 * width + self.hidden)
        self.qk_norm = QKNorm(width // num_heads)
        self.attention_mlp_out = nn.Linear(width + self.hidden, width)

    def forward(self, x: Tensor, clock: Tensor, layout: Layout) -> Tensor:
        """Stream x (T, width), clock (B, width) -> (T, width)."""
        # text, then image: every sample's numbers are needed twice
        shift, scale, gate = self.modulation(clock).repeat(2, 1).chunk(3, dim=-1)
        qkv, mlp = self.qkv_mlp_in(modulate(x, shift, scale, layout.stream)).split(
            [3 * x.shape[1], self.hidden], dim=-1
        )
        q, k, v = rearrange(qkv, "n (three heads d) -> three n heads d", three=3, heads=self.num_heads)
        attended = attention(*self.qk_norm(q, k), v, layout)
        update = self.attention_mlp_out(torch.cat([attended, F.gelu(mlp, approximate="tanh")], dim=-1))
        return torch.addcmul(x, layout.stream.spread(gate), update)


class QKNorm(nn.Module):
    """RMS norm of queries and keys per head."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.q_norm = nn.RMSNorm(head_dim, eps=1e-6)
        self.k_norm = nn.RMSNorm(head_dim, eps=1e-6)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_norm(q), self.k_norm(k)


def embedder(width_in: int, width: int) -> nn.Sequential:
    """The two-layer MLP of clocks and pooled text."""
    return nn.Sequential(nn.Linear(width_in, width), nn.SiLU(), nn.Linear(width, width))


def sinusoid(t: Tensor) -> Tensor:
    """Times (B,) -> (B, 256): cosines, then sines, of 1000 t at geometric frequencies. Full precision throughout."""
    half = SINUSOID // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=t.dtype, device=t.device) / half)
    angles = 1000 * t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, runs: Runs) -> Tensor:
    """Layer norm of x (n, width) without weights, then its sample's scale and shift (B, width)."""
    return torch.addcmul(runs.spread(shift), F.layer_norm(x, x.shape[-1:], eps=1e-6), runs.spread(1 + scale))


@dataclass(frozen=True)
class Runs:
    """Tokens that lie run by run, each run sharing the numbers of one row."""

    owner: Tensor  # (n,) the row of a token, ascending
    lens: Tensor  # (rows,)

    def spread(self, values: Tensor) -> Tensor:
        """values (rows, width) -> (n, width), every token getting its row."""
        return Spread.apply(values, self.owner, self.lens)


class Spread(torch.autograd.Function):
    """The rows `owner` of values, with a backward that sums run by run.

    Indexing's own backward adds with atomics, in an order that varies from run to run and so does the last bit.
    """

    @staticmethod
    def forward(ctx, values: Tensor, owner: Tensor, lens: Tensor) -> Tensor:
        # with a separate setup_context, torch would look up this signature at every call, slower than the work itself
        ctx.save_for_backward(lens)
        return values.index_select(0, owner)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (lens,) = ctx.saved_tensors
        working = torch.promote_types(grad.dtype, torch.float32)
        total = torch.segment_reduce(grad.to(working), "sum", lengths=lens, unsafe=True)
        return total.to(grad.dtype), None, None


@dataclass(frozen=True)
class Layout:
    """How one call's stream [all text | all image] maps to samples and to attention's order. Made once per call."""

    num_text: int
    text: Runs  # a run for each sample
    image: Runs
    stream: Runs  # 2 B runs: the samples' text, then their images
    order: Tensor  # (T,) stream positions in attention's order: [text | image] sample by sample, the shortest first
    inverse: Tensor  # (T,) the way back
    sequences: Sequences  # one for each sample, text and image together, in attention's order
    rotation: tuple[Tensor, Tensor]  # cosines and sines (T, 1, head_dim / 2), in attention's order

    @classmethod
    def of(cls, image: Packed, text: Packed, axes: tuple[int, ...], theta: float) -> Layout:
        device, num_text = image.tokens.device, text.tokens.shape[0]
        total = [i + n for i, n in zip(image.lens, text.lens, strict=True)]
        samples = sorted(range(len(total)), key=total.__getitem__)
        place = torch.empty(len(total), dtype=torch.int64)
        place[samples] = torch.arange(len(total))
        place = place.to(device)
        # stable: text stays before image within a sample
        order = torch.argsort(torch.cat([place[text.owner], place[image.owner]]), stable=True)
        lens = [torch.tensor(part.lens, device=device) for part in (text, image)]
        angles = [
            part
            for i in samples
            for part in (
                torch.zeros(text.lens[i], sum(axes) // 2, dtype=torch.float64),
                grid_angles(image.grids[i], axes, theta),
            )
        ]
        angles = torch.cat(angles)[:, None].to(device)
        working = torch.promote_types(image.tokens.dtype, torch.float32)
        return cls(
            num_text=num_text,
            text=Runs(text.owner, lens[0]),
            image=Runs(image.owner, lens[1]),
            stream=Runs(torch.cat([text.owner, image.owner + len(text)]), torch.cat(lens)),
            order=order,
            inverse=torch.argsort(order),
            sequences=Sequences.of([total[i] for i in samples], device),
            rotation=(angles.cos().to(working), angles.sin().to(working)),
        )


@lru_cache(maxsize=256)
def grid_angles(grid: tuple[int, int], axes: tuple[int, ...], theta: float) -> Tensor:
    """RoPE angles (rows * columns, head_dim / 2) of a picture's patches at (frame 0, row, column); text has angle 0."""
    rows, columns = grid
    position = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double()  # (n, 2)
    position = torch.cat([torch.zeros(rows * columns, 1, dtype=torch.float64), position], dim=1)
    parts = [
        position[:, [i]] * theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim) for i, dim in enumerate(axes)
    ]
    return torch.cat(parts, dim=1)


@lru_cache(maxsize=16)
def places(grids: tuple[tuple[int, int], ...], largest: tuple[int, int]) -> Tensor:
    """(T,) the number of every patch's place in the largest grid, row by row."""
    for grid in set(grids):
        if grid[0] > largest[0] or grid[1] > largest[1]:
            raise UserError(
                f"system.backbone.params.learned_grid: {largest} has no place for a picture of {grid} patches"
            )
    table = torch.arange(math.prod(largest)).view(largest)
    return torch.cat([table[:rows, :columns].flatten() for rows, columns in grids])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on neighbouring pairs of x (T, heads, head_dim), in full precision."""
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([cos * even - sin * odd, sin * even + cos * odd], dim=-1).flatten(-2).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Joint attention of each sample's text and image; q, k, v (T, heads, head_dim) in stream order -> (T, width)."""
    q, k, v = (Reorder.apply(x, layout.order, layout.inverse) for x in (q, k, v))
    q, k = rotate(q, *layout.rotation), rotate(k, *layout.rotation)
    return Reorder.apply(attend(q, k, v, layout.sequences), layout.inverse, layout.order).flatten(1)


class Reorder(torch.autograd.Function):
    """The rows of x in a new order, whose backward is the inverse permutation rather than a sum over indices."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None
