"""Autoencoders of diffusers: tokens and images are those of its pipelines, on small random models of each kind."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from selfe import cli, config
from selfe.encoders.diffusers_vae import DiffusersVAE
from selfe.errors import UserError
from selfe.generator import Generator
from selfe.rng import SampleRNG
from selfe.types import Packed
from tests.helpers.train_processes import ROOT, TINY, copy_until, files, finish, lines

CPU = torch.device("cpu")
STAGES = {"block_out_channels": (32,) * 4, "layers_per_block": 1, "sample_size": 32}
STAGES |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
DC = {"attention_head_dim": 8, "encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"}
DC |= {"encoder_block_out_channels": (16,) * 6, "decoder_block_out_channels": (16,) * 6}
DC |= {"encoder_layers_per_block": (1,) * 6, "decoder_layers_per_block": (1,) * 6}
DC |= {"encoder_qkv_multiscales": ((),) * 6, "decoder_qkv_multiscales": ((),) * 6}
MODELS = {
    "SD": ("AutoencoderKL", STAGES | {"latent_channels": 4, "scaling_factor": 0.18215}),
    "SDXL with statistics": (
        "AutoencoderKL",
        STAGES
        | {"latent_channels": 4, "scaling_factor": 0.5}
        | {"latents_mean": (-1.6, 0.3, -0.9, 0.2), "latents_std": (8.4, 5.9, 6.0, 7.1)},
    ),
    "SD3": (
        "AutoencoderKL",
        STAGES
        | {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
        | {"use_quant_conv": False, "use_post_quant_conv": False},
    ),
    "FLUX.2": ("AutoencoderKLFlux2", STAGES | {"latent_channels": 32}),
    "DC-AE": ("AutoencoderDC", DC | {"latent_channels": 8, "scaling_factor": 0.41407}),
}
SIZES = {"DC-AE": {"latent_channels": 8, "downsampling": 32, "patch": 1}, "FLUX.2": {"latent_channels": 32}}
SIZES |= {"SD": {"latent_channels": 4}, "SDXL with statistics": {"latent_channels": 4}, "SD3": {"latent_channels": 16}}


def model_folder(folder: Path, name: str) -> Path:
    """A folder as the library writes it."""
    kind, settings = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = getattr(diffusers, kind)(**settings)
        if name == "FLUX.2":
            net.bn.running_mean.normal_()
            net.bn.running_var.uniform_(0.5, 2)
    net.save_pretrained(folder)
    return folder


def loaded(folder: Path, name: str, **options) -> DiffusersVAE:
    autoencoder = DiffusersVAE(str(folder), **SIZES[name] | {"dtype": "fp32"} | options)
    autoencoder.load(CPU)
    return autoencoder


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=generator) * 2 - 1 for size in ((64, 64), (32, 64), (64, 64))]


def of_the_pipelines(name: str, net: torch.nn.Module, image: Tensor) -> Tensor:
    """What the pipelines of diffusers give the denoiser for the mean of an image: (channels, h, w)."""
    z = net.encode(image[None])
    z = z.latent if name == "DC-AE" else z.latent_dist.mode()
    if name == "FLUX.2":
        z = diffusers.Flux2Pipeline._patchify_latents(z)
        std = torch.sqrt(net.bn.running_var.view(1, -1, 1, 1) + net.config.batch_norm_eps)
        return ((z - net.bn.running_mean.view(1, -1, 1, 1)) / std)[0]
    if name == "SDXL with statistics":
        mean, std = (torch.tensor(net.config[key]).view(1, 4, 1, 1) for key in ("latents_mean", "latents_std"))
        return ((z - mean) * net.config.scaling_factor / std)[0]
    shift = net.config.get("shift_factor") or 0.0
    return ((z - shift) * net.config.scaling_factor)[0]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_tokens_and_images_are_those_of_the_pipelines(name, tmp_path):
    autoencoder = loaded(model_folder(tmp_path, name), name)
    net = getattr(diffusers, MODELS[name][0]).from_pretrained(tmp_path).eval()
    tokens, deviation = autoencoder.moments(images())
    assert tokens.tokens.shape[1] == autoencoder.token_dim
    assert (deviation is None) == (name == "DC-AE")

    for image, ours in zip(images(), tokens.split(), strict=True):
        theirs = of_the_pipelines(name, net, image)
        if name != "FLUX.2":  # patches of 2 x 2 latents in the order (channel, row, column), or of one
            p = autoencoder.patch
            theirs = theirs.unflatten(1, (-1, p)).unflatten(3, (-1, p)).permute(0, 2, 4, 1, 3).flatten(0, 2)
        torch.testing.assert_close(ours, theirs.flatten(1).T, rtol=1e-5, atol=1e-5)

    # decoding: the raw latents through the network
    decoded = autoencoder.decode(tokens)
    for image, ours in zip(images(), decoded, strict=True):
        z = net.encode(image[None])
        z = z.latent if name == "DC-AE" else z.latent_dist.mode()
        torch.testing.assert_close(ours, net.decode(z).sample[0], rtol=1e-4, atol=1e-4)
        assert ours.shape == image.shape


@torch.no_grad()
def test_samples_have_the_deviation_of_the_encoder(tmp_path):
    autoencoder = loaded(model_folder(tmp_path, "SD3"), "SD3")
    rng = SampleRNG.of_step(0, 0, range(3))
    mean, deviation = autoencoder.moments(images())
    sampled = autoencoder.encode(images(), rng)
    torch.testing.assert_close(sampled.tokens, mean.tokens + deviation * rng.normal_like("latent", mean))
    distribution = autoencoder.net.encode(images()[1][None]).latent_dist
    expected = autoencoder.patchify([distribution.std[0] * 1.5305]).tokens
    torch.testing.assert_close(Packed.split(mean.with_tokens(deviation))[1], expected)
    assert loaded(tmp_path, "SD3", latent="mean").moments(images())[1] is None


@torch.no_grad()
def test_large_images_are_decoded_in_tiles(tmp_path):
    folder = model_folder(tmp_path, "SD")
    tokens, _ = loaded(folder, "SD").moments(images())
    tiled = loaded(folder, "SD", decode_pixels=48 * 48)
    net = tiled.net
    for image in tiled.decode(tokens):
        assert image.isfinite().all()
    assert not net.use_tiling  # the last batch decoded is of small images
    tiled.decode(tokens.select([0]))
    assert net.use_tiling


def test_random_weights_need_no_files_and_the_meta_device_no_weights(tmp_path):
    autoencoder = DiffusersVAE("none", latent_channels=4, downsampling=4, skip_pretrained=True, dtype="fp32")
    autoencoder.load(CPU)
    tokens = autoencoder.encode([torch.zeros(3, 16, 24)], SampleRNG.of_step(0, 0, [0]))
    assert tokens.grids == ((2, 3),)
    assert autoencoder.decode(tokens)[0].shape == (3, 16, 24)
    assert autoencoder.noise([(16, 24)], SampleRNG.of_step(0, 0, [0])).grids == ((2, 3),)

    folder = model_folder(tmp_path, "DC-AE")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with torch.device("meta"):
        autoencoder = DiffusersVAE(str(folder), **SIZES["DC-AE"])
    autoencoder.load(torch.device("meta"))
    tokens, _ = autoencoder.moments([torch.empty(3, 64, 32, device="meta")])
    assert tokens.tokens.shape == (2, 8)
    assert tokens.tokens.is_meta


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "sd", "SD")
    for options, words in (
        ({"latent_channels": 16}, r"params\.latent_channels: the model has 4, got 16; set it to 4"),
        ({"downsampling": 16}, r"params\.downsampling: the model has 8, got 16; set it to 8"),
    ):
        with pytest.raises(UserError, match=words):
            loaded(folder, "SD", **options)
    with pytest.raises(
        UserError, match=r"sd: no such folder; download it with selfe cache-pretrained --autoencoder sd, or set"
    ):
        DiffusersVAE("sd", 4, cache_dir=tmp_path / "elsewhere").load(CPU)
    with pytest.raises(UserError, match=r"sd is needed, but SELFE_CACHE_DIR is not set"):
        DiffusersVAE("sd", 4).load(CPU)

    # a pipeline folder, another class, a tensor that is missing
    (tmp_path / "pipeline/vae").mkdir(parents=True)
    (tmp_path / "pipeline/config.json").write_text("{}")
    with pytest.raises(UserError, match=r"the class None is not one of AutoencoderKL, .*; name its folder vae"):
        DiffusersVAE("pipeline", 4, cache_dir=tmp_path).load(CPU)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"layers_per_block": 2}))
    with pytest.raises(UserError, match=r"lacks the tensor decoder\.up_blocks"):
        loaded(folder, "SD")

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(
        UserError, match=r"diffusers with AutoencoderKL is not installed; run scripts/setup\.sh --extra d"
    ):
        loaded(folder, "SD")


def test_a_run_with_a_bottleneck_and_prediction_of_x0_resumes_and_is_exported(tmp_path):
    """On two ranks, with random weights of the autoencoder."""
    params = {"model": "none", "latent_channels": 4, "downsampling": 4, "skip_pretrained": True, "dtype": "fp32"}
    autoencoder = {"module": "selfe.encoders.diffusers_vae.DiffusersVAE", "params": params}
    backbone = {"params": {"patch_dim": 16, "bottleneck": 5, "prediction": "x0", "learned_grid": [8, 8]}}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"base": str(TINY), "system": {"autoencoder": autoencoder, "backbone": backbone}}))
    finish(tmp_path / "once", 2, "trainer.stop_step=3", config=path)
    copy_until(Path("checkpoints/step_00000002"), tmp_path / "once", tmp_path / "resumed")
    finish(tmp_path / "resumed", 2, "trainer.stop_step=3", config=path)
    checkpoint = "checkpoints/step_00000003"
    assert files(tmp_path / "once" / checkpoint) == files(tmp_path / "resumed" / checkpoint)
    assert lines(tmp_path / "once")[-1] == lines(tmp_path / "resumed")[-1]

    # parameters that FLUX does not have keep their names
    run, exported = tmp_path / "once/checkpoints", tmp_path / "exported"
    cli.run(["export", str(run), str(exported), "--dtype", "fp32"])
    names = load_file(exported / "model.safetensors").keys()
    assert {"image_in.0.weight", "image_in.1.bias", "position.weight", "txt_in.weight"} <= names
    images = [Generator(folder, precision="fp32").generate(["x"], height=32, width=48)[0] for folder in (run, exported)]
    assert images[0].size == (48, 32)
    assert images[0].tobytes() == images[1].tobytes()

    with pytest.raises(UserError, match=r"diffusers supports FluxVAE only"):
        cli.run(["export", str(run), str(tmp_path / "out"), "--format", "diffusers"])


def test_the_configs_of_the_page_fit_together(tmp_path, monkeypatch):
    monkeypatch.setenv("SELFE_CACHE_DIR", str(tmp_path))
    names = []
    for text in re.findall(r"^```yaml\n# (.*?)^```", (ROOT / "docs/latents.md").read_text(), re.DOTALL | re.MULTILINE):
        name, _, settings = text.partition("\n")
        (tmp_path / name).write_text(settings.replace("base: ", f"base: {ROOT}/"))
        settings = config.load(tmp_path / name)
        with torch.device("meta"):
            config.build(settings, "system").check_data(SimpleNamespace(multiple=16))
        names.append(name)
    assert names == ["sdxl.yaml", "pixels.yaml"]
