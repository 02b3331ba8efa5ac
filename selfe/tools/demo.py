"""The verb `selfe demo`: a local gradio page that generates images from a checkpoint.

Listens on the loopback interface only. For the same prompt, seed and settings, the image equals that of `selfe infer`.
"""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from selfe import compare, config, device, recorded_run
from selfe.checkpoint import verify
from selfe.checkpoint.state import load_weights
from selfe.errors import UserError
from selfe.inference import prompts
from selfe.inference.prompt_cache import PromptCache
from selfe.inference.prompts import SamplingDefaults
from selfe.io import image_encode
from selfe.rng import SampleRNG
from selfe.types import DTYPES

STRIP = (1, 2, 4, 8)
SAMPLERS = ("renoise", "euler")


class DemoModel:
    """A checkpoint loaded for sampling."""

    def __init__(
        self,
        ckpt: Path,
        config_path: Path | None,
        weights: str,
        precision: str,
        size: tuple[int, int] | None,
        trust: bool = False,
    ):
        """
        Args:
            ckpt: checkpoint directory, or a parent directory (newest is used).
            config_path: the run's `config.yaml`; None: the one beside the checkpoints.
            size: height and width of the images; None: those of the run's sample grids.
            trust: let the config.yaml beside the checkpoints name modules that are not part of this package, which
                runs their code.
        """
        path = verify.find(ckpt)
        settings_path = config_path or compare.config_beside(path)
        if settings_path is None:
            raise UserError(f"{path}: no config.yaml found beside the checkpoints; pass it with --config")
        settings = recorded_run.load_settings(settings_path, trust=trust or config_path is not None)
        with torch.device("meta"):
            self.system = config.build(settings, "system")

        # reject an invalid size before any weight is loaded
        height, width = size or settings.get("trainer", {}).get("samples", {}).get("size") or (256, 256)
        self.defaults = SamplingDefaults(height=height, width=width)
        self.check("an image", self.defaults)

        accelerator = device.choose_device(0)
        self.net = self.system.backbone.to_empty(device=accelerator).requires_grad_(False)
        self.title = f"{path}, {'EMA' if weights == 'ema' else 'live'} weights of step "
        self.title += f"{load_weights(path, self.net, weights):,}"
        self.net.to(DTYPES[device.choose_precision(precision, accelerator)])

        self.system.text_encoder = PromptCache(self.system.text_encoder)
        self.system.load_encoders(accelerator)

    def check(self, prompt: str, settings: SamplingDefaults) -> str:
        """The normalized prompt; raises a UserError if prompt or settings are invalid."""
        (request,) = prompts.from_list([prompt], settings, self.system.autoencoder.multiple)
        return request.prompt

    def draw(self, prompt: str, settings: SamplingDefaults, num_steps: int) -> tuple[Image.Image, float]:
        """The generated image, and the seconds it took."""
        prompt, start = self.check(prompt, settings), time.perf_counter()
        (image,) = self.system.generate(
            self.net,
            [prompt],
            [(settings.height, settings.width)],
            SampleRNG.of_images([(settings.seed, prompt, 0)]),
            sampler=settings.sampler,
            num_steps=num_steps,
            cfg_scale=settings.cfg_scale,
            s_ratio=settings.s_ratio,
            negative_prompts=[settings.negative_prompt],
        )
        return image_encode.to_image(image), time.perf_counter() - start

    def show(
        self,
        prompt: str,
        negative_prompt: str,
        num_steps: float,
        cfg_scale: float,
        seed: float,
        sampler: str,
        eta: float,
        s_ratio: float,
    ) -> Iterator[tuple[Image.Image, str, list[tuple[Image.Image, str]]]]:
        """Yields image, time and strip as they become available; the strip has the same noise in 1, 2, 4 and 8 steps.

        Raises:
            UserError: a value is out of range.
        """
        try:
            settings = replace(
                self.defaults,
                negative_prompt=negative_prompt,
                num_steps=int(num_steps),
                cfg_scale=float(cfg_scale),
                seed=int(seed),
                s_ratio=float(s_ratio),
                sampler=prompts.sampler_of(sampler, float(eta) if sampler == "renoise" else None, SamplingDefaults()),
            )
        except (TypeError, ValueError, config.Problem) as error:
            raise UserError(str(error)) from error

        # the image first, then the strip, one image at a time
        image, seconds = self.draw(prompt, settings, settings.num_steps)
        summary = f"{steps(settings.num_steps)} in {seconds:.2f} s"
        strip: list[tuple[Image.Image, str]] = []
        yield image, summary, strip
        for count in STRIP:
            result = (image, seconds) if count == settings.num_steps else self.draw(prompt, settings, count)
            strip = [*strip, (result[0], f"{steps(count)}, {result[1]:.2f} s")]
            yield image, summary, strip


def steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def page(model: DemoModel) -> Any:
    """The gradio page."""
    import gradio as gr

    def show(*values: Any) -> Iterator[tuple]:
        try:
            yield from model.show(*values)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    # controls on the left, the image on the right, the strip below
    with gr.Blocks(title="Self-E", analytics_enabled=False) as blocks:
        gr.Markdown("# Self-E: any number of steps")
        gr.Textbox(model.title, show_label=False, interactive=False, container=False)
        with gr.Row():
            with gr.Column(scale=2):
                prompt = gr.Textbox("a red bird on a branch", label="Prompt", lines=2, elem_id="prompt")
                num_steps = gr.Slider(1, 50, value=4, step=1, label="Steps", elem_id="num_steps")
                cfg_scale = gr.Slider(1, 10, value=5, step=0.1, label="Guidance")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                with gr.Accordion("More", open=False):
                    negative_prompt = gr.Textbox("", label="Negative prompt")
                    sampler = gr.Radio(list(SAMPLERS), value="renoise", label="Sampler")
                    eta = gr.Slider(0, 1, value=1, step=0.05, label="eta: share of fresh noise (renoise)")
                    s_ratio = gr.Slider(
                        0, 1, value=0, step=0.05, label="s ratio: 0 few steps, 0.5 one step, 1 flow matching"
                    )
                button = gr.Button("Generate", variant="primary", elem_id="draw")
            with gr.Column(scale=3):
                image = gr.Image(
                    label="Image", format="png", height=440, buttons=["download", "fullscreen"], elem_id="image"
                )
                seconds = gr.Textbox(label="Time", interactive=False, elem_id="time")
        strip = gr.Gallery(
            label="The same noise in 1, 2, 4 and 8 steps",
            columns=4,
            height="auto",
            format="png",
            buttons=["download", "fullscreen"],
            elem_id="strip",
        )

        inputs = [prompt, negative_prompt, num_steps, cfg_scale, seed, sampler, eta, s_ratio]
        gr.on([button.click, prompt.submit], show, inputs, [image, seconds, strip], api_name=False)
    return blocks


def check_address(port: int | None, everywhere: bool) -> str:
    """The address to listen on: the loopback interface, or all interfaces if `everywhere`.

    Raises:
        UserError: GRADIO_SERVER_NAME asks for another address, or the port is in use.
    """
    if os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1") not in ("127.0.0.1", "localhost") and not everywhere:
        raise UserError("GRADIO_SERVER_NAME: the page listens on this machine only; see --listen-on-all-interfaces")

    name = "0.0.0.0" if everywhere else "127.0.0.1"
    if port is not None:
        try:
            with socket.create_server((name, port)):
                pass
        except (OSError, OverflowError) as error:
            raise UserError(f"--port {port}: cannot be listened on ({error}); choose another port") from error
    return name


def serve(model: DemoModel, port: int | None, everywhere: bool, block: bool) -> Any:
    """Listen on the loopback interface, or on all interfaces if `everywhere`; returns the running page."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    name = check_address(port, everywhere)
    blocks = page(model)
    blocks.launch(server_name=name, server_port=port, share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False)
    print(f"open {blocks.local_url}", flush=True)
    if block:
        blocks.block_thread()
    return blocks


def main(options: argparse.Namespace) -> None:
    """Entry point of `selfe demo`."""
    # what needs no weights is checked before they are loaded
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        remedy = "run ./scripts/setup.sh --extra demo, or pip install 'selfe[demo]'"
        raise UserError(f"{error.name} is not installed; {remedy}") from error
    check_address(options.port, options.listen_on_all_interfaces)

    model = DemoModel(options.ckpt, options.config, options.weights, options.precision, options.size, options.trust)
    serve(model, options.port, options.listen_on_all_interfaces, block=True)
