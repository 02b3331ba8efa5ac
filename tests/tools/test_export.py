"""From real files to an image and out again: the commands read SELFE_CACHE_DIR, diffusers draws the same images."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from selfe import cli, config
from selfe.checkpoint import flux, state, verify
from selfe.checkpoint.flux import FluxStateDict
from selfe.types import UserError
from tests.helpers.encoder_files import ROOT, write_cache

SMOKE = "configs/debug/selfe_smoke.yaml"


def run(script: str, processes: int, cache: Path, *overrides: str) -> str:
    env = {key: value for key, value in os.environ.items() if not key.startswith("SELFE_")}
    done = subprocess.run(
        [ROOT / script, SMOKE, str(processes), *overrides],
        cwd=ROOT,
        env=env | {"SELFE_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "LOAD REPORT" not in done.stderr
    return done.stdout


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
    """Two steps from FLUX weights, on two processes with T5 cut over them; then images. Returns run and images."""
    cache, folder = write_cache(tmp_path_factory.mktemp("cache")), tmp_path_factory.mktemp("run")
    steps = "trainer.max_steps=2", "trainer.warmup_steps=1", "trainer.samples.every=2", "trainer.lr=1e-2"
    start = f"trainer.init_from={write_flux(cache / 'flux1-dev.safetensors')}", "trainer.shard_text_encoder=true"
    said = run("run.sh", 2, cache, f"trainer.output_dir={folder}", *steps, *start)
    assert "2 steps done" in said
    assert "tensors loaded, 4 missing, 1 unused" in said
    assert "guidance_in.in_layer.weight" in (folder / "init_from.txt").read_text()
    paths = f"inferencer.ckpt_dir={folder}/checkpoints", f"inferencer.output_dir={folder}/images"
    run("infer.sh", 1, cache, *paths, "inferencer.defaults.num_steps=[1,3]")
    return folder, folder / "images"


def test_images_of_the_exported_pipeline_are_those_of_the_inferencer(trained, tmp_path):
    """From the same noise, prompt and steps, with guidance and fresh noise; diffusers' code all the way."""
    folder, images = trained
    out = tmp_path / "pipeline"
    cli.run(["export", str(folder / "checkpoints"), str(out), "--format", "diffusers", "--dtype", "fp32"])
    pipeline = DiffusionPipeline.from_pretrained(out, custom_pipeline=str(out), trust_remote_code=True)
    assert not [name for name in pipeline.components if "selfe" in type(getattr(pipeline, name)).__module__.split(".")]
    settings = {"height": 96, "width": 128, "guidance_scale": 5.0, "seed": 0}
    lines = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["prompt"] in {lines[0]["prompt"], lines[-1]["prompt"]}]
    assert {line["num_steps"] for line in lines} == {1, 3}
    for line in lines:
        (drawn,) = pipeline(line["prompt"], num_inference_steps=line["num_steps"], **settings).images
        expected = np.asarray(Image.open(images / line["file"]), dtype=int)
        assert expected.std() > 5
        assert np.abs(np.asarray(drawn, dtype=int) - expected).max() <= 2
    noise = pipeline.draw((0, line["prompt"], 0), "noise", 96, 128)
    (again,) = pipeline(line["prompt"], num_inference_steps=line["num_steps"], latents=noise, **settings).images
    assert np.array_equal(np.asarray(again), np.asarray(drawn))


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
        found = FluxStateDict.of(out, {name: p.shape for name, p in net.named_parameters()})
        assert (found.missing, found.left_over) == ((), ())
        for name, parameter in net.named_parameters():
            assert torch.equal(found.read(name), parameter.to(found.read(name).dtype)), name
    about = json.loads((out / "config.json").read_text())
    assert about["step"] == 2
    assert about["backbone"]["params"]["width"] == 128


def test_mistakes_are_one_line(trained, tmp_path):
    folder, images = trained
    with pytest.raises(UserError, match="not empty"):
        cli.run(["export", str(folder / "checkpoints"), str(images)])
    with pytest.raises(UserError, match="no such checkpoint directory"):
        cli.run(["export", str(folder / "nowhere"), str(tmp_path / "out")])
    (tmp_path / "alone").symlink_to(folder / "checkpoints")
    with pytest.raises(UserError, match=r"config.yaml: not found"):
        cli.run(["export", str(tmp_path / "alone"), str(tmp_path / "out")])
