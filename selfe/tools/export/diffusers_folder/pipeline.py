"""Any-step sampling of a Self-E model (arXiv 2512.22374) as a diffusers pipeline; imports nothing from selfe.

pipe = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
pipe("a red bird on a branch", num_inference_steps=4).images[0]
"""

import hashlib
import math

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from transformers import CLIPTextModel, T5EncoderModel

PATCH = 2


class SelfEPipeline(DiffusionPipeline):
    """Generates images one by one, captions unpadded. An image is a function of (seed, prompt, sample number)."""

    model_cpu_offload_seq = "text_encoder->text_encoder_2->transformer->vae"

    def __init__(
        self,
        transformer,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer,
        text_encoder_2: T5EncoderModel,
        tokenizer_2,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
        )
        self.factor = PATCH * 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.factor)

    @torch.no_grad()
    def __call__(
        self,
        prompt,
        num_inference_steps: int = 4,
        height: int = 512,
        width: int = 512,
        guidance_scale: float = 5.0,
        s_ratio: float = 0.0,
        eta: float = 1.0,
        seed: int = 0,
        num_images_per_prompt: int = 1,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """
        Args:
            prompt: a caption or a list of them.
            num_inference_steps: sampling steps; one network call each, two with guidance.
            guidance_scale: scale of energy-preserving classifier-free guidance; 1 disables it.
            s_ratio: secondary time s of a step, from its end (0, few steps) to its start (1, flow matching).
            eta: share of fresh noise, from 0 (deterministic) to 1 (ancestral).
            latents: initial noise (images, tokens, channels); default: keyed by (seed, prompt, sample number).
            output_type: "pil", "np" or "pt".
        """
        if height % self.factor or width % self.factor:
            raise ValueError(f"height and width must be multiples of {self.factor}, got {height} x {width}")

        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        null = self.encode("") if guidance_scale != 1 else None

        images = []
        for number, text in enumerate(prompts):
            cond = self.encode(text)
            for sample in range(num_images_per_prompt):
                row = number * num_images_per_prompt + sample
                key = (seed, text, sample)
                x = (
                    latents[[row]].to(self._execution_device)
                    if latents is not None
                    else self.draw(key, "noise", height, width)
                )
                x = self.denoise(x, cond, null, key, num_inference_steps, height, width, guidance_scale, s_ratio, eta)
                images.append(self.decode(x, height, width))

        return ImagePipelineOutput(self.image_processor.postprocess(torch.cat(images).float(), output_type))

    def denoise(self, x, cond, null, key, num_steps, height, width, guidance_scale, s_ratio, eta) -> torch.Tensor:
        """Noise (1, n, channels) -> data. Each step predicts x0 and noise, and renoises with a share of fresh noise."""
        t = self.times(num_steps, x.shape[1])
        for k in range(num_steps):
            s = t[k + 1] + s_ratio * (t[k] - t[k + 1])
            v = self.velocity(x, t[k], s, cond, height, width)

            # energy-preserving guidance: the norm of v is kept
            if guidance_scale != 1:
                v_null = self.velocity(x, t[k], s, null, height, width)
                guided = v_null + guidance_scale * (v - v_null)
                v = guided * v.norm() / guided.norm().clamp_min(1e-20)

            # renoise to t[k + 1]: DDIM with eta
            x0, noise = x - t[k] * v, x + (1 - t[k]) * v
            inside = t[k] ** 2 - ((1 - t[k]) / (1 - t[k + 1])) ** 2 * t[k + 1] ** 2
            fresh = eta * t[k + 1] / t[k] * inside.clamp_min(0).sqrt()
            x = (1 - t[k + 1]) * x0 + (t[k + 1] ** 2 - fresh**2).clamp_min(0).sqrt() * noise
            if eta > 0 and k + 1 < num_steps:
                x = x + fresh * self.draw(key, f"fresh {k}", height, width)
        return x

    def velocity(self, x, t, s, cond, height, width) -> torch.Tensor:
        """One network call, in the network's precision; times and result in float32."""
        text, pooled = cond
        rows, columns = height // self.factor, width // self.factor
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
        return math.exp(mu) * t / (math.exp(mu) * t + 1 - t)

    def draw(self, key: tuple, name: str, height: int, width: int) -> torch.Tensor:
        """Standard normal tokens (1, n, channels) keyed by (key, name); the same random numbers as in `selfe infer`."""
        digest = hashlib.blake2b(repr((*key, name)).encode(), digest_size=16).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
        shape = (height // self.factor) * (width // self.factor), self.transformer.config.in_channels
        return torch.from_numpy(generator.standard_normal(shape, np.float32))[None].to(self._execution_device)

    def encode(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """T5 tokens (1, n, width) and CLIP's pooled vector (1, width) of a caption, unpadded."""

        def ids(tokenizer, length: int) -> torch.Tensor:
            return torch.tensor(
                [tokenizer(text, truncation=True, max_length=length)["input_ids"]], device=self._execution_device
            )

        dtype = self.transformer.dtype
        tokens = self.text_encoder_2(ids(self.tokenizer_2, 512)).last_hidden_state
        pooled = self.text_encoder(ids(self.tokenizer, 77)).pooler_output
        return tokens.to(dtype), pooled.to(dtype)

    def decode(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Tokens (1, n, channels) -> image (1, 3, height, width) in [-1, 1]."""
        rows, columns = height // self.factor, width // self.factor

        # unpatchify
        z = x.reshape(1, rows, columns, -1, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
        z = z.reshape(1, -1, PATCH * rows, PATCH * columns)

        z = z / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0]
