"""Features of a Hugging Face vision model (DINOv2, DINOv3, SigLIP, CLIP, ViT) for training aids such as REPA."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, Dinov2Config, Dinov2Model

from selfe.errors import UserError
from selfe.io.model_folder import find_model, model_name, quiet
from selfe.io.safetensors_files import SafetensorsFiles, read_json
from selfe.types import DTYPES, MOST_WIDTH, Packed, Precision, check_range, packed

KEY = "system.objective.params.encoder.params.model"
AGAIN = "copy the files of the model again"
RANDOM_PATCH = 2  # pixels; of the network with random weights
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # of the network with random weights


class HFVision:
    """A vision model of the Hugging Face Hub: the last hidden states of its patches.

    An image is resized (bicubic, antialiased) so that the patches of the model are the tokens of its latents: for 16 x
    16 tokens and patches of 14 pixels to 224 x 224, as in REPA. Position embeddings are interpolated by the model.
    """

    def __init__(
        self,
        model: str,
        feature_dim: int = 768,
        cache_dir: Path | None = None,
        skip_pretrained: bool = False,
        dtype: Precision = "bf16",
    ):
        """
        Args:
            model: name on the Hub, such as `facebook/dinov2-base`, of a folder in `cache_dir`; or the path of a folder,
                which is absolute or starts with `.` or `~`.
            feature_dim: width of the features, the model's hidden_size.
            cache_dir: folder with the models, each under its name.
            skip_pretrained: use a small network with random weights, and read no files.
            dtype: precision of the network.
        """
        check_range("feature_dim", feature_dim, 1, MOST_WIDTH)
        self.model, self.feature_dim, self.cache_dir, self.skip_pretrained = (
            model,
            feature_dim,
            cache_dir,
            skip_pretrained,
        )
        self.precision, self.dtype = dtype, DTYPES[dtype]

    def output_settings(self) -> dict[str, Any]:
        return {
            "model": model_name(self.model),
            "feature_dim": self.feature_dim,
            "skip_pretrained": self.skip_pretrained,
            "dtype": self.precision,
        }

    def load(self, device: torch.device) -> None:
        """Load the weights onto the device.

        Raises:
            UserError: files are missing or damaged, or the sizes differ from the configuration.
        """
        net, statistics = self.random() if self.skip_pretrained else self.pretrained()
        config = getattr(net.config, "vision_config", net.config)
        if config.hidden_size != self.feature_dim:
            raise UserError(f"{KEY}: the model has hidden_size {config.hidden_size}; set feature_dim to it")

        self.net, self.patch = net.to(device, self.dtype).eval().requires_grad_(False), config.patch_size
        mean, std = (torch.tensor(statistics[name], device=device) for name in ("image_mean", "image_std"))
        self.mean, self.std = mean.view(1, 3, 1, 1), std.view(1, 3, 1, 1)
        takes = inspect.signature(net.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}

    def random(self) -> tuple[nn.Module, dict[str, list[float]]]:
        """A small network with random weights, the same on every machine."""
        config = Dinov2Config(
            hidden_size=self.feature_dim,
            num_hidden_layers=2,
            num_attention_heads=1,
            mlp_ratio=2,
            image_size=8 * RANDOM_PATCH,
            patch_size=RANDOM_PATCH,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Dinov2Model(config), HALF

    def pretrained(self) -> tuple[nn.Module, dict[str, list[float]]]:
        """The network of a folder, and the mean and standard deviation of the pixels it was trained on."""
        folder = find_model(
            self.model, self.cache_dir, KEY, f"download it with selfe cache-pretrained --vision-model {self.model}"
        )
        statistics = read_json(folder / "preprocessor_config.json", AGAIN)
        if not {"image_mean", "image_std"} <= statistics.keys():
            raise UserError(f"{folder}/preprocessor_config.json: has no image_mean and image_std; {AGAIN}")
        weights = SafetensorsFiles.open(folder, AGAIN)
        weights.refuse_quantised(weights.shapes)

        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            with quiet("transformers.modeling_utils"):
                net, info = AutoModel.from_pretrained(
                    folder, config=config, local_files_only=True, use_safetensors=True, output_loading_info=True
                )
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder}: not a vision model of transformers ({str(error).splitlines()[0]})") from error
        net = getattr(net, "vision_model", net)
        missing = [name for name in info["missing_keys"] if "text_model" not in name and "pooler" not in name]
        if missing or not hasattr(getattr(net.config, "vision_config", net.config), "patch_size"):
            problem = f"lacks the tensor {min(missing)}" if missing else "its config has no patch_size"
            raise UserError(f"{folder}: not a vision transformer: {problem}; {AGAIN}")
        return net, statistics

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor], grids: Sequence[tuple[int, int]]) -> Packed:
        """B x (3, H, W) in [-1, 1] -> features (T, feature_dim) on grids of B x (rows, columns), float32."""
        groups = defaultdict(list)
        for index, (image, grid) in enumerate(zip(images, grids, strict=True)):
            groups[image.shape, grid].append(index)

        results: dict[int, Tensor] = {}
        for (_, grid), indices in groups.items():
            results |= zip(indices, self.encode(torch.stack([images[index] for index in indices]), grid), strict=True)
        return packed(torch.cat([results[index] for index in range(len(images))]), grids)

    def encode(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> features (B, rows * columns, feature_dim), float32."""
        rows, columns = grid
        size = (rows * self.patch, columns * self.patch)
        pixels = F.interpolate(images.to(self.mean.device).float(), size, mode="bicubic", antialias=True)
        pixels = ((pixels + 1) / 2 - self.mean) / self.std
        states = self.net(pixel_values=pixels.to(self.dtype), **self.options).last_hidden_state
        return states[:, -rows * columns :].float()  # tokens of the class and registers come first
