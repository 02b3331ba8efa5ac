"""The frozen FLUX.1 autoencoder: images <-> packed 2 x 2 patches of a 16-channel latent at 1/8 resolution.

Parameter names match FLUX.1's `ae.safetensors`, which loads without conversion.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from selfe.errors import UserError
from selfe.io.safetensors_files import AGAIN, SafetensorsFiles, cached
from selfe.rng import SampleRNG
from selfe.types import DTYPES, MOST_WIDTH, Packed, Precision, check_range, packed

SCALE, SHIFT = 0.3611, 0.1159  # FLUX.1 latents: (z - shift) * scale has mean about 0 and standard deviation about 1
CHANNELS, PATCH = 16, 2
STAGES = (1, 2, 4, 4)  # channel multiplier of each resolution
PIXELS = 2 ** (len(STAGES) - 1)  # pixels per latent, per side
TILE_OVERLAP = 8  # overlap of adjacent tiles, in latents


class FluxVAE:
    """Encodes and decodes images, batched by size. Tokens are float32, whatever the `dtype` of the network."""

    token_dim = CHANNELS * PATCH**2
    multiple = PIXELS * PATCH
    constants = {"scaling_factor": SCALE, "shift_factor": SHIFT}  # noqa: RUF012 - not changed

    def __init__(
        self,
        cache_dir: Path | None = None,
        skip_pretrained: bool = False,
        latent: Literal["sample", "mean"] = "sample",
        width: int = 128,
        dtype: Precision = "bf16",
        decode_pixels: int = 2048 * 2048,
    ):
        """
        Args:
            cache_dir: folder with `ae.safetensors`.
            skip_pretrained: use random weights and read no files.
            latent: sample from the encoder's normal distribution, or take its mean.
            width: channels at full resolution, 128 in FLUX.1.
            dtype: precision of the network.
            decode_pixels: maximum number of pixels decoded at once; larger images are decoded in tiles.
        """
        check_range("width", width, 32, MOST_WIDTH)
        if width % 32:
            raise ValueError(f"width must be a multiple of 32, the number of groups in GroupNorm, got {width}")
        self.cache_dir, self.skip_pretrained = cache_dir, skip_pretrained
        check_range("decode_pixels", decode_pixels, (4 * TILE_OVERLAP * PIXELS) ** 2, 10**12)  # at least one tile
        self.latent, self.width, self.decode_pixels = latent, width, decode_pixels
        self.precision, self.dtype = dtype, DTYPES[dtype]
        self.net = nn.ModuleDict({"encoder": Encoder(width), "decoder": Decoder(width)})

    def output_settings(self) -> dict[str, Any]:
        return {
            "skip_pretrained": self.skip_pretrained,
            "latent": self.latent,
            "width": self.width,
            "dtype": self.precision,
            "decode_pixels": self.decode_pixels,
        }

    def load(self, device: torch.device) -> None:
        """Load the weights onto the device. On the meta device only shapes exist and no file is read.

        Raises:
            UserError: the file is missing, unreadable, or has other tensors or shapes.
        """
        if device.type == "meta":
            pass  # keep the shapes as constructed
        elif self.skip_pretrained:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.net.to_empty(device="cpu").apply(reset)
        else:
            self.net.load_state_dict(self.pretrained(), assign=True)
        self.net.to(device, self.dtype).eval().requires_grad_(False)
        if device.type not in ("cpu", "meta"):
            self.net.to(memory_format=torch.channels_last)  # the layout of tensor cores; activations follow the weights

    def pretrained(self) -> dict[str, Tensor]:
        """The state dict in `ae.safetensors`; names and shapes must match exactly."""
        weights = SafetensorsFiles.open(cached(self.cache_dir, "ae.safetensors"))
        wanted = {name: tensor.shape for name, tensor in self.net.state_dict().items()}
        weights.expect(wanted, "FLUX.1's autoencoder")
        if foreign := sorted(weights.shapes.keys() - wanted.keys()):
            raise UserError(f"{weights.path}: {foreign[0]} is not a tensor of FLUX.1's autoencoder; {AGAIN}")
        return {name: weights.read(name) for name in wanted}

    @torch.no_grad()
    def encode(self, images: Sequence[Tensor], rng: SampleRNG) -> Packed:
        """B x (3, H, W) in [-1, 1] -> tokens (T, 64), float32, with mean about 0 and standard deviation about 1."""
        mean, deviation = self.moments(images)
        if deviation is None:
            return mean
        return mean.with_tokens(mean.tokens + deviation * rng.normal_like("latent", mean))

    @torch.no_grad()
    def moments(self, images: Sequence[Tensor]) -> tuple[Packed, Tensor | None]:
        """Mean and standard deviation of the latent distribution, (T, 64) each; None with `latent="mean"`."""
        moments = by_shape(images, lambda x: self.net["encoder"](x.to(self.device, self.dtype)).float())
        mean, log_variance = zip(*(m.chunk(2) for m in moments), strict=True)
        mean = patchify(mean)
        mean = mean.with_tokens((mean.tokens - SHIFT) * SCALE)
        if self.latent == "mean":
            return mean, None
        return mean, patchify([torch.exp(0.5 * v.clamp(-30, 20)) for v in log_variance]).tokens * SCALE

    @torch.no_grad()
    def decode(self, latents: Packed) -> list[Tensor]:
        """Tokens (T, 64) -> B x (3, H, W), float32, approximately in [-1, 1] (not clamped)."""
        grids = unpatchify(latents.with_tokens(latents.tokens / SCALE + SHIFT))
        return by_shape(grids, self.decode_alike)

    def decode_alike(self, z: Tensor) -> Tensor:
        """Decode latents of equal size, (B, 16, h, w) -> (B, 3, 8 h, 8 w), at most `decode_pixels` at once."""
        pixels = z.shape[2] * z.shape[3] * PIXELS**2
        if pixels > self.decode_pixels:
            return torch.stack([self.decode_tiled(each) for each in z])
        batches = z.split(self.decode_pixels // pixels)
        return torch.cat([self.net["decoder"](batch.to(self.device, self.dtype)).float() for batch in batches])

    def decode_tiled(self, z: Tensor) -> Tensor:
        """Decode (16, h, w) -> (3, 8 h, 8 w) in square tiles, blended linearly where they overlap."""
        side = math.isqrt(self.decode_pixels) // PIXELS
        total = torch.zeros(3, z.shape[1] * PIXELS, z.shape[2] * PIXELS, device=self.device)
        weight = torch.zeros_like(total[0])

        for top, left in product(*(starts(n, side) for n in z.shape[1:])):
            latents = z[None, :, top : top + side, left : left + side].to(self.device, self.dtype)
            tile = self.net["decoder"](latents)[0].float()

            # Accumulate the tile with weights that fall off towards its borders.
            rows = slice(top * PIXELS, top * PIXELS + tile.shape[1])
            columns = slice(left * PIXELS, left * PIXELS + tile.shape[2])
            fade = ramp(tile.shape[1])[:, None].minimum(ramp(tile.shape[2])[None]).to(self.device)
            total[:, rows, columns] += tile * fade
            weight[rows, columns] += fade

        return total / weight

    def noise(self, sizes: Sequence[tuple[int, int]], rng: SampleRNG) -> Packed:
        """Standard normal tokens (T, 64) for images of B x (height, width) pixels.

        Raises:
            UserError: a height or width is not a multiple of 16.
        """
        for height, width in sizes:
            if height % self.multiple or width % self.multiple or min(height, width) < self.multiple:
                raise UserError(f"size {height} x {width}: height and width must be multiples of {self.multiple}")
        grids = [(height // self.multiple, width // self.multiple) for height, width in sizes]
        tokens = torch.empty(sum(rows * columns for rows, columns in grids), self.token_dim, device=self.device)
        like = packed(tokens, grids)
        return like.with_tokens(rng.normal_like("noise", like))

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device


def starts(length: int, side: int) -> list[int]:
    """Start offsets of evenly spaced tiles of `side` latents along `length`, overlapping by at least `TILE_OVERLAP`."""
    if length <= side:
        return [0]
    count = -(-(length - TILE_OVERLAP) // (side - TILE_OVERLAP))
    return [round(i * (length - side) / (count - 1)) for i in range(count)]


def ramp(length: int) -> Tensor:
    """Blending weights (length,) along one side of a tile, in pixels: a linear ramp over the overlap, never 0."""
    distance = torch.arange(1, length + 1).minimum(torch.arange(length, 0, -1))
    return (distance / (TILE_OVERLAP * PIXELS)).clamp_max(1)


def by_shape(inputs: Sequence[Tensor], forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Apply `forward` to batches of tensors of equal shape; results are in the order of the inputs."""
    groups = defaultdict(list)
    for index, x in enumerate(inputs):
        groups[x.shape].append(index)

    results: dict[int, Tensor] = {}
    for indices in groups.values():
        results |= zip(indices, forward(torch.stack([inputs[i] for i in indices])), strict=True)
    return [results[i] for i in range(len(inputs))]


def patchify(latents: Sequence[Tensor]) -> Packed:
    """B x (16, h, w) -> tokens (T, 64). A token is a 2 x 2 patch in the order (channel, row, column), as in FLUX.1."""
    tokens = [rearrange(z, "c (h p) (w q) -> (h w) (c p q)", p=PATCH, q=PATCH) for z in latents]
    return packed(torch.cat(tokens), [(z.shape[1] // PATCH, z.shape[2] // PATCH) for z in latents])


def unpatchify(latents: Packed) -> list[Tensor]:
    """Tokens (T, 64) -> B x (16, h, w)."""
    return [
        rearrange(tokens, "(h w) (c p q) -> c (h p) (w q)", h=grid[0], p=PATCH, q=PATCH)
        for tokens, grid in zip(latents.split(), latents.grids, strict=True)
    ]


# ---- the network ----


class Encoder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        widths = [width * stage for stage in STAGES]
        self.conv_in = conv(3, width)
        self.down = nn.ModuleList()
        for i, (before, after) in enumerate(zip([width, *widths], widths, strict=False)):
            stage = nn.Module()
            stage.block = nn.ModuleList([ResBlock(before, after), ResBlock(after, after)])
            if i + 1 < len(widths):
                stage.downsample = Downsample(after)
            self.down.append(stage)
        self.mid = Mid(widths[-1])
        self.norm_out = norm(widths[-1])
        self.conv_out = conv(widths[-1], 2 * CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 32, H / 8, W / 8): mean and log variance, 16 channels each."""
        x = self.conv_in(x)
        for stage in self.down:
            for block in stage.block:
                x = block(x)
            if hasattr(stage, "downsample"):
                x = stage.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        widths = [width * stage for stage in STAGES]
        self.conv_in = conv(CHANNELS, widths[-1])
        self.mid = Mid(widths[-1])
        self.up = nn.ModuleList()  # index 0 is the finest resolution; run in reverse order
        for i, (before, after) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            stage = nn.Module()
            stage.block = nn.ModuleList([ResBlock(before, after), ResBlock(after, after), ResBlock(after, after)])
            if i:
                stage.upsample = Upsample(after)
            self.up.append(stage)
        self.norm_out = norm(width)
        self.conv_out = conv(width, 3)

    def forward(self, z: Tensor) -> Tensor:
        """(B, 16, h, w) -> (B, 3, 8 h, 8 w)."""
        x = self.mid(self.conv_in(z))
        for stage in reversed(self.up):
            for block in stage.block:
                x = block(x)
            if hasattr(stage, "upsample"):
                x = stage.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class ResBlock(nn.Module):
    def __init__(self, before: int, after: int):
        super().__init__()
        self.norm1, self.conv1 = norm(before), conv(before, after)
        self.norm2, self.conv2 = norm(after), conv(after, after)
        self.nin_shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Mid(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = ResBlock(width, width), Attention(width), ResBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Attention(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(proj(h), "b c h w -> b 1 (h w) c") for proj in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # asymmetric padding (right and bottom), as in FLUX.1


class Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def conv(before: int, after: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1)


def norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, eps=1e-6)


def reset(module: nn.Module) -> None:
    """Re-initialise a layer with PyTorch's default, if it has one."""
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()
