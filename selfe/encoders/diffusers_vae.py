"""Frozen autoencoders of diffusers: AutoencoderKL (SD, SDXL, SD3, FLUX.1), FLUX.2's, and DC-AE.

The kind, the sizes of the network and the constants that normalise latents are in the `config.json` of its folder:

    AutoencoderKL       (z - shift_factor) * scaling_factor, or with `latents_mean` and `latents_std` per channel
    AutoencoderKLFlux2  the statistics of its batch norm, per channel of a 2 x 2 patch
    AutoencoderDC       z * scaling_factor; deterministic
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from selfe.encoders.flux_vae import by_shape
from selfe.errors import UserError
from selfe.io.model_folder import find_model, model_name, quiet
from selfe.io.safetensors_files import SafetensorsFiles, read_json
from selfe.rng import SampleRNG
from selfe.types import DTYPES, MOST_WIDTH, Packed, Precision, check_range, packed

KEY = "system.autoencoder.params"
AGAIN = "copy the files of the model again"
KINDS = ("AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderDC")


class DiffusersVAE:
    """Encodes and decodes images, batched by size. A token is a patch of latents in the order (channel, row, column).

    Tokens are float32, whatever the `dtype` of the network.
    """

    def __init__(
        self,
        model: str,
        latent_channels: int,
        downsampling: int = 8,
        patch: int = 2,
        cache_dir: Path | None = None,
        skip_pretrained: bool = False,
        latent: Literal["sample", "mean"] = "sample",
        dtype: Precision = "bf16",
        decode_pixels: int = 2048 * 2048,
    ):
        """
        Args:
            model: name on the Hub of a folder in `cache_dir`, such as `stabilityai/sdxl-vae`; or the path of a folder,
                which is absolute or starts with `.` or `~`.
            latent_channels: channels of the latents: 4 of SD and SDXL, 16 of SD3 and FLUX.1, 32 of FLUX.2 and DC-AE.
            downsampling: pixels per latent, per side: 8, and 32 or 64 of DC-AE.
            patch: latents per token, per side; the width of a token is latent_channels times its square. 1 for DC-AE.
            cache_dir: folder with the models, each under its name.
            skip_pretrained: use a small network with random weights, and read no files.
            latent: sample from the encoder's normal distribution, or take its mean.
            dtype: precision of the network.
            decode_pixels: maximum number of pixels decoded at once; larger images are decoded in tiles.
        """
        check_range("latent_channels", latent_channels, 1, MOST_WIDTH)
        check_range("downsampling", downsampling, 1, 1024)
        check_range("patch", patch, 1, 64)
        check_range("decode_pixels", decode_pixels, 1, 10**12)
        self.model, self.cache_dir, self.skip_pretrained = model, cache_dir, skip_pretrained
        self.latent_channels, self.downsampling, self.patch = latent_channels, downsampling, patch
        self.latent, self.decode_pixels = latent, decode_pixels
        self.precision, self.dtype = dtype, DTYPES[dtype]
        self.token_dim, self.multiple = latent_channels * patch**2, downsampling * patch

    def output_settings(self) -> dict[str, Any]:
        return {
            "model": model_name(self.model),
            "latent_channels": self.latent_channels,
            "downsampling": self.downsampling,
            "patch": self.patch,
            "skip_pretrained": self.skip_pretrained,
            "latent": self.latent,
            "dtype": self.precision,
            "decode_pixels": self.decode_pixels,
        }

    # ---- loading ----

    def load(self, device: torch.device) -> None:
        """Load the weights onto the device. On the meta device only the config is read.

        Raises:
            UserError: diffusers or files are missing, or files are damaged or of another model than the settings.
        """
        self.device = device
        net = self.random() if self.skip_pretrained else self.pretrained()
        self.check_sizes(net)
        self.net = net.to(device, self.dtype).eval().requires_grad_(False)
        mean, std = (torch.empty(self.token_dim), torch.empty(self.token_dim))
        if device.type != "meta":
            mean, std = self.statistics(net)
        self.mean, self.std = mean.to(device), std.to(device)

    def random(self) -> nn.Module:
        """A small network with random weights, the same on every machine."""
        num_stages = self.downsampling.bit_length()
        if self.downsampling != 2 ** (num_stages - 1):
            raise UserError(f"{KEY}.downsampling: must be a power of 2, got {self.downsampling}")
        with torch.random.fork_rng(devices=[]), torch.device("meta" if self.device.type == "meta" else "cpu"):
            torch.manual_seed(0)
            return diffusers_class("AutoencoderKL")(
                down_block_types=("DownEncoderBlock2D",) * num_stages,
                up_block_types=("UpDecoderBlock2D",) * num_stages,
                block_out_channels=(32,) * num_stages,
                latent_channels=self.latent_channels,
                scaling_factor=1.0,
            )

    def pretrained(self) -> nn.Module:
        """The network of a folder, on the CPU; on the meta device without weights."""
        remedy = f"download it with selfe cache-pretrained --autoencoder {self.model}"
        folder = find_model(self.model, self.cache_dir, f"{KEY}.model", remedy)
        settings = read_json(folder / "config.json", AGAIN)
        name = settings.get("_class_name")
        if name not in KINDS:
            hint = "; name its folder vae" if (folder / "vae").is_dir() else ""
            raise UserError(f"{folder}/config.json: the class {name} is not one of {', '.join(KINDS)}{hint}")

        kind = diffusers_class(name)
        if self.device.type == "meta":
            with self.device:
                return kind.from_config(settings)
        weights = SafetensorsFiles.open(folder, AGAIN)
        weights.refuse_quantised(name for name in weights.shapes if not name.endswith("num_batches_tracked"))
        options = {"local_files_only": True, "use_safetensors": True, "low_cpu_mem_usage": False}
        try:
            with quiet("diffusers"):
                net, info = kind.from_pretrained(folder, output_loading_info=True, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder}: not loaded by diffusers ({str(error).splitlines()[0]}); {AGAIN}") from error
        if info["missing_keys"]:
            raise UserError(f"{folder}: lacks the tensor {min(info['missing_keys'])}; {AGAIN}")
        return net

    def check_sizes(self, net: nn.Module) -> None:
        """Raise UserError if the settings are not those of the network."""
        widths = net.config.get("block_out_channels") or net.config["encoder_block_out_channels"]
        sizes = {"latent_channels": net.config["latent_channels"], "downsampling": 2 ** (len(widths) - 1)}
        if "patch_size" in net.config:
            sizes["patch"] = net.config["patch_size"][0]
        for name, size in sizes.items():
            if getattr(self, name) != size:
                raise UserError(f"{KEY}.{name}: the model has {size}, got {getattr(self, name)}; set it to {size}")

    def statistics(self, net: nn.Module) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (token_dim,) of raw tokens, by which tokens are normalised."""
        settings = net.config
        if "batch_norm_eps" in settings:  # FLUX.2
            return net.bn.running_mean.float(), (net.bn.running_var.float() + settings["batch_norm_eps"]).sqrt()

        # per latent channel, and the same for each position in a patch
        scale = settings.get("scaling_factor") or 1.0
        if settings.get("latents_mean") is not None and settings.get("latents_std") is not None:
            mean, std = torch.tensor(settings["latents_mean"]), torch.tensor(settings["latents_std"]) / scale
        else:
            mean = torch.full((self.latent_channels,), float(settings.get("shift_factor") or 0.0))
            std = torch.full((self.latent_channels,), 1 / scale)
        return mean.repeat_interleave(self.patch**2), std.repeat_interleave(self.patch**2)

    @property
    def constants(self) -> dict[str, float]:
        """What normalises the latents, by the names of config.json, as far as it is one number each."""
        settings = self.net.config
        if "batch_norm_eps" in settings or settings.get("latents_std") is not None:
            return {"mean": self.mean.mean().item(), "std": self.std.mean().item()}  # averages over channels
        return {"scaling_factor": settings.get("scaling_factor") or 1.0, "shift_factor": self.mean.mean().item()}

    # ---- encoding and decoding ----

    @torch.no_grad()
    def encode(self, images: Sequence[Tensor], rng: SampleRNG) -> Packed:
        """B x (3, H, W) in [-1, 1] -> tokens (T, token_dim), float32."""
        mean, deviation = self.moments(images)
        if deviation is None:
            return mean
        return mean.with_tokens(mean.tokens + deviation * rng.normal_like("latent", mean))

    @torch.no_grad()
    def moments(self, images: Sequence[Tensor]) -> tuple[Packed, Tensor | None]:
        """Mean and standard deviation of the latent distribution, (T, token_dim) each.

        None instead of the deviation for DC-AE, and with `latent="mean"`.
        """
        encoded = by_shape(images, lambda x: self.encode_alike(x.to(self.device, self.dtype)).float())
        mean = self.patchify([z[: self.latent_channels] for z in encoded])
        mean = mean.with_tokens((mean.tokens - self.mean) / self.std)
        if self.latent == "mean" or len(encoded[0]) == self.latent_channels:
            return mean, None
        deviations = [torch.exp(0.5 * z[self.latent_channels :].clamp(-30, 20)) for z in encoded]
        return mean, self.patchify(deviations).tokens / self.std

    def encode_alike(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> latents (B, channels, h, w), or their means and log variances (B, 2 channels, h, w)."""
        encoded = self.net.encode(images)
        return encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.parameters

    @torch.no_grad()
    def decode(self, latents: Packed) -> list[Tensor]:
        """Tokens (T, token_dim) -> B x (3, H, W), float32, approximately in [-1, 1] (not clamped)."""
        raw = latents.with_tokens(latents.tokens * self.std + self.mean)
        grids = [
            rearrange(tokens, "(h w) (c p q) -> c (h p) (w q)", h=grid[0], p=self.patch, q=self.patch)
            for tokens, grid in zip(raw.split(), raw.grids, strict=True)
        ]
        return by_shape(grids, self.decode_alike)

    def decode_alike(self, z: Tensor) -> Tensor:
        """Decode latents of equal size, (B, channels, h, w) -> (B, 3, H, W), at most `decode_pixels` at once."""
        pixels = z.shape[2] * z.shape[3] * self.downsampling**2
        self.net.use_tiling = pixels > self.decode_pixels
        batches = z.split(max(self.decode_pixels // pixels, 1))
        return torch.cat([self.net.decode(batch.to(self.device, self.dtype)).sample.float() for batch in batches])

    def noise(self, sizes: Sequence[tuple[int, int]], rng: SampleRNG) -> Packed:
        """Standard normal tokens (T, token_dim) for images of B x (height, width) pixels.

        Raises:
            UserError: a height or width is not a multiple of `multiple`.
        """
        for height, width in sizes:
            if height % self.multiple or width % self.multiple or min(height, width) < self.multiple:
                raise UserError(f"size {height} x {width}: height and width must be multiples of {self.multiple}")
        grids = [(height // self.multiple, width // self.multiple) for height, width in sizes]
        tokens = torch.empty(sum(rows * columns for rows, columns in grids), self.token_dim, device=self.device)
        like = packed(tokens, grids)
        return like.with_tokens(rng.normal_like("noise", like))

    def patchify(self, latents: Sequence[Tensor]) -> Packed:
        """B x (channels, h, w) -> tokens (T, token_dim)."""
        tokens = [rearrange(z, "c (h p) (w q) -> (h w) (c p q)", p=self.patch, q=self.patch) for z in latents]
        return packed(torch.cat(tokens), [(z.shape[1] // self.patch, z.shape[2] // self.patch) for z in latents])


def diffusers_class(name: str) -> type[nn.Module]:
    """A class of diffusers, which is imported here, because it is an extra and takes seconds.

    Raises:
        UserError: diffusers is not installed, or its version does not have the class.
    """
    try:
        import diffusers

        return getattr(diffusers, name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"diffusers with {name} is not installed; run scripts/setup.sh --extra diffusers") from error
