"""Features of any Hugging Face vision model: CLIP, SigLIP, DINOv2, ViT and others that transformers has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoTokenizer

from selfe.device import to_device
from selfe.encoders.hf_folder import sha256
from selfe.encoders.pretrained_tokenizer import plain_errors
from selfe.errors import UserError
from selfe.io.model_folder import find_model, model_name
from selfe.io.safetensors_files import read_json, shards
from selfe.types import check_range

KEY = "evaluation.extractors.NAME.params.model"


class HFExtractor:
    """A model in a folder of the Hugging Face layout, with `preprocessor_config.json`.

    Images are resized to a square of the model's size, antialiased bicubic in floating point and clipped, as clean-fid
    does it, without a crop; then normalised with the mean and standard deviation of the model. Models with a text
    encoder (CLIP, SigLIP) return image embeddings that are aligned with their text embeddings, others their pooled
    output or, if they have none, the mean over all tokens.
    """

    def __init__(
        self,
        model: str,
        cache_dir: Path | None = None,
        side: int | None = None,
        output: Literal["auto", "pooled", "cls", "mean"] = "auto",
        maps: int | None = None,
    ):
        """
        Args:
            model: a folder (absolute, or starting with `.` or `~`), or a name of the Hub below `cache_dir`.
            cache_dir: the folder of all pretrained models, SELFE_CACHE_DIR.
            side: pixels to which images are resized; default: that of the model's preprocessor.
            output: pooled output, first token or mean over tokens; `auto`: embeddings, pooled output or mean.
            maps: also return the last feature map, averaged to maps x maps positions, for `map_diversity`; takes
                maps x maps times the space of the features.
        """
        check_range("maps", maps, 1, 256)
        self.folder = find_model(
            model, cache_dir, KEY, f"download it with selfe cache-pretrained --vision-model {model}"
        )
        self.model, self.output, self.maps = model, output, maps
        self.has_maps = maps is not None

        self.advice = advice = f"download all files of {model} again"
        described = read_json(self.folder / "config.json", advice)
        processor = read_json(self.folder / "preprocessor_config.json", advice)
        self.has_texts = "text_config" in described and output == "auto"
        self.side = side or side_of(processor, described, self.folder)
        try:
            self.mean = torch.tensor(processor["image_mean"])[:, None, None]
            self.std = torch.tensor(processor["image_std"])[:, None, None]
        except (KeyError, TypeError) as error:
            problem = f"{self.folder}/preprocessor_config.json: has no image_mean and image_std of three numbers"
            raise UserError(f"{problem}; {advice}") from error

    def record(self) -> dict[str, Any]:
        """See `Extractor`."""
        maps = {} if self.maps is None else {"maps": self.maps}
        return maps | {
            "model": model_name(self.model),
            "weights": [sha256(file) for file in shards(self.folder, self.advice)],
            "output": self.output,
            "resize": f"{self.side} x {self.side}, antialiased bicubic, no crop",
        }

    def load(self, device: torch.device) -> None:
        """Read weights and tokenizer. Raises UserError if a file is missing or does not fit."""
        self.net = read_model(AutoModel, self.folder, self.advice).to(device)
        with plain_errors(self.folder, self.advice):
            options = {"local_files_only": True, "trust_remote_code": False}
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder, **options) if self.has_texts else None
        self.device = device
        if self.has_texts:
            self.text_length = self.net.config.get_text_config().max_position_embeddings

    def __call__(self, images: Sequence[Tensor], captions: Sequence[str]) -> dict[str, Tensor]:
        """See `Extractor`; captions do not matter."""
        pixels = torch.cat([resized(to_device(image, self.device)[None], self.side) for image in images])
        pixels = (pixels / 2 + 0.5 - self.mean.to(self.device)) / self.std.to(self.device)
        if self.has_texts:
            embeddings = embedding(self.net.get_image_features(pixel_values=pixels))
            output = {"features": embeddings, "aligned": embeddings}
        else:
            output = {"features": self.pooled(pixels)}
        return output if self.maps is None else output | {"maps": self.feature_maps(pixels)}

    def feature_maps(self, pixels: Tensor) -> Tensor:
        """(B, 3, side, side) -> (B, maps^2 C): the last layer, a unit vector at each position, all of equal weight."""
        states = getattr(self.net, "vision_model", self.net)(pixel_values=pixels).last_hidden_state
        if states.ndim == 3:
            # tokens of patches come last, after those of classes and registers
            side = math.isqrt(states.shape[1])
            states = states[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))
        vectors = F.normalize(F.adaptive_avg_pool2d(states, self.maps), dim=1)
        return vectors.flatten(1) / self.maps

    def pooled(self, pixels: Tensor) -> Tensor:
        """(B, 3, side, side) -> (B, d)."""
        net = getattr(self.net, "vision_model", self.net)
        output = net(pixel_values=pixels)
        states, pooler = output.last_hidden_state, getattr(output, "pooler_output", None)
        if self.output in ("auto", "pooled") and pooler is not None:
            return pooler.flatten(1)
        if self.output == "pooled":
            raise UserError(f"{self.folder}: the model has no pooled output; set output to cls or mean")
        return states[:, 0] if self.output == "cls" else states.flatten(2 if states.ndim == 3 else 1).mean(dim=1)

    def texts(self, captions: Sequence[str]) -> Tensor:
        """See `Extractor`. All captions have the length of the model's longest: SigLIP was trained so."""
        options = {"padding": "max_length", "truncation": True, "max_length": self.text_length}
        ids = self.tokenizer(list(captions), return_tensors="pt", **options)["input_ids"]
        return embedding(self.net.get_text_features(input_ids=to_device(ids, self.device)))


def read_model(auto: Any, folder: Path, advice: str) -> nn.Module:
    """A frozen model in float32. Raises UserError if its files do not fit.

    Args:
        auto: a class of transformers such as `AutoModel`.
        advice: what to do about a damaged file.
    """
    with plain_errors(folder, advice):
        options = {"local_files_only": True, "trust_remote_code": False}
        config = AutoConfig.from_pretrained(folder, **options)
        net, info = auto.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
        )
    if missing := sorted(info["missing_keys"]):
        # a pooling layer that the file lacks would have random weights
        raise UserError(
            f"{folder}: the weights have no {missing[0]}, which the model of config.json needs; use weights that match "
            "config.json"
        )
    return net.eval().requires_grad_(False)


def embedding(output: Any) -> Tensor:
    """The tensor (B, e) of what `get_image_features` returns, which differs between versions of transformers."""
    return output if isinstance(output, Tensor) else output.pooler_output


def resized(images: Tensor, side: int) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, 3, side, side), antialiased bicubic with PIL's coefficients, clipped."""
    return F.interpolate(images, (side, side), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)


def side_of(processor: dict, described: dict, folder: Path) -> int:
    """Pixels of the images that a model takes, from its preprocessor or its configuration."""
    size = processor["crop_size"] if processor.get("do_center_crop", True) and "crop_size" in processor else None
    size = size if size is not None else processor.get("size")
    if isinstance(size, dict):
        size = size.get("height", size.get("shortest_edge"))
    if size is None:
        size = described.get("vision_config", described).get("image_size")
    if not isinstance(size, int):
        raise UserError(f"{folder}/preprocessor_config.json: names no size of images; set side")
    return size
