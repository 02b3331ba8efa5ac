"""The verb `selfe demo`: a local gradio page that generates images from a checkpoint.

Listens on the loopback interface only. For the same prompt, seed and settings, the image equals that of `selfe infer`.
"""

from __future__ import annotations

import argparse
import os
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from selfe import config, log, recorded_run
from selfe.checkpoint import verify
from selfe.checkpoint.weights import is_export
from selfe.errors import UserError
from selfe.generator import Generator
from selfe.inference import presets, prompts
from selfe.inference.prompts import SamplingDefaults
from selfe.io.sampling_limits import normal_prompt
from selfe.samplers.euler import Euler

STRIP = (1, 2, 4, 8)
SMALL = 128  # images up to this side are enlarged with visible pixels
STYLE = """
#image img { width: 100%; height: 100%; object-fit: contain; }
#strip .grid-wrap { padding-top: 36px; overflow: visible; max-height: none; }
#shuffle { align-self: flex-end; }
footer { display: none !important; }
@media (max-width: 640px) {
  #image { height: 88vw !important; }
  #strip .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; }
  .gradio-container { padding: 8px !important; }
}
"""
PIXELATED = "#image img, #strip img { image-rendering: pixelated; }"


class DemoModel:
    """Images of a generator with the time that they took, for the page."""

    def __init__(self, generator: Generator, preset: Path | None = None):
        """
        Args:
            preset: file of `selfe tune-sampler`; None: that of the run's config, if it has one.
        """
        self.generator = generator
        self.defaults = sampling_defaults(generator.settings, *generator.size)
        if preset is not None:
            self.defaults = replace(self.defaults, preset=preset)
        objective, recorded = generator.system.objective, recorded_run.sampling_defaults(generator.settings)
        if getattr(objective, "flow_map", False) and "sampler" not in recorded:
            self.defaults = replace(self.defaults, sampler=Euler())  # the default adds fresh noise
        if getattr(objective, "s_equals_t", False) and "s_ratio" not in recorded:
            self.defaults = replace(self.defaults, s_ratio=1.0)
        generator.system.check_sampling(self.defaults.sampler, self.defaults.s_ratio)

        # the first calls compile kernels and allocate memory, which would be part of the first times shown
        for cfg_scale in (1.0, 2.0):
            self.draw("warm-up", replace(self.defaults, cfg_scale=cfg_scale), 2)

    @property
    def title(self) -> str:
        generator = self.generator
        kind = "EMA" if generator.weights == "ema" else generator.weights
        return f"{generator.path}, {kind} weights of step {generator.step:,}"

    def checkpoints(self) -> list[str]:
        """The names of the complete checkpoints of the run, newest first."""
        path = self.generator.path
        if is_export(path):
            return [path.name]
        return [other.name for other in verify.list_checkpoints(path.parent) if verify.is_complete(other)]

    def choose(self, name: str) -> None:
        """Load the weights of another checkpoint of the run, if they are not loaded already.

        Raises:
            UserError: there is no such checkpoint, for example because training has deleted it meanwhile.
        """
        folder = self.generator.path.parent
        if name == self.generator.path.name:
            return
        if name not in self.checkpoints():
            raise UserError(f"{folder}: no complete checkpoint {name!r}; choose another one")
        self.generator.load(folder / name)

    def samplers(self) -> list[str]:
        """The names of the samplers to choose from: those of the run's config and those of selfe."""
        return list(
            dict.fromkeys([prompts.sampler_name(self.defaults.sampler), *self.defaults.samplers, *prompts.SHIPPED])
        )

    def draw(self, prompt: str, settings: SamplingDefaults, num_steps: int) -> tuple[Image.Image, float]:
        """The generated image, and the seconds it took without encoding the prompt."""
        # encoded texts are kept, so that this is not part of the time
        self.generator.system.encode({"cond": [prompt], "null": [settings.negative_prompt]})

        start = time.perf_counter()
        (image,) = self.generator.generate(
            [prompt],
            num_steps=num_steps,
            cfg_scale=settings.cfg_scale,
            s_ratio=settings.s_ratio,
            guidance_interval=settings.guidance_interval,
            preset=settings.preset,
            seed=settings.seed,
            sampler=settings.sampler,
            negative_prompt=settings.negative_prompt,
        )
        return image, time.perf_counter() - start

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
        checkpoint: str | None = None,
        preset: bool = True,
    ) -> Iterator[tuple[Image.Image, str, list[tuple[Image.Image, str]]]]:
        """Yields image, time and strip as they become available; the strip has the same noise in 1, 2, 4 and 8 steps.

        Args:
            eta: of samplers that have this parameter.
            checkpoint: its name; None: the current one.
            preset: take guidance, sampler and s ratio from the preset, if there is one.

        Raises:
            UserError: a value is out of range.
        """
        self.choose(checkpoint or self.generator.path.name)
        try:
            prompt = normal_prompt(prompt)
            chosen = prompts.sampler_of(sampler, None, self.defaults)
            if "eta" in chosen.output_settings():
                chosen = prompts.sampler_of(sampler, float(eta), self.defaults)
            settings = replace(
                self.defaults,
                negative_prompt=negative_prompt,
                num_steps=int(num_steps),
                cfg_scale=float(cfg_scale),
                seed=int(seed),
                s_ratio=float(s_ratio),
                sampler=chosen,
                preset=self.defaults.preset if preset else None,
            )
        except (TypeError, ValueError, config.Problem) as error:
            raise UserError(str(error)) from error

        # the image first, then the strip, one image at a time
        image, seconds = self.draw(prompt, settings, settings.num_steps)
        summary = f"{log.count(settings.num_steps, 'step', 'steps')} in {seconds:.2f} s"
        strip: list[tuple[Image.Image, str]] = []
        yield image, summary, strip
        for count in STRIP:
            result = (image, seconds) if count == settings.num_steps else self.draw(prompt, settings, count)
            strip = [*strip, (result[0], f"{log.count(count, 'step', 'steps')}, {result[1]:.2f} s")]
            yield image, summary, strip


def sampling_defaults(settings: dict, height: int, width: int) -> SamplingDefaults:
    """The defaults of a run for one image of this size; of lists, the first value."""
    values = recorded_run.sampling_defaults(settings)
    defaults = config.call(SamplingDefaults, values, "inferencer.defaults", build=True)
    single = {name: prompts.sweep(getattr(defaults, name))[0] for name in ("num_steps", "cfg_scale", "s_ratio")}
    return replace(defaults, prompt_file=None, num_samples=1, first_sample=0, height=height, width=width, **single)


def page(model: DemoModel) -> Any:
    """The gradio page: controls on the left, the image on the right, the strip below."""
    import gradio as gr

    def show(*values: Any) -> Iterator[tuple]:
        """Title, image, time, strip and error; after an error, what is shown already is kept."""
        unchanged = gr.skip()
        try:
            for image, summary, strip in model.show(**dict(zip(inputs, values, strict=True))):
                yield model.title, image, summary, strip, gr.update(value="", visible=False)
        except UserError as error:
            yield model.title, unchanged, unchanged, unchanged, gr.update(value=str(error), visible=True)
        except torch.OutOfMemoryError:
            message = "out of memory; start selfe demo with a smaller --size"
            yield model.title, unchanged, unchanged, unchanged, gr.update(value=message, visible=True)

    buttons = ["download", "fullscreen"]
    with gr.Blocks(title="Self-E", analytics_enabled=False) as blocks:
        gr.Markdown("# Self-E: any number of steps")
        title = gr.Textbox(model.title, show_label=False, interactive=False, container=False)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                inputs, generate, shuffle = controls(model)
            with gr.Column(scale=3, min_width=300):
                problem = gr.Textbox(label="Error", visible=False, interactive=False, elem_id="problem")
                image = gr.Image(label="Image", format="png", height=520, buttons=buttons, elem_id="image")
                seconds = gr.Textbox(label="Time, without encoding the prompt", interactive=False, elem_id="time")
        strip = gr.Gallery(
            label="The same noise in 1, 2, 4 and 8 steps",
            columns=4,
            height="auto",
            format="png",
            object_fit="contain",
            buttons=buttons,
            elem_id="strip",
        )

        # what generates images: the button, Enter in the prompt, another seed
        values, outputs = list(inputs.values()), [title, image, seconds, strip, problem]
        gr.on([generate.click, inputs["prompt"].submit], show, values, outputs, api_name=False)
        shuffled = shuffle.click(lambda: secrets.randbelow(2**31), None, inputs["seed"], api_name=False)
        shuffled.then(show, values, outputs, api_name=False)

        # a run that still trains has saved further checkpoints when the page is loaded again
        blocks.load(lambda: gr.update(choices=model.checkpoints()), None, inputs["checkpoint"], api_name=False)
    return blocks


def controls(model: DemoModel) -> tuple[dict[str, Any], Any, Any]:
    """The controls in the current column: inputs, by argument of `DemoModel.show`, and buttons (generate, shuffle)."""
    import gradio as gr

    defaults, samplers = model.defaults, model.samplers()
    examples = recorded_run.example_prompts(model.generator.settings)
    guidance, eta = defaults.cfg_scale, defaults.sampler.output_settings().get("eta", 1)
    inputs = {}

    first = examples[0] if examples else "a red bird on a branch"
    inputs["prompt"] = gr.Textbox(first, label="Prompt", lines=2, elem_id="prompt")
    if examples:
        gr.Examples(examples, inputs["prompt"], elem_id="examples", api_name=False)
    inputs["num_steps"] = gr.Slider(1, 50, value=4, step=1, label="Steps", elem_id="num_steps")
    inputs["cfg_scale"] = gr.Slider(0, max(10, guidance), value=guidance, step=0.1, label="Guidance (1: none)")
    with gr.Row():
        inputs["seed"] = gr.Number(defaults.seed, label="Seed", precision=0, minimum=0, min_width=120, elem_id="seed")
        shuffle = gr.Button("Random seed", min_width=120, elem_id="shuffle")
    generate = gr.Button("Generate", variant="primary", elem_id="draw")

    if defaults.preset is not None:
        label = f"Guidance, sampler and s ratio of {defaults.preset.name} for each number of steps"
        inputs["preset"] = gr.Checkbox(True, label=label, elem_id="preset")

    with gr.Accordion("More", open=False):
        current = model.generator.path.name
        inputs["checkpoint"] = gr.Dropdown(model.checkpoints(), value=current, label="Checkpoint", elem_id="checkpoint")
        inputs["negative_prompt"] = gr.Textbox(defaults.negative_prompt, label="Negative prompt")
        inputs["sampler"] = gr.Radio(samplers, value=samplers[0], label="Sampler", elem_id="sampler")
        inputs["eta"] = gr.Slider(0, 1, value=eta, step=0.05, label="eta: share of fresh noise (renoise)")
        s_ratio_label = "s ratio: 0 few steps, 0.5 one step, 1 flow matching"
        inputs["s_ratio"] = gr.Slider(0, 1, value=defaults.s_ratio, step=0.05, label=s_ratio_label)
    return inputs, generate, shuffle


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
    small = max(model.defaults.height, model.defaults.width) <= SMALL
    blocks.launch(
        server_name=name,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        show_error=True,
        css=STYLE + (PIXELATED if small else ""),
    )
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

    if options.preset is not None:
        presets.read(options.preset)

    size = tuple(options.size) if options.size else None
    generator = Generator(options.ckpt, options.config, options.weights, options.precision, options.trust, size)
    serve(DemoModel(generator, options.preset), options.port, options.listen_on_all_interfaces, block=True)
