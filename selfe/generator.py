"""Sampling from Python: from a checkpoint to images in memory, without a config or an output folder.

generator = Generator("runs/selfe_2b/checkpoints")
images = generator.generate(["a red bird on a branch"], num_steps=4, seed=1)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from selfe import compare, config, device, recorded_run
from selfe.checkpoint.weights import find_weights, load_weights
from selfe.encoders.remembered_text import RememberedText
from selfe.errors import UserError
from selfe.inference import prompts as prompt_lists
from selfe.inference.prompts import SamplingDefaults
from selfe.io import image_encode
from selfe.io.sampling_limits import check_multiple, check_size
from selfe.protocols import Sampler
from selfe.rng import SampleRNG
from selfe.types import DTYPES, PrecisionOrAuto

DEFAULTS = SamplingDefaults()


class Generator:
    """A checkpoint on one device, ready to sample. For the same settings, its images are those of `infer.sh`."""

    def __init__(
        self,
        checkpoint: str | Path,
        config_path: str | Path | None = None,
        weights: str = "ema",
        precision: PrecisionOrAuto = "auto",
        trust: bool = False,
        size: tuple[int, int] | None = None,
    ):
        """
        Args:
            checkpoint: checkpoint directory, a parent directory (newest is used), or a folder of `selfe export`.
            config_path: the run's `config.yaml`; None: the one beside the checkpoints.
            weights: "ema", "live" or the name of another average of the run.
            precision: of the denoiser; auto: bf16 where the hardware has it, otherwise fp32.
            trust: let the config.yaml beside the checkpoints name modules that are not part of this package, which
                runs their code.
            size: height and width of images in pixels; None: those of the run's sample grids.

        Raises:
            UserError: there is no complete checkpoint or no config, or one does not fit the other; an invalid size.
        """
        path = find_weights(Path(checkpoint))
        settings_path = config_path or compare.config_beside(path)
        if settings_path is None:
            raise UserError(f"{path}: no config.yaml beside the checkpoints; give the run's (config_path, --config)")
        self.settings = recorded_run.load_settings(Path(settings_path), trust=trust or config_path is not None)
        with torch.device("meta"):
            self.system = config.build(self.settings, "system")

        # an invalid size is refused before any weight is loaded
        self.size = size or recorded_run.image_size(self.settings) or (DEFAULTS.height, DEFAULTS.width)
        try:
            check_size(*self.size)
            for side in self.size:
                check_multiple("size", side, self.system.autoencoder.multiple)
        except ValueError as error:
            raise UserError(str(error)) from error

        self.device = device.choose_device(0)
        self.weights, self.dtype = weights, DTYPES[device.choose_precision(precision, self.device)]
        self.net = self.system.backbone.to_empty(device=self.device).requires_grad_(False)
        self.load(path)
        self.system.text_encoder = RememberedText(self.system.text_encoder)
        self.system.load_encoders(self.device)

    def load(self, path: Path) -> None:
        """Load the weights of a checkpoint of the same system."""
        self.net.float()  # the dtype of the files, from which the weights are rounded
        self.step = load_weights(path, self.net, self.weights)
        self.net.to(self.dtype)
        self.path = path

    def generate(
        self,
        prompts: Sequence[str],
        *,
        num_steps: int = 4,
        cfg_scale: float = DEFAULTS.cfg_scale,
        s_ratio: float = DEFAULTS.s_ratio,
        guidance_interval: tuple[float, float] | None = None,
        seed: int = DEFAULTS.seed,
        sample: int = DEFAULTS.first_sample,
        height: int | None = None,
        width: int | None = None,
        sampler: Sampler = DEFAULTS.sampler,
        preset: str | Path | None = None,
        negative_prompt: str = "",
        batch_size: int = 16,
    ) -> list[Image.Image]:
        """One image for each of B prompts, a function of (seed, prompt, sample) and the settings.

        Args:
            cfg_scale: guidance; 1 is none, and takes half the time.
            s_ratio: second time of a step: 0 for few steps, 0.5 for one step, 1 as in flow matching.
            guidance_interval: times between which guidance applies, from 1, the first step, to 0; None: at all times.
            sample: number of the image of this prompt and seed.
            height: pixels; None: that of `size`, as for the width.
            preset: file of `selfe tune-sampler`, which replaces guidance, s ratio and sampler.
            negative_prompt: replaces the null prompt in guidance.
            batch_size: maximum number of images in a batch.

        Raises:
            UserError: a prompt is empty or invalid, or a size is not a multiple of the autoencoder's.
            ValueError: another value is out of range.
        """
        settings = SamplingDefaults(
            num_steps=num_steps,
            cfg_scale=cfg_scale,
            s_ratio=s_ratio,
            guidance_interval=guidance_interval,
            seed=seed,
            first_sample=sample,
            height=height or self.size[0],
            width=width or self.size[1],
            sampler=sampler,
            negative_prompt=negative_prompt,
            preset=None if preset is None else Path(preset),
        )
        for name in ("num_steps", "cfg_scale", "s_ratio"):
            if isinstance(getattr(settings, name), (tuple, list)):
                raise ValueError(f"{name}: give one value, got {getattr(settings, name)}")
        requests = prompt_lists.from_list(prompts, settings, self.system.autoencoder.multiple)
        prompts = [request.prompt for request in requests]
        (variant,) = settings.variants()

        images = []
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            images += self.system.generate(
                self.net,
                batch,
                [(settings.height, settings.width)] * len(batch),
                SampleRNG.of_images([(seed, prompt, sample) for prompt in batch]),
                **variant._asdict(),
                negative_prompts=[negative_prompt] * len(batch),
            )
        return [image_encode.to_image(image) for image in images]
