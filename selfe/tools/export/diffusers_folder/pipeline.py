"""Any-step sampling of a Self-E model (arXiv 2512.22374) as a diffusers pipeline; imports nothing from selfe.

pipe = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
pipe("a red bird on a branch", num_inference_steps=4).images[0]
"""

import hashlib
import json
import logging
import math
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FluxTransformer2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import FluxLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from transformers import CLIPTextModel, T5EncoderModel

# selfe/io/sampling_limits.py, which `selfe export` copies beside this file
from .selfe_limits import (
    check_interval,
    check_multiple,
    check_range,
    check_size,
    check_text,
    normal_prompt,
    real_number,
    whole_number,
)

PATCH = 2
PAD_MULTIPLE, CLIP_TOKENS = 32, 77  # as in selfe.encoders.t5_clip: T5 pads to a multiple, CLIP to its 77 positions
EDGE = 1e-4  # by which an interval of guidance is larger, because times are rounded
DEFAULT_SIZE = 512, 512  # height and width of images in pixels
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# read now: diffusers may copy the code of another pipeline over these files later
CODE = {name: (Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("pipeline.py", "selfe_limits.py")}

logger = logging.getLogger(__name__)
# diffusers executes this file again for every pipeline that it loads
EARLIER = globals().get("SelfEPipeline")


class SelfEPipeline(DiffusionPipeline, FluxLoraLoaderMixin):
    """Generates images one by one. An image is a function of (seed, prompt, sample number).

    `load_lora_weights` loads adapters; it needs the package peft.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->transformer->vae"
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012 - as in diffusers
    _interrupt = False  # as in diffusers, set by a callback to end the sampling
    code = CODE

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer,
        text_encoder_2: T5EncoderModel,
        tokenizer_2,
        max_tokens: int = 512,
        preset: dict[str, dict] | None = None,
        default_size: list[int] | None = None,
        default_s_ratio: float = 0.0,
    ):
        """
        Args:
            max_tokens: maximum number of T5 tokens in training; longer prompts are truncated.
            preset: the best guidance_scale, s_ratio, eta and guidance_interval by number of steps.
            default_size: height and width of images in pixels, near those of the training; None: 512 and 512.
            default_s_ratio: 1 for a model that was trained by flow matching.
        """
        super().__init__()
        self.register_modules(
            transformer=transformer,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
        )
        self.register_to_config(
            max_tokens=max_tokens, preset=preset, default_size=default_size, default_s_ratio=default_s_ratio
        )
        self.factor = PATCH * 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.factor)

    @torch.no_grad()
    def __call__(
        self,
        prompt=None,
        num_inference_steps: int = 4,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | None = None,
        s_ratio: float | None = None,
        eta: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        seed: int = 0,
        negative_prompt=None,
        num_images_per_prompt: int = 1,
        generator=None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs=("latents",),
        max_sequence_length: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        """
        Args:
            prompt: a caption or a list of them. A repeated caption is a further sample of it, with new noise.
            num_inference_steps: sampling steps; one network call each, two with guidance.
            height, width: pixels; None: those of `config.default_size`.
            guidance_scale: scale of energy-preserving classifier-free guidance; 1 disables it. If this, `s_ratio`,
                `eta` and `guidance_interval` are all None, they are those of `config.preset` for the nearest number of
                steps. Without a preset, and for the others if one is given, None is 5, `config.default_s_ratio`, 1 and
                all times.
            s_ratio: secondary time s of a step, from its end (0, few steps) to its start (1, flow matching).
            eta: share of fresh noise, from 0 (deterministic) to 1 (ancestral).
            guidance_interval: times between which guidance applies, from 1, the first step, to 0; None: at all times.
            seed: noise is keyed by (seed, prompt, sample number), as in `selfe infer`.
            negative_prompt: a caption, or one per prompt, that replaces the null prompt of guidance.
            generator: a torch.Generator, or one per image, to draw all noise from instead of `seed`.
            latents: initial noise (images, tokens, channels) instead of `seed` or `generator`.
            prompt_embeds, pooled_prompt_embeds: (B, n, text width) and (B, pooled width) instead of `prompt`, as
                `encode_prompt` returns them; the same for `negative_prompt`. Their noise is keyed by (seed, row).
            output_type: "pil", "np", "pt", or "latent" for (images, tokens, channels) in float32.
            return_dict: False returns a tuple.
            callback_on_step_end: called as (pipeline, step, time, {"latents": (1, tokens, channels)}) after each step
                of each image; may return a dict with other latents. If it sets `_interrupt` of the pipeline, sampling
                ends there, and the images so far are returned.
            max_sequence_length: maximum number of T5 tokens, at most and by default `config.max_tokens`.

        Raises:
            ValueError: an argument is not valid, or a network returned infinite or NaN values.
        """
        # Check all settings before any network runs.
        num_steps = whole_number("num_inference_steps", num_inference_steps)
        check_range("num_steps", num_steps, "num_inference_steps")
        repeats = whole_number("num_images_per_prompt", num_images_per_prompt)
        check_range("num_samples", repeats, "num_images_per_prompt")
        seed = whole_number("seed", seed)
        check_range("seed", seed)
        if self.config.preset and guidance_scale is s_ratio is eta is guidance_interval is None:
            at = nearest(self.config.preset, num_steps)
            guidance_scale, s_ratio, eta = (at[name] for name in ("guidance_scale", "s_ratio", "eta"))
            guidance_interval = at["guidance_interval"]
        guidance, s_ratio, eta = self.checked_numbers(guidance_scale, s_ratio, eta)
        check_interval("guidance_interval", guidance_interval)
        height, width = self.checked_size(height, width)
        max_tokens = self.checked_length(max_sequence_length)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type: expected one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        self.check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)

        # Conditioning of each prompt, and of its negative prompt.
        conds = self.given_embeds("prompt", prompt, prompt_embeds, pooled_prompt_embeds)
        prompts = checked_prompts(prompt) if conds is None else [""] * len(conds)
        negatives = self.given_embeds(
            "negative_prompt", negative_prompt, negative_prompt_embeds, negative_pooled_prompt_embeds
        )
        negative_texts = checked_negatives(negative_prompt, len(prompts))
        if negatives is not None and len(negatives) != len(prompts):
            raise ValueError(f"negative_prompt_embeds: {len(negatives)} rows for {len(prompts)} prompts")
        keys = noise_keys(seed, prompts, negative_texts, repeats)
        latents = self.checked_latents(latents, len(keys), height, width)
        generators = checked_generators(generator, len(keys))

        encoded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        if conds is None:
            conds = [self.encode_once(text, encoded, max_tokens) for text in prompts]
        if guidance == 1:
            negatives = [None] * len(prompts)
        elif negatives is None:
            negatives = [self.encode_once(text, encoded, max_tokens) for text in negative_texts]

        # Sample the latents image by image.
        self._interrupt = False
        results = []
        with self.progress_bar(total=len(keys) * num_steps) as progress:
            for index, key in enumerate(keys):
                draw = self.source_of_noise(key, generators[index], height, width)
                x = draw("noise") if latents is None else latents[[index]]

                def step_done(step: int, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
                    progress.update()
                    if callback_on_step_end is None:
                        return x
                    return (callback_on_step_end(self, step, t, {"latents": x}) or {}).get("latents", x)

                cond, null = conds[index // repeats], negatives[index // repeats]
                guides = guidances(guidance, guidance_interval, num_steps)
                x = self.denoise(x, cond, null, draw, guides, (height, width), s_ratio, eta, step_done)
                check_finite(x, "the denoiser", prompts[index // repeats])
                results.append(x)
                if self._interrupt:
                    break

        # Decode.
        if output_type == "latent":
            images = torch.cat(results)
        else:
            decoded = [self.decode(x, height, width).float() for x in results]
            for index, image in enumerate(decoded):
                check_finite(image, "the autoencoder", prompts[index // repeats])
            images = self.to_output(decoded, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images) if return_dict else (images,)

    # ---- arguments ----

    @property
    def interrupt(self) -> bool:
        """Whether a callback has ended the sampling."""
        return self._interrupt

    def checked_numbers(self, guidance_scale, s_ratio, eta) -> tuple[float, float, float]:
        """Finite numbers within the ranges of `selfe infer`; None is the default."""
        values = []
        for label, name, value, default in (
            ("guidance_scale", "cfg_scale", guidance_scale, 5.0),
            ("s_ratio", "s_ratio", s_ratio, self.config.default_s_ratio),
            ("eta", "eta", eta, 1.0),
        ):
            value = default if value is None else real_number(label, value)
            check_range(name, value, label)
            values.append(value)
        return tuple(values)

    def checked_size(self, height, width) -> tuple[int, int]:
        default = self.config.default_size or DEFAULT_SIZE
        height, width = (default[0] if height is None else height), (default[1] if width is None else width)
        height, width = whole_number("height", height), whole_number("width", width)
        check_size(height, width)
        check_multiple("height", height, self.factor)
        check_multiple("width", width, self.factor)
        return height, width

    def checked_length(self, max_sequence_length) -> int:
        if max_sequence_length is None:
            return self.config.max_tokens
        length = whole_number("max_sequence_length", max_sequence_length)
        if not 1 <= length <= self.config.max_tokens:
            raise ValueError(
                f"max_sequence_length: {length} is not between 1 and {self.config.max_tokens}, the model's"
            )
        return length

    def check_callback(self, callback, tensor_inputs) -> None:
        if callback is not None and not callable(callback):
            raise ValueError(f"callback_on_step_end: expected a function, got {type(callback).__name__}")
        if unknown := [name for name in tensor_inputs or () if name not in self._callback_tensor_inputs]:
            raise ValueError(f"callback_on_step_end_tensor_inputs: {unknown[0]!r} is not available; only latents are")

    def given_embeds(self, name, text, embeds, pooled) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """Conditioning from the caller's embeddings, one entry per row; None without them."""
        if embeds is None and pooled is None:
            return None
        if embeds is None or pooled is None:
            prefix = name.removesuffix("prompt")
            raise ValueError(f"{name}_embeds and {prefix}pooled_prompt_embeds must be given together")
        if text is not None:
            raise ValueError(f"{name} and {name}_embeds: give one of them")

        config = self.transformer.config
        widths = config.joint_attention_dim, config.pooled_projection_dim
        for tensor, dims, width in ((embeds, 3, widths[0]), (pooled, 2, widths[1])):
            shape = tuple(getattr(tensor, "shape", ()))
            if len(shape) != dims or shape[-1] != width or shape[0] != len(embeds):
                raise ValueError(
                    f"{name}_embeds: expected (B, n, {widths[0]}) and pooled (B, {widths[1]}), got {shape}"
                )
            check_finite(tensor, f"{name}_embeds", "the caller")

        place = {"device": self._execution_device, "dtype": self.transformer.dtype}
        return [(embeds[[row]].to(**place), pooled[[row]].to(**place)) for row in range(len(embeds))]

    def checked_latents(self, latents, count: int, height: int, width: int) -> torch.Tensor | None:
        if latents is None:
            return None
        tokens = (height // self.factor) * (width // self.factor)
        expected = count, tokens, self.transformer.config.in_channels
        if not isinstance(latents, torch.Tensor) or tuple(latents.shape) != expected:
            got = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
            raise ValueError(
                f"latents: expected {expected} (images, tokens, channels) at {height} x {width}, got {got}"
            )
        check_finite(latents, "latents", "the caller")
        return latents.to(self._execution_device, torch.float32)

    # ---- encoders ----

    def encode_prompt(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        """T5 tokens (1, n, width) and CLIP's pooled vector (1, width) of a caption, as `prompt_embeds` takes them."""
        with torch.no_grad():
            return self.encode(normal_prompt(prompt), self.config.max_tokens)

    def encode_once(self, text: str, encoded: dict, max_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        if text not in encoded:
            encoded[text] = self.encode(text, max_tokens)
        return encoded[text]

    def encode(self, text: str, max_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """T5 tokens (1, n, width), without padding, and CLIP's pooled vector (1, width) of a caption."""
        ids = self.tokenizer_2(text, verbose=False)["input_ids"]
        if len(ids) > max_tokens:
            logger.warning("prompt truncated from %d to %d T5 tokens: %.60s...", len(ids), max_tokens, text)
            ids = self.tokenizer_2(text, truncation=True, max_length=max_tokens)["input_ids"]

        # Both encoders pad inside, as in training, so that lengths need few kernels.
        padded = -(-len(ids) // PAD_MULTIPLE) * PAD_MULTIPLE
        mask = torch.arange(padded)[None] < len(ids)
        device, dtype = self._execution_device, self.transformer.dtype
        tokens = self.text_encoder_2(padded_ids(ids, padded).to(device), attention_mask=mask.to(device))
        clip_ids = self.tokenizer(text, truncation=True, max_length=CLIP_TOKENS)["input_ids"]
        pooled = self.text_encoder(padded_ids(clip_ids, CLIP_TOKENS).to(device)).pooler_output

        tokens = tokens.last_hidden_state[:, : len(ids)]
        check_finite(tokens, "a text encoder", text)
        check_finite(pooled, "a text encoder", text)
        return tokens.to(dtype), pooled.to(dtype)

    def decode(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Tokens (1, n, channels) -> image (1, 3, height, width) in [-1, 1]."""
        rows, columns = height // self.factor, width // self.factor

        # unpatchify
        z = x.reshape(1, rows, columns, -1, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
        z = z.reshape(1, -1, PATCH * rows, PATCH * columns)

        z = z / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0]

    def to_output(self, images: list[torch.Tensor], output_type: str) -> list | np.ndarray | torch.Tensor:
        """Images (1, 3, height, width) in [-1, 1] -> 8-bit images, rounded as by `selfe infer`, or arrays in [0, 1]."""
        if output_type != "pil":
            return self.image_processor.postprocess(torch.cat(images), output_type)
        pixels = [((image[0].clamp(-1, 1) + 1) * 127.5).round().byte() for image in images]
        return [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in pixels]

    # ---- sampling ----

    def denoise(self, x, cond, null, draw, guidances, size, s_ratio, eta, step_done) -> torch.Tensor:
        """Noise (1, n, channels) -> data. Each step predicts x0 and noise, and renoises with a share of fresh noise.

        `guidances`: the scale of guidance of each step.
        """
        num_steps = len(guidances)
        t = self.times(num_steps, x.shape[1])
        for k, guidance in enumerate(guidances):
            s = t[k + 1] + s_ratio * (t[k] - t[k + 1])
            v = self.velocity(x, t[k], s, cond, size)

            # energy-preserving guidance: the norm of v is kept
            if guidance != 1:
                v_null = self.velocity(x, t[k], s, null, size)
                guided = v_null + guidance * (v - v_null)
                v = guided * (v.norm() / guided.norm().clamp_min(1e-20))

            # renoise to t[k + 1]: DDIM with eta
            x0, noise = x - t[k] * v, x + (1 - t[k]) * v
            rest = (1 - t[k + 1]).clamp_min(torch.finfo(t.dtype).tiny)
            inside = t[k].square() - ((1 - t[k]) / rest).square() * t[k + 1].square()
            fresh = eta * t[k + 1] / t[k] * inside.clamp_min(0).sqrt()
            kept = (t[k + 1].square() - fresh.square()).clamp_min(0).sqrt()
            x = (1 - t[k + 1]) * x0 + kept * noise
            if eta > 0 and k + 1 < num_steps:
                x = x + fresh * draw(f"fresh {k}")
            x = step_done(k, t[k], x)
            if self._interrupt:
                break
        return x

    def velocity(self, x, t, s, cond, size) -> torch.Tensor:
        """One network call, in the network's precision; times and result in float32."""
        text, pooled = cond
        rows, columns = size[0] // self.factor, size[1] // self.factor
        grid = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)).float()
        return self.transformer(
            hidden_states=x.to(self.transformer.dtype),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            t=t[None],
            s=s[None],
            img_ids=grid.to(x.device),
            txt_ids=torch.zeros(text.shape[1], 3, device=x.device),
        ).float()

    def times(self, num_steps: int, num_tokens: int) -> torch.Tensor:
        """Times (num_steps + 1,) from 1 to 0: uniform, then warped by the number of image tokens (S.2)."""
        mu = 0.5 + (1.15 - 0.5) / (4096 - 512) * (num_tokens - 512)
        t = torch.linspace(1, 0, num_steps + 1, device=self._execution_device)
        pushed = torch.tensor(mu, device=t.device).exp() * t
        return pushed / (pushed + (1 - t))

    def source_of_noise(self, key: tuple, generator: torch.Generator | None, height: int, width: int):
        """A function from the name of a draw to standard normal tokens (1, n, channels) of one image."""
        shape = (height // self.factor) * (width // self.factor), self.transformer.config.in_channels

        def draw(name: str) -> torch.Tensor:
            if generator is not None:
                return randn_tensor((1, *shape), generator=generator, device=self._execution_device)
            # the same random numbers as in `selfe infer`
            digest = hashlib.blake2b(repr((*key, name)).encode(), digest_size=16).digest()
            philox = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
            return torch.from_numpy(philox.standard_normal(shape, np.float32))[None].to(self._execution_device)

        return draw

    # ---- saving ----

    def save_config(self, save_directory, **kwargs) -> None:
        """Write model_index.json, and the code that it names."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.code.items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / "transformer").mkdir(exist_ok=True)
        (folder / "transformer" / "dual_time_flux.py").write_text(self.transformer.code, encoding="utf-8")
        super().save_config(save_directory, **kwargs)

    def to_json_string(self) -> str:
        """The index with the files of the two classes defined here; diffusers would name where it imported them."""
        index = json.loads(super().to_json_string())
        index["_class_name"] = ["pipeline", type(self).__name__]
        index["transformer"][0] = "dual_time_flux"
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """As in diffusers, which passes on only transformers of exactly the class in the signature."""
        return super().from_pipe(pipeline, **{"transformer": pipeline.transformer} | kwargs)


if EARLIER is not None and EARLIER.code == CODE:
    SelfEPipeline = EARLIER  # one class for all pipelines of this code: serialisation looks it up by name
del EARLIER  # diffusers accepts one name for the pipeline's class


def checked_prompts(prompt) -> list[str]:
    """One prompt or several, without spaces around them."""
    prompts = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
    if not prompts:
        raise ValueError("prompt: the list is empty")
    return [normal_prompt(text) for text in prompts]


def checked_negatives(negative_prompt, count: int) -> list[str]:
    """One negative prompt for each of `count` prompts; the null prompt without any."""
    if negative_prompt is None:
        return [""] * count
    negatives = list(negative_prompt) if isinstance(negative_prompt, (list, tuple)) else [negative_prompt] * count
    if len(negatives) != count:
        raise ValueError(f"negative_prompt: {len(negatives)} for {count} prompts")
    for text in negatives:
        if not isinstance(text, str):
            raise ValueError(f"negative_prompt: expected a string, got {type(text).__name__} {text!r}")
        check_text("negative_prompt", text)
    return [str(text) for text in negatives]


def checked_generators(generator, count: int) -> list[torch.Generator | None]:
    """The generator of each of `count` images."""
    generators = list(generator) if isinstance(generator, (list, tuple)) else [generator] * count
    if len(generators) != count:
        raise ValueError(f"generator: {len(generators)} generators for {count} images")
    for each in generators:
        if each is not None and not isinstance(each, torch.Generator):
            raise ValueError(f"generator: expected torch.Generator, got {type(each).__name__}; for a number use seed")
    return generators


def nearest(preset: dict[str, dict], num_steps: int) -> dict:
    """The settings of the number of steps that is nearest by ratio; as selfe.inference.presets.nearest."""
    return preset[min(preset, key=lambda count: (abs(math.log(int(count) / num_steps)), int(count)))]


def guidances(scale: float, interval: tuple[float, float] | None, num_steps: int) -> list[float]:
    """The scale of guidance of each step, 1 outside of the interval; as selfe.samplers.guidance.is_inside."""
    low, high = (0, 1) if interval is None else interval
    return [scale if low - EDGE <= 1 - k / num_steps <= high + EDGE else 1 for k in range(num_steps)]


def noise_keys(seed: int, prompts: list[str], negatives: list[str], repeats: int) -> list[tuple[int, str, int]]:
    """(seed, prompt, sample number) of each image; a repeated prompt continues the numbers, as in `selfe infer`."""
    taken: Counter = Counter()
    keys = []
    for request in zip(prompts, negatives, strict=True):
        keys += [(seed, request[0], taken[request] + sample) for sample in range(repeats)]
        taken[request] += repeats
    return keys


def padded_ids(ids: list[int], length: int) -> torch.Tensor:
    """Token ids (1, length), padded with 0."""
    return torch.tensor([ids + [0] * (length - len(ids))])


def check_finite(tensor: torch.Tensor, source: str, name: str) -> None:
    """Raise ValueError if a result, which would become a black image, has infinite or NaN values."""
    if not tensor.isfinite().all():
        raise ValueError(f"{name}: {source} returns infinite or NaN values; try torch_dtype=torch.float32")
