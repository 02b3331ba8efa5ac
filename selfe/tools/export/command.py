"""The verb `selfe export`: write a checkpoint's denoiser as safetensors files, or as a complete diffusers pipeline.

The safetensors format uses black-forest-labs' FLUX parameter names. Runs in one CPU process; weights are streamed
tensor by tensor, with at most one shard of the output in memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from selfe import compare, config, log, recorded_run
from selfe.backbones.mmdit import MMDiT
from selfe.checkpoint import flux, peft, state, verify
from selfe.checkpoint.adapter import AdapterWeights, read_record
from selfe.checkpoint.weights import remove_heads
from selfe.encoders.flux_vae import CHANNELS, SCALE, SHIFT, STAGES, FluxVAE
from selfe.encoders.t5_clip import T5_FOLDER, T5Clip
from selfe.errors import UserError
from selfe.inference import presets
from selfe.inference.prompts import SamplingDefaults
from selfe.io import sampling_limits
from selfe.io.safetensors_files import INDEX, SafetensorsFiles, cached, write
from selfe.protocols import Objective
from selfe.samplers.euler import Euler
from selfe.samplers.renoise import Renoise
from selfe.system import System
from selfe.training.ema import PowerFunction
from selfe.training.ema_reconstruction import Reconstruction, plan
from selfe.training.settings import without_evaluation
from selfe.types import DTYPES

CODE = Path(__file__).parent / "diffusers_folder"
PRESET = "preset.yaml"  # in an exported folder
LARGE_ERROR = 0.1  # of a reconstructed average: distance of the profiles, relative to the norm of the wanted one


def main(options: argparse.Namespace) -> None:
    """Entry point of `selfe export`."""
    print(run(options))


def run(options: argparse.Namespace) -> str:
    """Write the export; returns a line that describes it."""
    out = options.out.absolute()
    path = verify.find(options.ckpt)
    settings, system = read_run(path, options.format, options.trust, options.adapter_only)
    adapter = read_record(path)
    if options.adapter_only and adapter is None:
        raise UserError(f"--adapter-only: {path} holds complete weights, no adapter; leave it out")
    if options.preset is not None:
        if options.adapter_only:
            raise UserError("--preset: an adapter has no sampling settings; leave it out")
        presets.read(options.preset)  # checked before anything is written
        if options.format == "diffusers":
            pipeline_preset(options.preset)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{options.out}: exists and is not an empty folder; choose another or remove it")

    # weights of the checkpoint, or an average that follows from several
    average = None
    if options.ema_std is None:
        state.check_has(path, options.weights)
    else:
        average = reconstruct(path, settings, options.ema_std, options.weights)
    weights = options.weights if average is None else f"ema_std_{options.ema_std:g}"

    def read(name: str, shape: torch.Size) -> torch.Tensor:
        return average.read(name, shape) if average else state.read_parameter(path, name, shape, weights)

    # weights that were trained are read from the checkpoint, all others from those that it fine-tunes
    merged = None
    if adapter is not None:
        merged = AdapterWeights(path, adapter, {name: p.shape for name, p in system.backbone.named_parameters()}, read)
        merged.check_base()

    if options.adapter_only:
        with complete_folder(out) as unfinished:
            write_adapter(unfinished, merged, options.format, DTYPES[options.dtype], system.backbone.width)
        return f"the adapter of {path} ({weights} weights, {options.dtype}) exported to {options.out}"

    with complete_folder(out) as unfinished:
        folder = unfinished / ("transformer" if options.format == "diffusers" else "")
        folder.mkdir(exist_ok=True)
        if options.format == "diffusers":
            system.autoencoder.dtype = torch.float32
            write_pipeline(unfinished, system, options.preset, recorded_run.image_size(settings))
        else:
            origin = {"step": verify.read_step(path), "weights": weights, "dtype": options.dtype}
            write_json(folder / "config.json", origin | {"backbone": config.plain(settings["system"]["backbone"])})
            sampling = sampling_settings(settings, options.out, system.objective)
            if options.preset is not None:
                shutil.copy(options.preset, folder / PRESET)
                sampling["inferencer"]["defaults"]["preset"] = options.out / PRESET
            config.save(sampling, folder / "config.yaml")

        write_denoiser(merged.read if merged else read, system.backbone, folder, DTYPES[options.dtype], options.format)
    return f"{path} ({weights} weights, {options.dtype}) exported to {options.out}"


def write_adapter(folder: Path, merged: AdapterWeights, layout: str, dtype: torch.dtype, width: int) -> None:
    """Write the low-rank matrices alone, as PEFT or as diffusers reads them."""
    if layout == "diffusers":
        peft.write_diffusers(folder, merged.matrices(), merged.record, dtype, width)
    else:
        peft.write_peft(folder, merged.matrices(), merged.record, dtype)


def reconstruct(path: Path, settings: dict, std: float, weights: str) -> Reconstruction:
    """The average of width `std` at a checkpoint; prints how well it can be computed."""
    if weights != "ema":
        raise UserError(f"--weights: {weights} and --ema-std are both given; give one of them")
    try:
        name = PowerFunction(std).name
    except ValueError as error:
        raise UserError(f"--ema-std: {error}") from error

    average = plan(path, without_evaluation(settings).ema_tracks, std)
    print(
        f"{name}: from {log.count(len(average.snapshots), 'saved average', 'saved averages')}, with an error of "
        f"{average.error:.1%} of its profile over the steps"
    )
    if average.error > LARGE_ERROR:
        print("the error is large: keep more checkpoints (trainer.checkpoints.keep_every), or choose a nearer width")
    return average


@contextmanager
def complete_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which gets the name `out` when everything is written, and is removed after an error."""
    unfinished = out.with_name(f"{out.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)  # of an export that was killed
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.replace(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def read_run(path: Path, layout: str, trust: bool, adapter_only: bool = False) -> tuple[dict, System]:
    """Settings of the run that a checkpoint belongs to, and its system on the meta device.

    Args:
        trust: the run's config.yaml may name modules that are not part of this package, which runs their code.
        adapter_only: no encoders and no tensors outside of the adapter are written.
    """
    settings_path = compare.config_beside(path)
    if settings_path is None:
        raise UserError(f"{path}: no config.yaml beside it; expected RUN/config.yaml for RUN/checkpoints/step_...")

    settings = recorded_run.load_settings(settings_path, trust)
    with torch.device("meta"):
        system = config.build(settings, "system")

    if layout == "diffusers" and getattr(system.objective, "flow_map", False):
        raise UserError(
            f"{settings_path}: system.objective: the pipeline of --format diffusers samples with fresh noise, which a "
            "flow map does not take; export it as safetensors"
        )

    remove_heads(system.backbone)
    kinds = {"backbone": MMDiT}
    if layout == "diffusers" and not adapter_only:
        kinds |= {"text_encoder": T5Clip, "autoencoder": FluxVAE}
    for name, kind in kinds.items():
        part = getattr(system, name)
        if type(part) is not kind:  # a subclass may compute something else from the same tensors
            raise UserError(
                f"{settings_path}: --format {layout} supports {kind.__name__} only, the run has "
                f"{compare.class_path(part)}"
            )
    if layout == "diffusers":
        check_is_flux(system.backbone, settings_path)
    return settings, system


def check_is_flux(net: MMDiT, settings_path: Path) -> None:
    """Raise UserError if the denoiser has something that diffusers' FLUX lacks."""
    for name in ("learned_grid", "bottleneck"):
        if getattr(net, name) is not None:
            raise UserError(f"{settings_path}: system.backbone.params.{name}: diffusers' FLUX has no tensors for it")
    if net.prediction != "velocity":
        raise UserError(f"{settings_path}: system.backbone.params.prediction: diffusers' FLUX predicts a velocity")
    if net.time_scale != 1000:
        raise UserError(f"{settings_path}: system.backbone.params.time_scale: diffusers' FLUX has 1000")


def sampling_settings(settings: dict, out: Path, objective: Objective) -> dict:
    """A config that samples from an exported folder: the run's system, and the settings of its sample grids."""
    standard = SamplingDefaults()
    height, width = recorded_run.image_size(settings) or (standard.height, standard.width)
    defaults = recorded_run.sampling_defaults(settings) | {"height": height, "width": width}
    for name in ("prompt_file", "preset"):  # files of this machine
        defaults.pop(name, None)
    if getattr(objective, "flow_map", False):
        defaults = {"sampler": {"module": "selfe.samplers.euler.Euler"}, "cfg_scale": 1.0} | defaults
    if getattr(objective, "s_equals_t", False):
        defaults = {"s_ratio": 1.0} | defaults

    inferencer = {"ckpt_dir": out, "output_dir": Path("outputs") / out.name, "defaults": defaults}
    if prompts := recorded_run.example_prompts(settings):
        inferencer["prompts"] = prompts
    return {"system": settings["system"], "inferencer": inferencer}


def write_denoiser(
    read_full: Callable[[str, torch.Size], torch.Tensor], net: MMDiT, folder: Path, dtype: torch.dtype, layout: str
) -> None:
    """Write the denoiser, of which `read_full` reads a parameter, under the names of `layout`, tensor by tensor."""
    style, stem = ("diffusers", "diffusion_pytorch_model") if layout == "diffusers" else ("bfl", "model")
    shapes, width = {name: p.shape for name, p in net.named_parameters()}, net.width

    def read(name: str) -> dict[str, torch.Tensor]:
        tensors = flux.split(style, name, read_full(name, shapes[name]), width)
        return {theirs: tensor.to(dtype, copy=True) for theirs, tensor in tensors.items()}

    write(folder, stem, {name: shape.numel() * dtype.itemsize for name, shape in shapes.items()}, read)


def pipeline_preset(path: Path) -> dict[str, dict]:
    """A preset as arguments of the exported pipeline, by number of steps. Raises UserError."""
    arguments = {}
    for count, preset in presets.read(path).items():
        if not isinstance(preset.sampler, (Renoise, Euler)):
            raise UserError(
                f"{path}: presets.{count}: the exported pipeline has the samplers Renoise and Euler only, got "
                f"{type(preset.sampler).__name__}"
            )
        interval = preset.guidance_interval
        arguments[str(count)] = {
            "guidance_scale": preset.cfg_scale,
            "s_ratio": preset.s_ratio,
            "eta": getattr(preset.sampler, "eta", 0.0),
            "guidance_interval": None if interval is None else list(interval),
        }
    return arguments


def write_pipeline(out: Path, system: System, preset: Path | None, size: tuple[int, int] | None) -> None:
    """Write a diffusers folder, except for the denoiser's weights. `size`: of images, in pixels, by default."""
    shutil.copy(CODE / "pipeline.py", out)
    shutil.copy(CODE / "comfyui_nodes.py", out)
    shutil.copy(sampling_limits.__file__, out / "selfe_limits.py")
    shutil.copy(CODE / "dual_time_flux.py", out / "transformer")
    write_json(out / "transformer" / "config.json", transformer_config(system.backbone))

    write_autoencoder(out / "vae", system.autoencoder)
    tokenizers = write_text_encoders(out, system.text_encoder)

    # the index names the class of each component; the first two are in the files copied above
    components = {
        "_class_name": ["pipeline", "SelfEPipeline"],
        "transformer": ["dual_time_flux", "DualTimeFlux"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
    }
    components |= {name: ["transformers", kind] for name, kind in tokenizers.items()}
    settings = {"max_tokens": system.text_encoder.max_tokens}
    if getattr(system.objective, "s_equals_t", False):
        settings["default_s_ratio"] = 1.0
    if preset is not None:
        settings["preset"] = pipeline_preset(preset)
    if size is not None:
        settings["default_size"] = list(size)
    write_json(out / "model_index.json", components | settings)


def transformer_config(net: MMDiT) -> dict:
    """Constructor arguments of `DualTimeFlux` (`diffusers_folder/dual_time_flux.py`)."""
    width, hidden = net.width, net.double_blocks[0].image.mlp[0].out_features
    if net.rope_theta != 10000 or hidden != 4 * width:
        raise UserError(
            f"diffusers' FLUX has rope_theta 10000 and mlp_ratio 4, not {net.rope_theta} and {hidden / width}"
        )

    head_dim = sum(net.rope_axes)
    return {
        "_class_name": "DualTimeFlux",
        "in_channels": net.patch_dim,
        "num_layers": len(net.double_blocks),
        "num_single_layers": len(net.single_blocks),
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "joint_attention_dim": net.text_dim,
        "pooled_projection_dim": net.pooled_dim,
        "axes_dims_rope": net.rope_axes,
        "second_time": net.s_in is not None,
    }


def write_autoencoder(folder: Path, autoencoder: FluxVAE) -> None:
    """Write the VAE under diffusers' parameter names, with its config."""
    autoencoder.load(torch.device("cpu"))
    width = autoencoder.net["encoder"].conv_in.out_channels

    # every key of FLUX.1's own file, because readers derive other values from them (sample_size: the size of tiles)
    settings = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [width * stage for stage in STAGES],
        "down_block_types": ["DownEncoderBlock2D"] * len(STAGES),
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": CHANNELS,
        "latents_mean": None,
        "latents_std": None,
        "layers_per_block": 2,
        "mid_block_add_attention": True,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 1024,
        "scaling_factor": SCALE,
        "shift_factor": SHIFT,
        "up_block_types": ["UpDecoderBlock2D"] * len(STAGES),
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }
    folder.mkdir()
    write_json(folder / "config.json", settings)

    state = flux.vae_to_diffusers(autoencoder.net.state_dict())
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def write_text_encoders(out: Path, encoder: T5Clip) -> dict[str, str]:
    """Write CLIP, T5 and their tokenizers; returns the tokenizers' class names. T5 is hard-linked if possible."""
    if encoder.skip_pretrained:
        encoder.load(torch.device("cpu"))
        encoder.t5.save_pretrained(out / "text_encoder_2")
        clip, tokenizers = encoder.clip, {"tokenizer": encoder.clip_tokenizer, "tokenizer_2": encoder.t5_tokenizer}
    else:
        t5_tokenizer, _, _, clip_tokenizer, clip = encoder.pretrained()
        tokenizers = {"tokenizer": clip_tokenizer, "tokenizer_2": t5_tokenizer}
        write_t5(cached(encoder.cache_dir, T5_FOLDER), out / "text_encoder_2")

    clip.save_pretrained(out / "text_encoder")
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(out / name)
    return {name: type(tokenizer).__name__ for name, tokenizer in tokenizers.items()}


def write_t5(source: Path, folder: Path) -> None:
    """T5 from the cache, under the file names that transformers looks for."""
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    weights = SafetensorsFiles.open(source)

    # transformers would keep fp8 for computing
    if any(dtype.startswith("F8") for dtype in weights.dtypes.values()):
        sizes = {name: 2 * math.prod(shape) for name, shape in weights.shapes.items()}
        write(folder, "model", sizes, lambda name: {name: weights.read(name).to(torch.bfloat16)})
        return

    files = sorted(set(weights.files.values()))
    if len(files) == 1:
        link(files[0], folder / "model.safetensors")
        return
    for file in files:
        link(file, folder / file.name)
    places = {name: file.name for name, file in weights.files.items()}
    write_json(folder / f"model{INDEX}", {"metadata": {}, "weight_map": places})


def link(source: Path, target: Path) -> None:
    """Hard-link a file; copy it where the file system does not support links."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy(source, target)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
