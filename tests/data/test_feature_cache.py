"""Training from a cache of latents and captions equals training from images, and a stale cache is refused."""

import argparse
import copy
import json
import math
import os
import pickle
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from selfe import config
from selfe.data.buckets import balance
from selfe.data.manifest import ManifestData
from selfe.distributed.collectives import World
from selfe.encoders.latent_preview import LatentPreview
from selfe.errors import BadSample, UserError
from selfe.io import feature_cache, image_encode
from selfe.rng import SampleRNG, philox
from selfe.tools import precompute
from selfe.training.evaluation import Evaluator
from selfe.types import packed
from tests.helpers.images import make_image, manifest
from tests.helpers.ranks import on_ranks

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "configs/debug/selfe_smoke.yaml")
CPU = torch.device("cpu")
OPTIONS = argparse.Namespace(workers=0, batch_size=4, one_sample=False)


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    """The smoke system on 12 small images of several shapes, at two budgets, mirrored, with validation."""
    folder = tmp_path_factory.mktemp("images")
    path = manifest(folder, [(32, 32), (24, 48), (64, 40), (80, 80)] * 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SELFE_SKIP_PRETRAINED", "1")
        settings = config.load(SMOKE, [f"data.params.train_manifest={path}", f"data.params.val_manifest={path}"])
    params = settings["data"]["params"]
    params |= {"base_dir": str(folder), "pixels": 1024, "flip": True}
    params |= {"phases": [{"step": 2, "pixels": [1024, 4096], "shares": [1, 1]}]}
    return settings


def build(settings: dict) -> tuple:
    with torch.device("meta"):
        system = config.build(settings, "system")
    return system, config.build(settings, "data"), config.build(settings, "trainer")


def encode(settings: dict, out: Path, world: World, options: argparse.Namespace = OPTIONS) -> None:
    precompute.encode_all(settings, out, options, world)


@pytest.fixture(scope="module")
def cached(settings, tmp_path_factory) -> dict:
    """The settings of training from a cache, which is made."""
    out = tmp_path_factory.mktemp("cache") / "all"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precompute, "LATENTS_PER_SHARD", 16)
        patch.setattr(precompute, "CAPTIONS_PER_SHARD", 4)
        patch.setattr(precompute.collectives, "barrier", lambda: None)
        encode(settings, out, World(0, 1, CPU))
    return config.load(out / "config.yaml")


def encode_on(world: World, settings: dict, out: str) -> dict:
    precompute.LATENTS_PER_SHARD, precompute.CAPTIONS_PER_SHARD = 16, 4
    encode(settings, Path(out), world)
    return {}


@torch.no_grad()
def losses(settings: dict) -> list[torch.Tensor]:
    """Loss per sample of 12 steps through all phases of the smoke run, then of a validation batch."""
    system, data, _ = build(settings)
    system.backbone.to_empty(device=CPU)
    for name, p in system.backbone.named_parameters():
        p.copy_(system.backbone.initial(name, p.shape, 0))
        p.add_(torch.linspace(-0.05, 0.05, p.numel()).view_as(p))  # away from the zeros of the start
    system.load_encoders(CPU)
    values = []
    for step, split in [*((step, "train") for step in range(12)), (0, "val")]:
        positions = balance(data.costs(0, step, range(step * 8, (step + 1) * 8), split), 1, 8, 2)[0][0]
        batch = data.batch(0, step, range(step * 8, (step + 1) * 8), positions, split).to(CPU)
        rng = SampleRNG.of_step(0, step, batch.positions)
        values.append(system.loss(system.backbone, system.backbone, batch, rng, step).per_sample)
    return values


def test_losses_from_the_cache_are_those_from_images_step_by_step(settings, cached):
    expected, actual = losses(settings), losses(cached)
    assert len(actual) == 13
    for step, (a, b) in enumerate(zip(expected, actual, strict=True)):
        torch.testing.assert_close(b, a, rtol=2**-7, atol=0, msg=lambda text, step=step: f"step {step}: {text}")
    assert max((a - b).abs().max() for a, b in zip(expected, actual, strict=True)) > 0  # they are rounded


def test_training_from_the_cache_loads_no_encoder(cached):
    system, data, trainer = build(cached)
    system.load_encoders(CPU)
    assert not hasattr(system.text_encoder, "t5")
    assert vars(system.autoencoder)["autoencoder"].device.type == "meta"
    assert trainer.samples.prompts == ("an astronaut", "a cup of coffee")
    assert data.has_val


def test_sample_grids_from_the_cache_are_linear_previews(settings, cached, monkeypatch, alone):
    """From the noise of the autoencoder, which is not loaded."""
    system, _, trainer = build(cached)
    system.load_encoders(CPU)
    source = build(settings)[0].autoencoder
    source.load(CPU)
    rng = SampleRNG.of_images([(0, "an astronaut", 0)])
    expected, noise = (part.noise([(32, 48)], rng) for part in (source, system.autoencoder))
    assert torch.equal(noise.tokens, expected.tokens)
    assert noise.grids == expected.grids
    with pytest.raises(UserError, match="size 40 x 48: height and width must be multiples of 16"):
        system.autoencoder.noise([(40, 48)], rng)

    net = system.backbone.to_empty(device=CPU)
    for name, p in net.named_parameters():
        p.data.copy_(net.initial(name, p.shape, 0))
    titles = []
    draw = image_encode.sample_sheet

    def sample_sheet(*arguments):
        titles.append(arguments[-1])
        return draw(*arguments)

    monkeypatch.setattr(image_encode, "sample_sheet", sample_sheet)
    small = replace(trainer.samples, size=(32, 48), num_steps=(1,))
    small.check(system)
    sheets = small.draw(system, {"ema": net}, 0, 5, alone)
    assert sheets.keys() == {"ema"}
    assert titles == ["EMA weights, step 5, guidance 5, s ratio 0, linear preview of latents"]

    # a preview is not evaluated
    evaluator = SimpleNamespace(cfg=SimpleNamespace(section="trainer.evaluate"), world=alone, system=system)
    with pytest.raises(UserError, match=r"trainer.evaluate: .* a linear preview cannot be evaluated; set system.auto"):
        Evaluator.prepare(evaluator)

    path = Path(cached["data"]["params"]["cache_dir"]) / "preview.safetensors"
    moved = path.rename(path.with_name("away"))
    del system.autoencoder.preview
    with pytest.raises(
        UserError, match=r"preview.safetensors: no such file; run selfe precompute again, which adds it"
    ):
        small.check(system)
    moved.rename(path)


def test_a_preview_is_the_least_squares_fit_of_pixels_to_latents():
    """Compared with NumPy's solution, for images of two shapes; its PSNR is that of what it decodes."""
    rng = philox("preview")
    samples = []
    for rows, columns in [(4, 6), (5, 5), (6, 3)]:
        image = torch.from_numpy(rng.uniform(-1, 1, (3, 2 * rows, 2 * columns)))
        patches = image.view(3, rows, 2, columns, 2).permute(1, 3, 0, 2, 4).flatten(2)
        mixed = patches @ torch.from_numpy(philox("mix").standard_normal((12, 5))) + 0.3
        samples.append((mixed, image))
    preview = LatentPreview.fit(iter(samples))

    inputs = np.concatenate([latents.flatten(0, 1).numpy() for latents, _ in samples])
    inputs = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
    patches = [
        image.view(3, image.shape[1] // 2, 2, image.shape[2] // 2, 2).permute(1, 3, 0, 2, 4).reshape(-1, 12)
        for _, image in samples
    ]
    targets = torch.cat(patches).numpy()
    solution = np.linalg.lstsq(inputs, targets, rcond=None)[0]
    assert preview.side == 2
    np.testing.assert_allclose(preview.weight.T, solution[:-1], atol=1e-3)
    np.testing.assert_allclose(preview.bias, solution[-1], atol=1e-3)

    tokens = packed(torch.cat([latents.flatten(0, 1) for latents, _ in samples]).float(), [(4, 6), (5, 5), (6, 3)])
    decoded = preview.decode(tokens)
    errors = torch.cat([(a - b).square().flatten() for a, (_, b) in zip(decoded, samples, strict=True)])
    assert preview.psnr == pytest.approx(10 * math.log10(4 / errors.mean().item()), abs=0.01)
    assert preview.psnr > 5


def test_the_cache_holds_each_caption_once_and_null_and_fake_prompts(cached):
    folder = Path(cached["data"]["params"]["cache_dir"])
    text = feature_cache.Store(folder / "text")
    for caption in ("", "fake image ", "drawing 3", "fake image drawing 3", "an astronaut"):
        assert text.read(feature_cache.digest(caption), caption).shape == (1, len(caption.encode()) + 1, 64)
    assert len(text.records) == 2 * (12 + 1 + 2)  # images, null, samples; each also with the prefix of a fake image
    latents = feature_cache.Store(folder / "latents")
    assert len(latents.records) == 12 * (2 * 2 + 1)  # two budgets, mirrored or not; validation at one
    system, _, _ = build(cached)
    system.load_encoders(CPU)
    with pytest.raises(BadSample, match=r"does not contain the caption 'never seen'; run selfe precompute"):
        system.text_encoder(["drawing 3", "never seen"])


def test_captions_read_in_the_workers_are_those_of_the_step(cached, monkeypatch):
    system, data, _ = build(cached)
    system.load_encoders(CPU)
    batch = data.batch(0, 5, range(40, 48), range(8), "train")
    read = pickle.loads(pickle.dumps(system.caption_reader(seed=0)))
    text = read(batch.prompts, batch.positions, 5)
    captions = system.objective.captions(batch.prompts, SampleRNG.of_step(0, 5, batch.positions), 5)
    expected = system.encode(captions)
    monkeypatch.delattr(type(system.text_encoder), "__call__")  # the main process reads nothing
    for name, cond in system.encode_unchecked(captions, text)[0].items():
        assert torch.equal(cond.text.tokens, expected[name].text.tokens)
        assert torch.equal(cond.pooled, expected[name].pooled)
        assert cond.text.grids == expected[name].text.grids


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "system.text_encoder.params.encoder.params.max_tokens",
            "64",
            "text_encoder.params.max_tokens was 512, is now 64",
        ),
        (
            "system.autoencoder.params.autoencoder.params.latent",
            "mean",
            "autoencoder.params.latent was sample, is now mean",
        ),
        ("data.params.source.params.multiple", "32", "data.multiple was 16, is now 32"),
        ("data.params.source.params.pixels", "2048", r"data.pixels was \[1024, 4096\], is now \[1024, 2048, 4096\]"),
    ],
)
def test_a_stale_cache_says_what_changed(cached, key, value, message):
    folder = Path(cached["data"]["params"]["cache_dir"])
    settings = config.load(folder / "config.yaml", [f"{key}={value}"])
    with pytest.raises(UserError, match=message):
        build(settings)


class Mirrored(ManifestData):
    """Reads other images than its base class from the same manifest."""


def test_another_class_of_data_makes_the_cache_stale(cached):
    settings = copy.deepcopy(cached)
    settings["data"]["params"]["source"]["module"] = f"{__name__}.Mirrored"
    with pytest.raises(UserError, match=rf"data.module was selfe.data.manifest.ManifestData, is now {__name__}.Mirror"):
        build(settings)


def test_a_changed_manifest_makes_the_cache_stale(cached, tmp_path):
    path = Path(cached["data"]["params"]["source"]["params"]["train_manifest"])
    other = tmp_path / "other.tsv"
    other.write_text(path.read_text().replace("drawing 3\n", "drawing three\n"))
    key = "data.params.source.params.train_manifest"
    with pytest.raises(UserError, match=r"data.train_manifest\[0\] was"):
        build(config.load(Path(cached["data"]["params"]["cache_dir"]) / "config.yaml", [f"{key}={other}"]))


def test_interrupted_and_continued_by_two_processes_is_the_same_cache(settings, cached, tmp_path):
    complete = Path(cached["data"]["params"]["cache_dir"])
    out = tmp_path / "cache"
    (out / "latents").mkdir(parents=True)
    (out / "fingerprint.json").write_text((complete / "fingerprint.json").read_text())
    first = feature_cache.shard_path(complete / "latents", 0)
    (out / "latents" / first.name).write_bytes(first.read_bytes())
    stamp = (out / "latents" / first.name).stat().st_mtime_ns
    with pytest.raises(UserError, match="no complete cache"):
        feature_cache.Store(out / "latents")
    on_ranks(2, encode_on, settings, str(out))
    assert (out / "latents" / first.name).stat().st_mtime_ns == stamp
    for name in ("latents", "text", "pooled"):
        stores = feature_cache.Store(complete / name), feature_cache.Store(out / name)
        keys, others = (store.records[["high", "low"]].tolist() for store in stores)
        assert keys == others
        for high, low in keys:
            a, b = (store.read(f"{high:016x}{low:016x}", name) for store in stores)
            torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-4)
    other = settings | {"data": settings["data"] | {"params": settings["data"]["params"] | {"flip": False}}}
    with pytest.raises(UserError, match=r"data\.flip was True, is now False"):
        encode(other, out, World(0, 1, CPU))


def test_images_that_were_replaced_are_encoded_again_and_training_warns(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(precompute, "LATENTS_PER_SHARD", 8)
    monkeypatch.setattr(precompute.collectives, "barrier", lambda: None)
    path = manifest(tmp_path, [(32, 32)] * 12)
    files = [tmp_path / f"train_{i:04d}.jpg" for i in range(12)]
    parts = {
        "data.params": f"{{train_manifest: '{path}', base_dir: '{tmp_path}', val_manifest: null, pixels: 1024}}",
        "data.params.on_bad_image": "replace",
        "system.autoencoder": "{module: selfe.encoders.identity.Identity, params: {patch: 4}}",
        "system.text_encoder": "{module: selfe.encoders.words.Words, params: {dim: 64}}",
        "system.backbone.params.patch_dim": "48",
        "system.backbone.params.pooled_dim": "64",
    }
    settings = config.load(SMOKE, [f"{key}={value}" for key, value in parts.items()])
    out = tmp_path / "cache"

    def run() -> tuple[dict[int, torch.Tensor], str, str]:
        """Encode; returns the entries by image, what was printed, and what training would print."""
        encode(settings, out, World(0, 1, CPU))
        data = config.build(config.load(out / "config.yaml"), "data")
        entries = {}
        for i in range(12):
            with suppress(BadSample):
                entries[i] = data.latents.read(feature_cache.latent_key("train", 0, i, (32, 32), False), str(i))
        return entries, capsys.readouterr().out, data.changed_images()

    first, printed, _ = run()
    assert "have changed" not in printed

    # new content under an old name, the same content with another time, and a file that is damaged
    make_image(100, (32, 32)).save(files[3])
    os.utime(files[5], ns=(1, 1))
    content = files[9].read_bytes()
    files[9].write_bytes(content[:300])
    data = config.build(config.load(out / "config.yaml"), "data")
    assert f"2 of 12 images that were compared have changed since they were encoded, the first is {files[3]}" in (
        data.changed_images()
    )
    shards = {shard: shard.read_bytes() for shard in (out / "latents").glob("*.safetensors")}
    second, printed, warning = run()
    assert "2 cached images have changed; encoding them again" in printed
    assert warning == ""
    assert all(shard.read_bytes() == before for shard, before in shards.items())
    assert sorted(second) == [i for i in range(12) if i != 9]
    assert [i for i in second if not torch.equal(second[i], first[i])] == [3]

    # nothing to do; then the damaged file is repaired
    assert "have changed" not in run()[1]
    files[9].write_bytes(content)
    third, printed, _ = run()
    assert "1 cached images have changed" in printed
    assert torch.equal(third[9], first[9])
    assert torch.equal(third[3], second[3])


def test_one_sample_is_half_the_size(settings, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(precompute.collectives, "barrier", lambda: None)
    options = argparse.Namespace(workers=0, batch_size=4, one_sample=True)
    encode(settings, tmp_path / "cache", World(0, 1, CPU), options)
    store = feature_cache.Store(tmp_path / "cache" / "latents")
    assert set(store.records["width"].tolist()) == {64}
    printed = capfd.readouterr().out
    assert "60 images" in printed
    size = sum(path.stat().st_size for path in (tmp_path / "cache" / "latents").glob("*.safetensors"))
    tokens = int((store.records["rows"].astype(int) * store.records["columns"]).sum())
    assert f"60 images take {tokens * 64 * 2 / 1e6:.2f} MB" in printed
    assert size - 60 * 200 < tokens * 64 * 2 < size
    assert json.loads((tmp_path / "cache" / "fingerprint.json").read_text())["precompute.one_sample"] == "True"


def test_a_full_disk_is_told_before_the_work_starts(settings, tmp_path, monkeypatch):
    usage = argparse.Namespace(free=1000)
    monkeypatch.setattr(precompute.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(precompute.collectives, "barrier", lambda: None)
    with pytest.raises(UserError, match=r"the disk lacks 0\.\d+ MB"):
        encode(settings, tmp_path / "cache", World(0, 1, CPU))
    assert not list((tmp_path / "cache").glob("*/*"))
