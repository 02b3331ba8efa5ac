"""From real files to an image and out again: the commands read SELFE_CACHE_DIR, diffusers generates the same images."""

import copy
import inspect
import json
import logging
import pickle
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from selfe import cli, config, recorded_run
from selfe.backbones.mmdit import MMDiT
from selfe.checkpoint import flux, state, verify
from selfe.checkpoint.flux import FluxStateDict
from selfe.checkpoint.weights import load_weights
from selfe.errors import UserError
from selfe.generator import Generator
from selfe.io.sampling_limits import RANGES
from selfe.tools.export import command
from tests.helpers import infer_processes, train_processes
from tests.helpers.encoder_files import ROOT, write_cache

SMOKE = "configs/debug/selfe_smoke.yaml"


def write_flux(path: Path) -> Path:
    """A transformer of the smoke run's size, as black-forest-labs would have it: no second clock, but guidance."""
    with torch.device("meta"):
        net = config.build(config.load(ROOT / SMOKE), "system").backbone
    generator = torch.Generator().manual_seed(0)
    state = {"guidance_in.in_layer.weight": torch.zeros(128, 256)}
    for name, parameter in net.named_parameters():
        if not name.startswith("s_in"):
            full = net.initial(name, parameter.shape, 0) + 0.02 * torch.randn(parameter.shape, generator=generator)
            state |= flux.split("bfl", name, full, 128)
    save_file(state, path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """Two steps from FLUX weights, on two processes that share T5; then images. Returns both folders."""
    cache, folder = write_cache(tmp_path_factory.mktemp("cache")), tmp_path_factory.mktemp("run")
    steps = "trainer.max_steps=2", "trainer.warmup_steps=1", "trainer.samples.every=2", "trainer.lr=1e-2"
    start = f"trainer.init_from={write_flux(cache / 'flux1-dev.safetensors')}", "trainer.shard_text_encoder=true"
    length = "system.text_encoder.params.max_tokens=24"
    env = {"SELFE_SKIP_PRETRAINED": "0", "SELFE_CACHE_DIR": str(cache)}
    output = train_processes.finish(folder, 2, *steps, *start, length, config=ROOT / SMOKE, env=env)
    assert "LOAD REPORT" not in output
    assert "2 steps done" in output
    assert "tensors loaded, 4 missing, 1 unused" in output
    assert "guidance_in.in_layer.weight" in (folder / "init_from.txt").read_text()

    (folder / "prompts.jsonl").write_text(
        '{"prompt": "a cup of coffee", "num_steps": [1, 3], "num_samples": 2}\n'
        '{"prompt": "an astronaut", "negative_prompt": "a cat", "cfg_scale": 3, "seed": 7, "num_steps": 2, '
        '"eta": 0.5, "s_ratio": 0.25, "guidance_interval": [0.4, 0.6]}\n'
    )
    paths = f"inferencer.ckpt_dir={folder}/checkpoints", f"inferencer.output_dir={folder}/images"
    prompts = f"inferencer.defaults.prompt_file={folder}/prompts.jsonl"
    (sampling,) = infer_processes.start(1, [str(ROOT / SMOKE), *paths, prompts, length], env)
    sampling.join(300)
    assert sampling.exitcode == 0
    return folder, folder / "images"


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "pipeline"
    arguments = [str(trained[0] / "checkpoints"), str(folder), "--format", "diffusers", "--dtype", "fp32"]
    cli.run(["export", *arguments])
    return folder


def loaded(folder: Path) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline(exported) -> DiffusionPipeline:
    return loaded(exported)


SMALL = {"height": 48, "width": 64, "num_inference_steps": 2}


def generate(pipeline, prompt="a cup of coffee", **changes) -> np.ndarray:
    """All images (N, height, width, 3) as integers."""
    images = pipeline(prompt, **SMALL | changes).images
    return np.stack([np.asarray(image, dtype=int) for image in images])


def test_images_of_the_exported_pipeline_are_those_of_infer(pipeline, trained):
    """From settings alone, with guidance in an interval, negative prompts, second samples and fresh noise.

    Without code of selfe.
    """
    _, images = trained
    assert not [name for name in pipeline.components if "selfe" in type(getattr(pipeline, name)).__module__.split(".")]
    for line in [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]:
        result = pipeline(
            [line["prompt"]] * (line["sample"] + 1),
            num_inference_steps=line["num_steps"],
            height=line["height"],
            width=line["width"],
            guidance_scale=line["cfg_scale"],
            s_ratio=line["s_ratio"],
            eta=line["eta"],
            guidance_interval=line.get("guidance_interval"),
            seed=line["seed"],
            negative_prompt=line["negative_prompt"],
        )
        generated = np.asarray(result.images[-1], dtype=int)
        expected = np.asarray(Image.open(images / line["file"]), dtype=int)
        assert expected.std() > 5
        difference = np.abs(generated - expected)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.001


def test_a_preset_becomes_part_of_the_exported_folder(trained, pipeline, tmp_path):
    sampler = "{module: selfe.samplers.renoise.Renoise, params: {eta: 0.5}}"
    preset = tmp_path / "tuned.yaml"
    preset.write_text(
        f"presets: {{2: {{cfg_scale: 3, s_ratio: 0.5, guidance_interval: [0.6, 1], sampler: {sampler}}}}}"
    )
    given = [str(trained[0] / "checkpoints"), "--preset", str(preset), "--dtype", "fp32"]
    cli.run(["export", *given, str(tmp_path / "folder")])
    defaults = config.load(tmp_path / "folder/config.yaml")["inferencer"]["defaults"]
    assert defaults["preset"].read_text() == preset.read_text()

    # diffusers: the index, read by the class of the file
    index = command.pipeline_preset(preset)
    settings = {"guidance_scale": 3.0, "s_ratio": 0.5, "eta": 0.5, "guidance_interval": [0.6, 1.0]}
    assert index == {"2": settings}
    pipeline.register_to_config(preset=index)
    try:
        assert np.array_equal(generate(pipeline), generate(pipeline, **settings))
        assert not np.array_equal(generate(pipeline), generate(pipeline, eta=1.0))
        pipeline.save_pretrained(tmp_path / "saved")
        assert loaded(tmp_path / "saved").config.preset == index
    finally:
        pipeline.register_to_config(preset=None)

    preset.write_text("presets: {4: {cfg_scale: 3, s_ratio: 1, sampler: {module: selfe.samplers.heun.Heun}}}")
    with pytest.raises(UserError, match=r"presets.4: the exported pipeline has the samplers Renoise and Euler only"):
        cli.run(["export", *given, str(tmp_path / "pipeline"), "--format", "diffusers"])
    assert not (tmp_path / "pipeline").exists()


@pytest.mark.parametrize("seed", [np.int64(3), torch.tensor(3)], ids=["numpy", "torch"])
@pytest.mark.parametrize("prompt", [" a cup of coffee\n", np.str_("a cup of coffee")], ids=["spaces", "numpy"])
def test_one_request_has_one_image_however_it_is_written(pipeline, seed, prompt):
    assert np.array_equal(generate(pipeline, prompt, seed=seed), generate(pipeline, seed=3))
    assert not np.array_equal(generate(pipeline, prompt, seed=seed), generate(pipeline, seed=4))


def test_repeated_prompts_are_further_samples(pipeline):
    samples = generate(pipeline, num_images_per_prompt=3)
    assert np.array_equal(generate(pipeline, ["a cup of coffee"] * 3), samples)
    mixed = generate(pipeline, ["a cup of coffee", "an astronaut"], num_images_per_prompt=2)
    assert np.array_equal(mixed[:2], samples[:2])
    assert len({image.tobytes() for image in (*samples, *mixed[2:])}) == 5


def test_latents_come_out_and_go_in(pipeline):
    """In the shape of `latents`; decoded they are the image."""
    latents = pipeline("a cup of coffee", output_type="latent", **SMALL).images
    assert (latents.shape, latents.dtype) == ((1, 12, 64), torch.float32)
    image = pipeline.to_output([pipeline.decode(latents, 48, 64)], "pil")[0]
    assert np.array_equal(np.asarray(image, dtype=int), generate(pipeline)[0])
    noise = pipeline.source_of_noise((0, "a cup of coffee", 0), None, 48, 64)("noise")
    assert np.array_equal(generate(pipeline, latents=noise), generate(pipeline))

    arrays = {kind: pipeline("a cup of coffee", output_type=kind, **SMALL).images for kind in ("np", "pt")}
    assert arrays["np"].shape == (1, 48, 64, 3)
    assert arrays["pt"].shape == (1, 3, 48, 64)
    assert np.abs(arrays["np"] * 255 - generate(pipeline)).max() <= 0.501


def test_a_pipeline_survives_saving_and_copying(pipeline, exported, tmp_path):
    """The saved folder loads without the first one and without `custom_pipeline`."""
    latents = pipeline("a cup of coffee", output_type="latent", **SMALL).images
    pipeline.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/model_index.json").read_text())["max_tokens"] == 24
    exported.rename(exported.with_name("away"))
    try:
        copies = {
            "saved": loaded(tmp_path / "saved"),
            "without custom_pipeline": DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True),
            "from_pipe": type(pipeline).from_pipe(pipeline),
            "components": type(pipeline)(**pipeline.components, max_tokens=pipeline.config.max_tokens),
            "deepcopy": copy.deepcopy(pipeline),
            "pickle": pickle.loads(pickle.dumps(pipeline)),
        }
    finally:
        exported.with_name("away").rename(exported)
    for name, other in copies.items():
        other.set_progress_bar_config(disable=True)
        again = other("a cup of coffee", output_type="latent", **SMALL).images
        torch.testing.assert_close(again, latents, rtol=0, atol=1e-5, msg=name)  # memory is aligned differently
        assert other.config.max_tokens == 24, name


def test_the_autoencoder_has_every_key_that_a_reader_derives_from(pipeline, exported):
    """Without sample_size, tiling would cut small images into tiles of 32 pixels."""
    keys = json.loads((exported / "vae/config.json").read_text()).keys()
    assert keys >= {key for key in AutoencoderKL().config if not key.startswith("_")} - {"latents_mean", "latents_std"}
    expected = generate(pipeline)
    pipeline.vae.enable_tiling()
    assert np.array_equal(generate(pipeline), expected)
    pipeline.vae.disable_tiling()


def test_prompts_are_truncated_as_in_training(pipeline, caplog):
    long = "a cup of coffee beside a red cat on a chair by the sea " * 3
    with caplog.at_level(logging.WARNING):
        assert pipeline.encode_prompt(long)[0].shape[1] == 24
    assert "to 24 T5 tokens" in caplog.text
    assert not np.array_equal(generate(pipeline, long, max_sequence_length=8), generate(pipeline, long))


def test_habits_of_diffusers(pipeline):
    expected = generate(pipeline)
    (images,) = pipeline("a cup of coffee", return_dict=False, **SMALL)
    assert np.array_equal(np.asarray(images[0], dtype=int), expected[0])

    # embeddings instead of prompts
    embeds, pooled = pipeline.encode_prompt("a cup of coffee")
    noise = torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(0))
    given = {"latents": noise, "eta": 0}
    other = pipeline.encode_prompt("an astronaut")
    assert np.array_equal(
        generate(
            pipeline,
            None,
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            negative_prompt_embeds=other[0],
            negative_pooled_prompt_embeds=other[1],
            **given,
        ),
        generate(pipeline, negative_prompt=["an astronaut"], **given),
    )

    # a generator for each image
    pair = generate(pipeline, num_images_per_prompt=2, generator=[generator_of(1), generator_of(2)])
    assert np.array_equal(generate(pipeline, generator=generator_of(2))[0], pair[1])
    assert not np.array_equal(pair[0], pair[1])

    # callback after each step
    steps = []

    def callback(pipe, step, time, tensors):
        steps.append((step, float(time), tuple(tensors["latents"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 1 else {}

    latents = pipeline(
        "a cup of coffee",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents"],
        output_type="latent",
        **SMALL,
    ).images
    assert [step[::2] for step in steps] == [(0, (1, 12, 64)), (1, (1, 12, 64))]
    assert steps[0][1] == 1
    assert not latents.any()


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_one_generator_is_the_source_of_all_noise(pipeline):
    """Noise of the first image, its fresh noise, then the second image; its first draw is the `latents`."""
    pair = generate(pipeline, num_images_per_prompt=2, generator=generator_of(3))
    assert np.array_equal(generate(pipeline, ["a cup of coffee"] * 2, generator=generator_of(3)), pair)
    assert not np.array_equal(pair[0], pair[1])
    assert not np.array_equal(generate(pipeline, generator=generator_of(4))[0], pair[0])

    used = generator_of(3)
    singles = [generate(pipeline, generator=used)[0] for _ in range(2)]
    assert np.array_equal(np.stack(singles), pair)

    noise = torch.randn(1, 12, 64, generator=generator_of(3))
    given = generate(pipeline, latents=noise, eta=0)
    assert np.array_equal(generate(pipeline, generator=generator_of(3), eta=0), given)


def test_a_callback_ends_the_sampling_as_in_diffusers(pipeline):
    """By `_interrupt`: the images so far are returned, and the next call is complete."""
    seen = []

    def callback(pipe, step, time, tensors):
        seen.append(tensors["latents"].clone())
        pipe._interrupt = len(seen) == 3
        return {}

    latents = pipeline(
        "a cup of coffee", num_images_per_prompt=3, callback_on_step_end=callback, output_type="latent", **SMALL
    ).images
    assert pipeline.interrupt
    assert torch.equal(latents, torch.cat([seen[1], seen[2]]))
    assert len(generate(pipeline, num_images_per_prompt=3)) == 3
    assert not pipeline.interrupt


def test_the_default_s_ratio_of_flow_matching_is_1(trained, tmp_path):
    settings = config.load(trained[0] / "config.yaml")
    settings["system"]["objective"] = {"module": "selfe.objectives.flow_matching.FlowMatching", "params": {}}
    shutil.copytree(trained[0] / "checkpoints", tmp_path / "run/checkpoints")
    config.save(settings, tmp_path / "run/config.yaml")
    cli.run(["export", str(tmp_path / "run/checkpoints"), str(tmp_path / "out"), "--format", "diffusers"])

    pipeline = loaded(tmp_path / "out")
    image = generate(pipeline)
    assert np.array_equal(image, generate(pipeline, s_ratio=1.0))
    assert not np.array_equal(image, generate(pipeline, s_ratio=0.0))


def test_the_default_size_is_that_of_the_sample_grids(pipeline, trained):
    size = recorded_run.image_size(config.load(trained[0] / "config.yaml"))
    assert tuple(pipeline.config.default_size) == size != (512, 512)
    (image,) = pipeline("a cup of coffee", num_inference_steps=1).images
    assert image.size == size[::-1]
    (image,) = pipeline("a cup of coffee", num_inference_steps=1, width=32).images
    assert image.size == (32, size[0])


@pytest.mark.parametrize("transformer_only", [False, True], ids=["all", "transformer"])
def test_half_precision_is_near_full_precision(exported, pipeline, transformer_only):
    half = torch.bfloat16
    dtype = {"transformer": half, "default": torch.float32} if transformer_only else half
    other = DiffusionPipeline.from_pretrained(
        exported, custom_pipeline=str(exported), trust_remote_code=True, torch_dtype=dtype
    )
    other.set_progress_bar_config(disable=True)
    assert (other.transformer.dtype, other.vae.dtype) == (half, torch.float32 if transformer_only else half)
    difference = np.abs(generate(other) - generate(pipeline))
    assert 0 < difference.mean() < 2


def move_weights(module, name, device, value=None, **_) -> None:
    """What accelerate does at an offloaded layer; its own function needs an accelerator to move the weights to."""
    owner, _, name = name.rpartition(".")
    owner = module.get_submodule(owner)
    tensors = owner._parameters if name in owner._parameters else owner._buffers
    moved = (tensors[name] if value is None else value).detach().to(device)
    tensors[name] = torch.nn.Parameter(moved, requires_grad=False) if tensors is owner._parameters else moved


@pytest.mark.parametrize("way", ["enable_sequential_cpu_offload", "enable_model_cpu_offload"])
def test_offloading_changes_no_image(exported, pipeline, monkeypatch, way):
    """Beyond rounding: memory is aligned differently. Sequentially, the weights of a layer exist only while it runs."""
    monkeypatch.setattr("accelerate.hooks.set_module_tensor_to_device", move_weights)
    other = loaded(exported)
    getattr(other, way)(device="cpu")
    for _ in range(2):
        assert np.abs(generate(other) - generate(pipeline)).max() <= 1
        is_away = all(p.is_meta for p in other.transformer.parameters())
        assert is_away == (way == "enable_sequential_cpu_offload")


def test_nodes_of_comfyui_make_the_images_of_the_pipeline(exported, pipeline, monkeypatch):
    """Read as ComfyUI reads a file of custom_nodes; ComfyUI itself does not run here."""
    monkeypatch.setitem(sys.modules, "comfy", None)
    nodes = runpy.run_path(str(exported / "comfyui_nodes.py"))
    assert nodes["NODE_CLASS_MAPPINGS"].keys() == nodes["NODE_DISPLAY_NAME_MAPPINGS"].keys()
    loader, sampler = (nodes["NODE_CLASS_MAPPINGS"][name]() for name in ("SelfELoader", "SelfESampler"))
    for node in (loader, sampler):
        inputs = {name for group in node.INPUT_TYPES().values() for name in group}
        assert inputs == inspect.signature(getattr(node, node.FUNCTION)).parameters.keys()
    assert loader.RETURN_TYPES[0] == sampler.INPUT_TYPES()["required"]["pipeline"][0]

    (from_node,) = loader.load(f" {exported}\n", "float32", "none")
    (images,) = sampler.sample(from_node, "a cup of coffee", 2, 3.0, seed=5, width=64, height=48, images=2)
    assert (images.shape, images.dtype) == ((2, 48, 64, 3), torch.float32)
    assert 0 <= images.min() < images.max() <= 1
    expected = generate(pipeline, num_images_per_prompt=2, seed=5, guidance_scale=3, s_ratio=0, eta=1)
    assert np.abs(images.numpy() * 255 - expected).max() <= 0.501

    # a model of flow matching
    from_node.register_to_config(default_s_ratio=1.0)
    (images,) = sampler.sample(from_node, "a cup of coffee", 2, 3.0, seed=5, width=64, height=48, images=1)
    expected = generate(pipeline, seed=5, guidance_scale=3, s_ratio=1)
    assert np.abs(images.numpy() * 255 - expected).max() <= 0.501
    with pytest.raises(ValueError, match="folder: '/nowhere/at/all' is no folder of `selfe export"):
        loader.load("/nowhere/at/all", "float32", "none")


def test_nodes_of_comfyui_show_progress_and_can_be_cancelled(exported, pipeline, monkeypatch):
    """With stand-ins for ComfyUI's two functions."""
    moved, cancelled = [], []

    class ProgressBar:
        def __init__(self, total):
            moved.append(-total)

        def update(self, value):
            moved.append(value)

    def throw_if_cancelled():
        if cancelled:
            raise InterruptedError

    parts = {"throw_exception_if_processing_interrupted": throw_if_cancelled}
    monkeypatch.setitem(sys.modules, "comfy.model_management", SimpleNamespace(**parts))
    monkeypatch.setitem(sys.modules, "comfy.utils", SimpleNamespace(ProgressBar=ProgressBar))
    monkeypatch.setitem(sys.modules, "comfy", SimpleNamespace())
    sampler = runpy.run_path(str(exported / "comfyui_nodes.py"))["SelfESampler"]()
    settings = {"steps": 2, "guidance": 1.0, "seed": 0, "width": 64, "height": 48, "images": 2}
    sampler.sample(pipeline, "a cup of coffee", **settings)
    assert moved == [-4, 1, 1, 1, 1]
    cancelled.append(True)
    with pytest.raises(InterruptedError):
        sampler.sample(pipeline, "a cup of coffee", **settings)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seed": 0.0}, "seed: expected an integer, got float"),
        ({"seed": True}, "seed: expected an integer, got bool"),
        ({"seed": None}, "seed: expected an integer, got NoneType"),
        ({"seed": -1}, "seed: -1 is not between 0"),
        ({"prompt": None}, "prompt: expected a string, got NoneType"),
        ({"prompt": []}, "prompt: the list is empty"),
        ({"prompt": " "}, "prompt: must not be empty"),
        ({"prompt": "a\x00b"}, "control character U\\+0000"),
        ({"prompt": ["a", 5]}, "prompt: expected a string, got int"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt: 0 is not between"),
        ({"num_inference_steps": 0}, "num_inference_steps: 0 is not between 1 and 1000"),
        ({"num_inference_steps": 2.0}, "num_inference_steps: expected an integer, got float"),
        ({"guidance_scale": float("nan")}, "guidance_scale: nan is not between"),
        ({"guidance_scale": -3}, "guidance_scale: -3.0 is not between"),
        ({"guidance_scale": "5"}, "guidance_scale: expected a number, got str"),
        ({"s_ratio": 2}, "s_ratio: 2.0 is not between 0 and 1"),
        ({"eta": float("nan")}, "eta: nan is not between 0 and 1"),
        ({"guidance_interval": (0.5, 0.1)}, r"guidance_interval: \[0.5, 0.1\] is no interval"),
        ({"height": 0}, "height 0 and width 64 must be positive"),
        ({"height": 100}, "height: 100 is not a multiple of 16"),
        ({"height": 96.0}, "height: expected an integer, got float"),
        ({"output_type": "foo"}, "output_type: expected one of pil, np, pt, latent, got 'foo'"),
        ({"output_type": None}, "output_type: expected one of"),
        ({"latents": torch.zeros(2, 12, 64)}, r"latents: expected \(1, 12, 64\) .* got \(2, 12, 64\)"),
        ({"latents": torch.zeros(1, 16, 6, 8)}, r"latents: expected \(1, 12, 64\)"),
        ({"latents": torch.full((1, 12, 64), torch.nan)}, "latents returns infinite or NaN"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: 2 for 1 prompts"),
        ({"negative_prompt": 5}, "negative_prompt: expected a string, got int"),
        ({"generator": 5}, "generator: expected torch.Generator, got int; for a number use seed"),
        ({"generator": [torch.Generator()] * 2}, "generator: 2 generators for 1 images"),
        ({"prompt_embeds": torch.zeros(1, 4, 64)}, "prompt_embeds and pooled_prompt_embeds must be given together"),
        (
            {"prompt_embeds": torch.zeros(1, 4, 64), "pooled_prompt_embeds": torch.zeros(1, 32)},
            "prompt and prompt_embeds: give one of them",
        ),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(1, 4, 63), "pooled_prompt_embeds": torch.zeros(1, 32)},
            r"prompt_embeds: expected \(B, n, 64\) and pooled \(B, 32\), got \(1, 4, 63\)",
        ),
        ({"max_sequence_length": 512}, "max_sequence_length: 512 is not between 1 and 24"),
        ({"callback_on_step_end": 5}, "callback_on_step_end: expected a function"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "'noise' is not available"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else None,
)
def test_wrong_arguments_of_the_pipeline_are_one_line(pipeline, arguments, words):
    with pytest.raises(ValueError, match=words) as error:
        pipeline(**{"prompt": "a cup of coffee"} | SMALL | arguments)
    assert "\n" not in str(error.value)


def test_the_pipeline_has_the_ranges_of_infer(pipeline, exported):
    """They are one file, copied."""
    assert (exported / "selfe_limits.py").read_text() == (ROOT / "selfe/io/sampling_limits.py").read_text()
    assert RANGES["num_steps"] == (1, 1000)


def test_infinite_weights_are_named_not_painted_black(pipeline):
    broken = copy.deepcopy(pipeline)
    broken.vae.decoder.conv_out.bias.data[0] = torch.inf
    with pytest.raises(ValueError, match="a cup of coffee: the autoencoder returns infinite or NaN values"):
        generate(broken)
    broken.transformer.proj_out.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="a cup of coffee: the denoiser returns infinite or NaN values"):
        generate(broken)


def test_a_failed_export_leaves_nothing(trained, tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = ["export", str(trained[0] / "checkpoints"), str(out)]

    def fails(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(command, "write_denoiser", fails)
        with pytest.raises(OSError, match="disk full"):
            cli.run(arguments)
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "out.partial").mkdir()  # of an export that was killed
    (tmp_path / "out.partial/old").touch()
    out.mkdir()
    cli.run(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name for path in out.iterdir()} == {"config.json", "config.yaml", "model.safetensors"}


def test_encoders_that_moved_are_read_from_the_cache_dir_of_today(trained, tmp_path, monkeypatch):
    """The run's config has the old place."""
    folder, _ = trained
    old = Path(config.load(folder / "config.yaml")["system"]["text_encoder"]["params"]["cache_dir"])
    moved = old.rename(old.with_name("moved"))
    arguments = ["export", str(folder / "checkpoints"), str(tmp_path / "out"), "--format", "diffusers"]
    try:
        monkeypatch.delenv("SELFE_CACHE_DIR", raising=False)
        with pytest.raises(UserError, match=f"{old}/ae.safetensors: not found; set SELFE_CACHE_DIR"):
            cli.run(arguments)
        monkeypatch.setenv("SELFE_CACHE_DIR", str(moved))
        cli.run(arguments)
        Generator(folder / "checkpoints", precision="fp32")
    finally:
        moved.rename(old)
    assert (tmp_path / "out/text_encoder_2/model.safetensors").is_file()


def test_exported_safetensors_hold_the_weights(trained, tmp_path, monkeypatch):
    """Both kinds of weights, in shards, and the way back in."""
    folder, _ = trained
    monkeypatch.setattr("selfe.io.safetensors_files.SHARD_BYTES", 10**6)
    settings = config.load(folder / "config.yaml")
    for weights, dtype in (("ema", "fp32"), ("live", "bf16")):
        out = tmp_path / weights
        cli.run(["export", str(folder / "checkpoints"), str(out), "--weights", weights, "--dtype", dtype])
        index = json.loads((out / "model.safetensors.index.json").read_text())
        shards = sorted(out.glob("*.safetensors"))
        assert len(shards) > 2
        assert {name for shard in shards for name in load_file(shard)} == set(index["weight_map"])
        assert index["metadata"]["total_size"] == sum(t.nbytes for s in shards for t in load_file(s).values())
        with torch.device("meta"):
            net = config.build(settings, "system").backbone
        net.to_empty(device="cpu")
        state.load_weights(verify.find(folder / "checkpoints"), net, weights)
        stored = FluxStateDict.of(out, {name: p.shape for name, p in net.named_parameters()})
        assert (stored.missing, stored.left_over) == ((), ())
        for name, parameter in net.named_parameters():
            assert torch.equal(stored.read(name), parameter.to(stored.read(name).dtype)), name
    about = json.loads((out / "config.json").read_text())
    assert about["step"] == 2
    assert about["backbone"]["params"]["width"] == 128


def test_an_exported_folder_draws_the_images_of_the_checkpoint(trained, tmp_path):
    folder, _ = trained
    out = tmp_path / "model"
    cli.run(["export", str(folder / "checkpoints"), str(out), "--dtype", "fp32"])

    images = []
    for checkpoint in (folder / "checkpoints", out):
        generator = Generator(checkpoint, precision="fp32")
        assert generator.step == 2
        images += generator.generate(["a cup of coffee"], num_steps=2)
    assert images[0].tobytes() == images[1].tobytes()

    with pytest.raises(UserError, match="has ema weights only, live ones are asked for; set weights to ema"):
        Generator(out, weights="live")

    # it samples as the run does
    settings, run = config.load(out / "config.yaml"), config.load(folder / "config.yaml")
    assert list(settings["inferencer"]["prompts"]) == recorded_run.example_prompts(run) != []
    assert list(settings["inferencer"]["defaults"]["num_steps"]) == [1, 2, 4]

    # another system, and a damaged file
    settings["system"]["backbone"]["params"]["num_single_blocks"] += 1
    config.save(settings, tmp_path / "other.yaml")
    with pytest.raises(UserError, match=r"its tensors are not those of system\.backbone"):
        Generator(out, tmp_path / "other.yaml")
    (out / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not written by selfe export"):
        Generator(out)


LORA = (
    "trainer.adapt={rank: 4, alpha: 8, layers: ['*blocks.*', out_modulation, out, image_in]}",
    "trainer.lr=1e-1",
    "trainer.warmup_steps=0",
    "trainer.max_steps=3",
    "trainer.samples.prompts=[]",
    "trainer.ema_decay=0",
    "system.text_encoder.params.max_tokens=24",
)


@pytest.fixture(scope="module")
def adapted(trained, tmp_path_factory) -> Path:
    """The run fine-tuned for three steps."""
    folder = tmp_path_factory.mktemp("adapted")
    cache = config.load(trained[0] / "config.yaml")["system"]["text_encoder"]["params"]["cache_dir"]
    env = {"SELFE_SKIP_PRETRAINED": "0", "SELFE_CACHE_DIR": str(cache)}
    start = f"trainer.init_from={trained[0] / 'checkpoints'}"
    train_processes.finish(folder, 1, *LORA, start, config=ROOT / SMOKE, env=env)
    return folder


@pytest.fixture(scope="module")
def adapted_image(adapted) -> np.ndarray:
    """The image of the fine-tuned run."""
    generator = Generator(adapted / "checkpoints", precision="fp32")
    (image,) = generator.generate(["a cup of coffee"], num_steps=2, height=48, width=64)
    return np.asarray(image, dtype=int)


def test_a_pipeline_of_the_merged_weights_makes_the_images_of_the_run(adapted, adapted_image, pipeline, tmp_path):
    arguments = [str(adapted / "checkpoints"), str(tmp_path / "merged"), "--format", "diffusers", "--dtype", "fp32"]
    cli.run(["export", *arguments])
    assert np.abs(generate(loaded(tmp_path / "merged"))[0] - adapted_image).max() <= 1
    assert np.abs(generate(pipeline)[0] - adapted_image).max() > 20


def test_the_file_for_diffusers_has_a_matrix_pair_for_each_of_its_layers(adapted, pipeline, tmp_path):
    """Their products are the differences of the merged transformer, whatever reads them."""
    out = tmp_path / "adapter"
    arguments = [str(adapted / "checkpoints"), str(out), "--adapter-only", "--format", "diffusers", "--dtype", "fp32"]
    cli.run(["export", *arguments])
    assert [path.name for path in out.iterdir()] == ["pytorch_lora_weights.safetensors"]
    matrices = load_file(out / "pytorch_lora_weights.safetensors")

    cli.run(
        ["export", str(adapted / "checkpoints"), str(tmp_path / "merged"), "--format", "diffusers", "--dtype", "fp32"]
    )
    merged = load_file(tmp_path / "merged/transformer/diffusion_pytorch_model.safetensors")
    before = pipeline.transformer.state_dict()
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    layers = {name.removeprefix("transformer.").removesuffix(".lora_A.weight") for name in matrices if "lora_A" in name}
    assert {name.removesuffix(".weight") for name in changed} <= layers
    assert {"transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_mlp", "norm_out.linear"} <= layers
    for layer in layers:
        a, b = (matrices[f"transformer.{layer}.lora_{kind}.weight"] for kind in "AB")
        difference = merged[f"{layer}.weight"] - before[f"{layer}.weight"]
        torch.testing.assert_close(b @ a, difference, rtol=0, atol=1e-6, msg=layer)
        assert a.shape[0] == b.shape[1] == 4


def test_diffusers_loads_the_adapter_into_the_pipeline_of_the_base(adapted, adapted_image, exported, tmp_path):
    pytest.importorskip("peft")
    out = tmp_path / "adapter"
    arguments = [str(adapted / "checkpoints"), str(out), "--adapter-only", "--format", "diffusers", "--dtype", "fp32"]
    cli.run(["export", *arguments])
    pipeline = loaded(exported)
    before = generate(pipeline)
    pipeline.load_lora_weights(out)
    assert np.abs(generate(pipeline)[0] - adapted_image).max() <= 1
    pipeline.unload_lora_weights()
    assert np.array_equal(generate(pipeline), before)


def test_the_folder_for_peft_is_loaded_by_peft_and_merges_to_the_same_weights(adapted, trained, tmp_path):
    out = tmp_path / "adapter"
    cli.run(["export", str(adapted / "checkpoints"), str(out), "--adapter-only", "--dtype", "fp32"])
    assert {path.name for path in out.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    settings = json.loads((out / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (4, 8, "LORA")
    layers = settings["target_modules"]
    assert load_file(out / "adapter_model.safetensors").keys() == {
        f"base_model.model.{layer}.lora_{kind}.weight" for layer in layers for kind in "AB"
    }

    peft = pytest.importorskip("peft")
    nets = []
    for folder in (trained[0], adapted):
        with torch.device("meta"):
            nets.append(config.build(config.load(folder / "config.yaml"), "system").backbone)
        nets[-1].to_empty(device="cpu")
        load_weights(verify.find(folder / "checkpoints"), nets[-1], "ema")
    merged = peft.PeftModel.from_pretrained(nets[0], out).merge_and_unload()
    for name, parameter in nets[1].named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), parameter, rtol=0, atol=1e-6, msg=name)


class Renamed(MMDiT):
    """A denoiser with the tensors of MMDiT that may compute something else."""


def test_mistakes_are_one_line(trained, tmp_path):
    folder, images = trained
    settings = config.load(folder / "config.yaml")
    settings["system"]["backbone"]["module"] = f"{__name__}.Renamed"
    shutil.copytree(folder / "checkpoints", tmp_path / "run/checkpoints")
    config.save(settings, tmp_path / "run/config.yaml")
    with pytest.raises(UserError, match=rf"--format safetensors supports MMDiT only, the run has {__name__}.Renamed"):
        command.read_run(verify.find(tmp_path / "run/checkpoints"), "safetensors", trust=True)
    with pytest.raises(UserError, match=r"--adapter-only: .* holds complete weights, no adapter; leave it out"):
        cli.run(["export", str(folder / "checkpoints"), str(tmp_path / "out"), "--adapter-only"])
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        cli.run(["export", str(folder / "checkpoints"), str(images)])
    with pytest.raises(UserError, match="no such checkpoint directory"):
        cli.run(["export", str(folder / "nowhere"), str(tmp_path / "out")])
    shutil.copytree(folder / "checkpoints", tmp_path / "alone")
    with pytest.raises(UserError, match=r"no config.yaml beside it; expected RUN/config.yaml"):
        cli.run(["export", str(tmp_path / "alone"), str(tmp_path / "out")])
