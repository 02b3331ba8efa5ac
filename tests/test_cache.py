"""The cache script, as a user calls it, against a small Hub on the loopback interface."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hub import Hub
from real_encoders import write_cache
from safetensors.torch import load_file, save_file
from test_pretrained import SIZES, assert_equals_reference, loaded

ROOT = Path(__file__).parents[1]
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


def command(cache: Path, *options: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts/cache_pretrained.py"), "--cache-dir", str(cache), *options]


def environment(hub: Hub, home: Path, **changes: str) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "SELFE_"))}
    return inherited | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf_home"), "OMP_NUM_THREADS": "1"} | changes


def fetch(hub: Hub, cache: Path, *options: str, **changes: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command(cache, *options),
        env=environment(hub, cache.parent, **changes),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert hub.token not in done.stdout + done.stderr
    for file in cache.parent.rglob("*"):  # nor stored
        assert not file.is_file() or hub.token.encode() not in file.read_bytes()
    return done


def error_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2, done
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert "Traceback" not in done.stderr
    return line


def test_complete_download_then_nothing_to_fetch(repos, tmp_path):
    cache = tmp_path / "cache"
    with Hub(repos) as hub:
        done = fetch(hub, cache, "--flux-vae-only", "--hf-token", hub.token)
        assert done.returncode == 0, done.stderr
        names = {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()}
        clip = {"config.json", "merges.txt", "model.safetensors", "special_tokens_map.json", "tokenizer_config.json"}
        t5 = {"config.json", "model.safetensors", "special_tokens_map.json", "spiece.model", "tokenizer_config.json"}
        assert names == {"fetched.json", "ae.safetensors"} | {f"t5-v1_1-xxl/{name}" for name in t5} | {
            f"clip-vit-large-patch14/{name}" for name in clip | {"vocab.json"}
        }
        assert max(Counter(path for method, path, _ in hub.requests if method == "GET").values()) == 1
        hub.requests.clear()
        assert fetch(hub, cache, "--flux-vae-only").returncode == 0
        assert not hub.requests
        assert fetch(hub, cache, HF_TOKEN=hub.token).returncode == 0  # now with the transformer
        gets = [path.rsplit("/", 1)[1] for method, path, _ in hub.requests if method == "GET" and "resolve" in path]
        assert gets == ["flux1-dev.safetensors"]

    state = load_file(cache / "t5-v1_1-xxl/model.safetensors")
    assert {name.split(".")[0] for name in state} == {"shared", "encoder"}
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert (cache / "ae.safetensors").read_bytes() == (repos[FLUX] / "ae.safetensors").read_bytes()
    assert json.loads((cache / "fetched.json").read_text())["t5-v1_1-xxl/model"]["repo"] == T5
    assert SIZES["dtype"] == "fp32"
    assert_equals_reference(loaded(cache)(CAPTIONS), cache, CAPTIONS)


def test_killed_download_continues_where_it_stopped(repos, tmp_path):
    cache = tmp_path / "cache"
    size = (repos[T5] / "pytorch_model.bin").stat().st_size
    with Hub(repos, stall="pytorch_model.bin") as hub:
        process = subprocess.Popen(
            command(cache, "--flux-vae-only"),
            env=environment(hub, tmp_path),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        assert hub.half_way.wait(timeout=100)
        (part,) = (cache / "t5-v1_1-xxl").glob("pytorch_model.bin.*.part")
        deadline = time.monotonic() + 60
        while part.stat().st_size == 0 and time.monotonic() < deadline:  # until what was sent has been written
            time.sleep(0.02)
        process.kill()
        process.wait()
    kept = part.stat().st_size
    with Hub(repos) as hub:
        done = fetch(hub, cache, "--flux-vae-only")
        assert done.returncode == 0, done.stderr
        ranges = {path.rsplit("/", 1)[1]: ranged for method, path, ranged in hub.requests if method == "GET"}
        assert ranges["pytorch_model.bin"] == f"bytes={kept}-"
        assert 0 < kept < size
        assert "spiece.model" in ranges  # came after it
        assert "config.json" not in {p.rsplit("/", 1)[1] for m, p, _ in hub.requests if m == "GET" and T5 in p}
    assert not list(cache.rglob("*.part"))
    loaded(cache)


def test_no_access_is_one_line(repos, tmp_path):
    cache = tmp_path / "cache"
    with Hub(repos, gated=FLUX) as hub:
        assert "give --hf-token a valid token" in error_line(fetch(hub, cache, "--hf-token", "hf_wrong"))
        line = error_line(fetch(hub, cache, HF_TOKEN=hub.token))
        assert f"{FLUX}: gated; accept its licence on {hub.url}/{FLUX}" in line
        assert not hub.served
    assert "no connection to" in error_line(fetch(hub, cache))


def test_damaged_file_is_one_line_and_fetched_again(repos, tmp_path):
    cache = tmp_path / "cache"
    right = (repos[FLUX] / "ae.safetensors").read_bytes()
    (cache / "t5-v1_1-xxl").mkdir(parents=True)
    with Hub(repos) as hub:
        hub.wrong["ae.safetensors"] = right[:-1] + bytes([right[-1] ^ 1])
        line = error_line(fetch(hub, cache, "--flux-vae-only"))
        assert f"{cache}/ae.safetensors: {len(right)} bytes came" in line
        assert not (cache / "ae.safetensors").exists()
        hub.wrong.clear()
        shutil.copy(repos[FLUX] / "flux1-dev.safetensors", cache / "ae.safetensors")  # another file in its place
        assert fetch(hub, cache, "--flux-vae-only").returncode == 0
    assert (cache / "ae.safetensors").read_bytes() == right


def test_full_disk_is_one_line(repos, tmp_path, monkeypatch, capsys):
    """Free space is made small by the one function that tells it."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import cache_pretrained

    files = [cache_pretrained.File(T5, "0", "pytorch_model.bin", 10**15, "0" * 64, "")]
    (part, *_) = cache_pretrained.parts(True)
    with pytest.raises(cache_pretrained.UserError, match=r"1250000.0 GB are needed, .* GB are free"):
        cache_pretrained.check_space(tmp_path / "not" / "yet", [(part, files)])
