"""The cache script, as a user calls it, against a small Hub on the loopback interface."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model

from selfe import cli
from selfe.encoders.diffusers_vae import DiffusersVAE
from selfe.encoders.hf_text import HFText
from selfe.encoders.hf_vision import HFVision
from selfe.errors import UserError
from selfe.tools import cache_pretrained
from tests.helpers.encoder_files import ROOT, write_cache, write_text_model
from tests.helpers.fake_hub import COMMIT, Hub
from tests.method.test_diffusers_vae import model_folder
from tests.method.test_pretrained import assert_equals_reference, loaded

T5, CLIP, FLUX = "google/t5-v1_1-xxl", "openai/clip-vit-large-patch14", "black-forest-labs/FLUX.1-dev"
CAPTIONS = ["a cup of coffee", "", "a red cat on a chair by the sea", "a cat", "an astronaut"]


@pytest.fixture(scope="module")
def repos(tmp_path_factory) -> dict[str, Path]:
    """As on the real Hub: T5 only as a pickle, CLIP in several formats, FLUX with its transformer."""
    folder = write_cache(tmp_path_factory.mktemp("hub"))
    t5, clip, flux = folder / "t5-v1_1-xxl", folder / "clip-vit-large-patch14", folder / "flux"
    # large enough for an interruption to leave something: bytes arrive in pieces of 10 MiB
    state = load_file(t5 / "model.safetensors") | {"lm_head.weight": torch.rand(2**23)}
    torch.save(state, t5 / "pytorch_model.bin")
    (t5 / "model.safetensors").unlink()
    (t5 / "tf_model.h5").write_bytes(b"unwanted")
    torch.save(load_file(clip / "model.safetensors"), clip / "pytorch_model.bin")
    flux.mkdir()
    (folder / "ae.safetensors").rename(flux / "ae.safetensors")
    save_file({"img_in.weight": torch.zeros(4, 4)}, flux / "flux1-dev.safetensors")
    (flux / "model_index.json").write_text("{}")
    return {T5: t5, CLIP: clip, FLUX: flux}


@pytest.fixture
def fetch(monkeypatch, tmp_path):
    """The script's main in this process: `fetch(hub, *options)`. The token is neither printed nor stored."""
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)

    def run(hub: Hub, *options: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # HF_ENDPOINT is read at import
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template)
        cli.run(["cache-pretrained", "--cache-dir", str(tmp_path / "cache"), *options])

    return run


def assert_secret(token: str, said: str, folder: Path) -> None:
    assert token not in said
    assert not [file for file in folder.rglob("*") if file.is_file() and token.encode() in file.read_bytes()]


def start(command: list, hub: Hub, cache: Path, *options: str, **changes: str) -> subprocess.Popen:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "SELFE_"))}
    env = inherited | {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache.parent / "hf_home")} | changes
    words = [*command, "--cache-dir", cache, *options]
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_complete_download_then_nothing_to_fetch(repos, tmp_path, fetch, capsys):
    cache = tmp_path / "cache"
    with Hub(repos) as hub:
        process = start(
            [ROOT / "scripts/cache_pretrained_only.sh"], hub, cache, "--flux-vae-only", "--hf-token", hub.token
        )
        said = "".join(process.communicate(timeout=200))
        assert process.returncode == 0, said
        assert f"export SELFE_CACHE_DIR={cache}" in said
        assert_secret(hub.token, said, tmp_path)
        names = {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()}
        clip = {"config.json", "merges.txt", "model.safetensors", "special_tokens_map.json", "tokenizer_config.json"}
        t5 = {"config.json", "model.safetensors", "special_tokens_map.json", "spiece.model", "tokenizer_config.json"}
        assert names == {"fetched.json", "ae.safetensors"} | {f"t5-v1_1-xxl/{name}" for name in t5} | {
            f"clip-vit-large-patch14/{name}" for name in clip | {"vocab.json"}
        }
        assert len(hub.gets()) == len(set(hub.gets())) == len(names) - 1
        hub.requests.clear()
        fetch(hub, "--flux-vae-only")
        assert not hub.requests
        fetch(hub, "--hf-token", hub.token)  # now with the transformer
        assert hub.gets() == [(FLUX, "flux1-dev.safetensors")]
        assert_secret(hub.token, capsys.readouterr().out, tmp_path)

    state = load_file(cache / "t5-v1_1-xxl/model.safetensors")
    assert {name.split(".")[0] for name in state} == {"shared", "encoder"}
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert (cache / "ae.safetensors").read_bytes() == (repos[FLUX] / "ae.safetensors").read_bytes()
    assert json.loads((cache / "fetched.json").read_text())["t5-v1_1-xxl/model"]["repo"] == T5
    assert_equals_reference(loaded(cache)(CAPTIONS), cache, CAPTIONS)


def test_killed_download_continues_where_it_stopped(repos, tmp_path, fetch):
    cache = tmp_path / "cache"
    size = (repos[T5] / "pytorch_model.bin").stat().st_size
    with Hub(repos, stall="pytorch_model.bin") as hub:
        process = start(
            [sys.executable, "-m", "selfe", "cache-pretrained"], hub, cache, "--flux-vae-only", HF_TOKEN=hub.token
        )
        assert hub.half_way.wait(timeout=100)
        (part,) = (cache / "t5-v1_1-xxl").glob("pytorch_model.bin.*.part")
        deadline = time.monotonic() + 60
        while part.stat().st_size == 0 and time.monotonic() < deadline:  # until what was sent has been written
            time.sleep(0.02)
        process.kill()
        process.communicate()
    kept = part.stat().st_size
    assert 0 < kept < size
    with Hub(repos) as hub:
        fetch(hub, "--flux-vae-only")
        assert ("GET", f"/{T5}/resolve/{COMMIT}/pytorch_model.bin", f"bytes={kept}-") in hub.requests
        assert [name for repo, name in hub.gets() if repo == T5] == ["pytorch_model.bin"]  # the others were whole
    assert not list(cache.rglob("*.part"))
    loaded(cache)


def test_no_access_is_one_line(repos, fetch):
    with Hub(repos, gated=FLUX) as hub:
        with pytest.raises(UserError, match="the Hub returned 401: pass a valid token with --hf-token"):
            fetch(hub, "--hf-token", "hf_wrong")
        with pytest.raises(UserError, match=f"{FLUX}: gated; accept its licence on {hub.url}/{FLUX}"):
            fetch(hub, "--hf-token", hub.token)
        assert not hub.served
    hub.url = "http://127.0.0.1:9"  # where nobody listens
    with pytest.raises(UserError, match=r"no connection to .* run again"):
        fetch(hub)


def test_the_line_is_all_that_a_user_sees(repos, tmp_path):
    with Hub(repos, gated=FLUX) as hub:
        process = start(
            [sys.executable, "-m", "selfe", "cache-pretrained"], hub, tmp_path / "cache", HF_TOKEN=hub.token
        )
        out, err = process.communicate(timeout=100)
    assert (process.returncode, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(f"selfe: error: {FLUX}: gated")


def test_damaged_file_is_one_line_and_fetched_again(repos, tmp_path, fetch):
    cache = tmp_path / "cache"
    right = (repos[FLUX] / "ae.safetensors").read_bytes()
    with Hub(repos) as hub:
        hub.wrong["ae.safetensors"] = right[:-1] + bytes([right[-1] ^ 1])
        with pytest.raises(UserError, match=f"ae.safetensors: received {len(right)} bytes that do not match"):
            fetch(hub, "--flux-vae-only")
        hub.wrong["ae.safetensors"] = right[:-1]
        with pytest.raises(UserError, match=r"download interrupted|received \d+ bytes"):
            fetch(hub, "--flux-vae-only")
        assert not (cache / "ae.safetensors").exists()
        hub.wrong.clear()
        shutil.copy(repos[FLUX] / "flux1-dev.safetensors", cache / "ae.safetensors")  # another file in its place
        fetch(hub, "--flux-vae-only")
    assert (cache / "ae.safetensors").read_bytes() == right


def test_full_disk_is_one_line(tmp_path):
    name = "pytorch_model.bin"
    files = [cache_pretrained.File(T5, COMMIT, name, name, 10**15, "0" * 64, "")]
    plan = [(cache_pretrained.paper(True)[0], files)]
    with pytest.raises(UserError, match=r"1250000.0 GB are needed, .* GB are free"):
        cache_pretrained.check_space(tmp_path / "not" / "yet", plan)


def test_a_text_encoder_is_downloaded_under_its_name(tmp_path, fetch):
    """Nothing else is, and a pickle is refused before anything is downloaded."""
    repos = {"bert/tiny": write_text_model(tmp_path / "hub/bert", "bert"), "old/model": tmp_path / "hub/old"}
    (repos["bert/tiny"] / "tf_model.h5").write_bytes(b"unwanted")
    repos["old/model"].mkdir()
    (repos["old/model"] / "pytorch_model.bin").write_bytes(b"")
    cache = tmp_path / "cache"

    with Hub(repos) as hub:
        with pytest.raises(
            UserError, match=r"old/model: the repository has its weights only as pytorch_model.bin, which"
        ):
            fetch(hub, "--text-encoder", "bert/tiny", "--text-encoder", "old/model")
        assert not hub.served
        with pytest.raises(UserError, match=r"--text-encoder \.\./tiny: give a name on the Hub"):
            fetch(hub, "--text-encoder", "../tiny")
        fetch(hub, "--text-encoder", "bert/tiny")
        names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
        assert {name for _, name in hub.gets()} == names
        hub.requests.clear()
        fetch(hub, "--text-encoder", "bert/tiny")
        assert not hub.requests

    encoder = HFText("bert/tiny", 32, cache_dir=cache, max_tokens=64)
    encoder.load(torch.device("cpu"))
    assert encoder(["a cat"]).text.lens == (4,)
    (cache / "bert/tiny/model.safetensors").unlink()
    with pytest.raises(UserError, match=r"bert/tiny: .*download it with selfe cache-pretrained --text-encoder bert/ti"):
        encoder.load(torch.device("cpu"))


def test_autoencoders_and_vision_models_are_downloaded_under_their_names(tmp_path, fetch):
    """An autoencoder from its folder in a pipeline; what is downloaded is loaded."""
    pipeline, vision = tmp_path / "hub/pipeline", tmp_path / "hub/vision"
    model_folder(pipeline / "vae", "SD")
    (pipeline / "vae/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"unwanted")
    (pipeline / "unet").mkdir()
    (pipeline / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"unwanted")
    (pipeline / "model_index.json").write_text("{}")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 14, "patch_size": 7}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(vision)
    statistics = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (vision / "preprocessor_config.json").write_text(json.dumps(statistics))
    (vision / "pytorch_model.bin").write_bytes(b"unwanted")

    cache = tmp_path / "cache"
    with Hub({"lab/pipeline": pipeline, "lab/vision": vision}) as hub:
        with pytest.raises(UserError, match=r"--autoencoder vae: give a name on the Hub, such as stabilityai/sdxl-vae"):
            fetch(hub, "--autoencoder", "vae")
        with pytest.raises(UserError, match=r"lab/vision: the repository has no diffusion_pytorch_model file"):
            fetch(hub, "--autoencoder", "lab/vision")
        assert not hub.served
        fetch(hub, "--autoencoder", "lab/pipeline/vae", "--vision-model", "lab/vision")
        weights = "vae/diffusion_pytorch_model.safetensors"
        assert {name for repo, name in hub.gets() if repo == "lab/pipeline"} == {"vae/config.json", weights}
        expected = {"config.json", "model.safetensors", "preprocessor_config.json"}
        assert {name for repo, name in hub.gets() if repo == "lab/vision"} == expected
        hub.requests.clear()
        fetch(hub, "--autoencoder", "lab/pipeline/vae", "--vision-model", "lab/vision")
        assert not hub.requests

    cpu = torch.device("cpu")
    DiffusersVAE("lab/pipeline/vae", 4, cache_dir=cache).load(cpu)
    HFVision("lab/vision", feature_dim=16, cache_dir=cache).load(cpu)
    shutil.rmtree(cache / "lab/pipeline")
    with pytest.raises(UserError, match="download it with selfe cache-pretrained --autoencoder lab/pipeline/vae"):
        DiffusersVAE("lab/pipeline/vae", 4, cache_dir=cache).load(cpu)
