"""Nodes of ComfyUI for an exported Self-E pipeline; imports nothing from selfe.

Copy this file to ComfyUI/custom_nodes/. It needs diffusers and transformers in ComfyUI's environment. The loader runs
the Python files of the folder that it is given, so give it only folders that you trust.
"""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import get_device

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OFFLOADS = ("none", "model", "sequential")
CATEGORY = "Self-E"


class SelfELoader:
    """Loads a folder of `selfe export --format diffusers`, or such a repository of the Hugging Face Hub."""

    CATEGORY = CATEGORY
    RETURN_TYPES = ("SELFE_PIPELINE",)
    RETURN_NAMES = ("pipeline",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "folder": ("STRING", {"default": ""}),
                "dtype": (list(DTYPES), {"default": "bfloat16"}),
                "offload": (list(OFFLOADS), {"default": "none"}),
            }
        }

    def load(self, folder: str, dtype: str, offload: str) -> tuple[DiffusionPipeline]:
        """The pipeline on the accelerator, or on the CPU without one.

        Args:
            folder: folder of this machine, or USER/NAME.
            offload: what is moved to the accelerator only while it runs: whole networks, or single layers.
        """
        folder = folder.strip()
        is_local = Path(folder).is_dir() or folder.count("/") != 1
        if is_local and not (Path(folder) / "model_index.json").is_file():
            raise ValueError(f"folder: {folder!r} is no folder of `selfe export --format diffusers`, and not USER/NAME")
        pipeline = DiffusionPipeline.from_pretrained(
            folder, custom_pipeline=folder, trust_remote_code=True, torch_dtype=DTYPES[dtype]
        )
        pipeline.set_progress_bar_config(disable=True)

        device = get_device()
        if offload == "model" and device != "cpu":
            pipeline.enable_model_cpu_offload()
        elif offload == "sequential" and device != "cpu":
            pipeline.enable_sequential_cpu_offload()
        else:
            pipeline.to(device)
        return (pipeline,)


class SelfESampler:
    """Images of one prompt, in any number of steps."""

    CATEGORY = CATEGORY
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "sample"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        unit = {"min": 0.0, "max": 1.0, "step": 0.05}
        size = {"default": 512, "min": 16, "max": 4096, "step": 16}
        return {
            "required": {
                "pipeline": ("SELFE_PIPELINE",),
                "prompt": ("STRING", {"multiline": True, "default": ""}),
                "steps": ("INT", {"default": 4, "min": 1, "max": 1000}),
                "guidance": ("FLOAT", {"default": 5.0, "min": 0.0, "max": 100.0, "step": 0.1}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1}),
                "width": ("INT", size),
                "height": ("INT", size),
                "images": ("INT", {"default": 1, "min": 1, "max": 64}),
            },
            "optional": {
                "negative_prompt": ("STRING", {"multiline": True, "default": ""}),
                "s_ratio": ("FLOAT", unit | {"default": -1.0, "min": -1.0}),
                "eta": ("FLOAT", {"default": 1.0} | unit),
            },
        }

    def sample(
        self,
        pipeline: DiffusionPipeline,
        prompt: str,
        steps: int,
        guidance: float,
        seed: int,
        width: int,
        height: int,
        images: int,
        negative_prompt: str = "",
        s_ratio: float = -1.0,
        eta: float = 1.0,
    ) -> tuple[torch.Tensor]:
        """Images (images, height, width, 3) in [0, 1], float32 on the host, as ComfyUI passes them on.

        The arguments are those of the pipeline; a negative s_ratio is its default, 1 for a model of flow matching.
        Raises its ValueErrors.
        """
        step_done = progress(images * steps)
        result = pipeline(
            prompt,
            num_inference_steps=steps,
            guidance_scale=guidance,
            seed=seed,
            width=width,
            height=height,
            num_images_per_prompt=images,
            negative_prompt=negative_prompt,
            s_ratio=None if s_ratio < 0 else s_ratio,
            eta=eta,
            output_type="pt",
            callback_on_step_end=step_done,
        )
        return (result.images.permute(0, 2, 3, 1).float().cpu().contiguous(),)


def progress(num_steps: int):
    """A callback of the pipeline that moves ComfyUI's progress bar and stops where its user cancels; None elsewhere."""
    try:
        from comfy.model_management import throw_exception_if_processing_interrupted
        from comfy.utils import ProgressBar
    except ImportError:
        return None
    bar = ProgressBar(num_steps)

    def step_done(pipeline, step, time, tensors) -> dict:
        throw_exception_if_processing_interrupted()
        bar.update(1)
        return {}

    return step_done


NODE_CLASS_MAPPINGS = {"SelfELoader": SelfELoader, "SelfESampler": SelfESampler}
NODE_DISPLAY_NAME_MAPPINGS = {"SelfELoader": "Self-E: load pipeline", "SelfESampler": "Self-E: sample images"}
