"""The frozen parts read files in their real format; text equals that of transformers, on one rank and cut over two."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

from selfe import config
from selfe.distributed import fsdp
from selfe.distributed.collectives import World
from selfe.encoders.flux_vae import FluxVAE
from selfe.encoders.t5_clip import ClipSize, T5Clip, T5Size
from selfe.rng import SampleRNG
from selfe.samplers.euler import Euler
from selfe.types import Batch, TextCond, UserError, packed
from tests.helpers.encoder_files import CAPTIONS, ROOT, write_cache
from tests.helpers.ranks import on_ranks

SKIP = [f"system.{part}.params.skip_pretrained=true" for part in ("text_encoder", "autoencoder")]
MIXED = ["a cup of coffee", "", *CAPTIONS[:3], "a red cat", "a cup of coffee", "a cat"]
SIZES = {
    "t5": T5Size(d_model=64, num_layers=2, num_heads=4, d_kv=16, d_ff=128),
    "clip": ClipSize(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
    "dtype": "fp32",
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache"))


def loaded(cache: Path, shard=None, **changes) -> T5Clip:
    encoder = T5Clip(cache_dir=str(cache), **SIZES | changes)
    encoder.load(torch.device("cpu"), shard)
    return encoder


@torch.no_grad()
def reference(cache: Path, captions: list[str]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """transformers' own classes, caption by caption."""
    texts, pooled = [], []
    for name, kind, results in (
        ("t5-v1_1-xxl", T5EncoderModel, texts),
        ("clip-vit-large-patch14", CLIPTextModel, pooled),
    ):
        tokenizer = AutoTokenizer.from_pretrained(cache / name)
        model = kind.from_pretrained(cache / name).eval()
        for caption in captions:
            output = model(**tokenizer(caption, return_tensors="pt", truncation=True))
            results.append(output.last_hidden_state[0] if results is texts else output.pooler_output[0])
    return texts, pooled


def assert_equals_reference(cond: TextCond, cache: Path, captions: list[str]) -> None:
    texts, pooled = reference(cache, captions)
    assert cond.text.lens == tuple(map(len, texts))
    assert len(set(cond.text.lens)) > 3
    for ours, theirs in zip(cond.text.split(), texts, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(cond.pooled, torch.stack(pooled), rtol=0, atol=1e-5)
    assert cond.pooled.unique(dim=0).shape[0] == len(set(captions))


def test_text_equals_transformers_for_mixed_lengths(cache):
    assert_equals_reference(loaded(cache)(MIXED), cache, MIXED)


def sharded(world: World, cache: str) -> dict[str, torch.Tensor]:
    """Rank 1 has other captions, and at last none at all: the number of calls must not depend on them."""
    mesh = fsdp.make_mesh(world, None)

    def shard(module, blocks, read) -> None:
        fsdp.load_sharded(module, blocks, read, mesh=mesh)

    encoder = loaded(Path(cache), shard)
    assert all(isinstance(p, DTensor) for p in encoder.t5.parameters())
    kept = sum(p.to_local().numel() for p in encoder.t5.parameters())
    cond = encoder(MIXED if world.is_main else ["a cat"])
    encoder(MIXED[:2] if world.is_main else ["", ""])
    after = sum(fsdp.local(p).numel() for p in encoder.t5.parameters())
    return {
        "tokens": cond.text.tokens,
        "lens": torch.tensor(cond.text.lens),
        "pooled": cond.pooled,
        "kept": torch.tensor([kept, after, sum(p.numel() for p in encoder.t5.parameters())]),
    }


def test_sharded_text_equals_transformers(cache):
    found = on_ranks(2, sharded, str(cache))
    text = packed(found["tokens"], [(1, n) for n in found["lens"].tolist()])
    assert_equals_reference(TextCond(text, found["pooled"]), cache, MIXED)
    kept, after, whole = found["kept"].tolist()
    assert kept == after
    assert kept == pytest.approx(whole / 2, rel=0.01)


def test_too_long_captions_are_cut_counted_and_said_once(cache, caplog):
    encoder = loaded(cache, max_tokens=8)
    long, short = CAPTIONS[0] * 3, "a cat"
    with caplog.at_level(logging.WARNING):
        cond = encoder([long, short])
        encoder([long, short])
    assert cond.text.lens[0] == 8
    assert encoder.t5_ids([long])[0][-1] == encoder.t5_tokenizer.eos_token_id
    assert encoder.num_cut == 3
    assert len([record for record in caplog.records if "truncated to 8" in record.getMessage()]) == 1


def damaged(cache: Path, tmp_path: Path, file: str) -> tuple[Path, Path]:
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    return copy, copy / file


@pytest.mark.parametrize(
    "file", ["t5-v1_1-xxl/model.safetensors", "clip-vit-large-patch14/model.safetensors", "ae.safetensors"]
)
@pytest.mark.parametrize("damage", ["missing", "cut short", "foreign", "one tensor missing"])
def test_damaged_files_are_one_line(cache, tmp_path, file, damage):
    copy, path = damaged(cache, tmp_path, file)
    if damage == "missing":
        path.unlink()
    elif damage == "cut short":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "foreign":
        path.write_text("version https://git-lfs.github.com/spec/v1")
    else:
        state = load_file(path)
        dropped = [
            name for name in state if ("encoder." in name or "text_model.encoder" in name) and name.endswith(".weight")
        ]
        del state[dropped[0]]
        save_file(state, path)
    part = FluxVAE(cache_dir=str(copy), width=32) if file == "ae.safetensors" else T5Clip(cache_dir=str(copy), **SIZES)
    with pytest.raises(UserError) as error:
        part.load(torch.device("cpu"))
    message = str(error.value)
    assert "\n" not in message
    assert str(path.parent) in message
    assert "cache_pretrained_only.sh" in message


def test_missing_tokenizer_and_other_sizes_are_one_line(cache, tmp_path):
    copy, path = damaged(cache, tmp_path, "t5-v1_1-xxl/spiece.model")
    path.unlink()
    with pytest.raises(UserError, match="t5-v1_1-xxl: the tokenizer's files are missing"):
        loaded(copy)
    with pytest.raises(UserError, match=r"num_layers is 2, system.text_encoder.params expects 24"):
        loaded(cache, t5=T5Size(d_model=64))


def test_infinite_numbers_name_the_caption_picture_or_prompt():
    with torch.device("meta"):
        system = config.build(config.load(ROOT / "configs/debug/selfe_smoke.yaml", SKIP), "system")
    system.load_encoders(torch.device("cpu"))
    batch = Batch(
        images=(torch.zeros(3, 16, 16), torch.full((3, 16, 16), torch.inf)),
        prompts=("a cat", "a dog"),
        positions=(0, 1),
        names=("cat.jpg", "dog.jpg"),
    )

    def constant(x, t, s, cond):
        return torch.full_like(x.tokens, value)

    with pytest.raises(UserError, match=r"dog.jpg: system.autoencoder returns infinite"):
        system.loss(constant, constant, batch, SampleRNG.of_step(0, 0, (0, 1)), 0)
    arguments = {"sampler": Euler(), "num_steps": 1, "cfg_scale": 1.0, "s_ratio": 0.0}
    rng = SampleRNG.of_images([(0, "a cat", 0)])
    value = torch.nan
    with pytest.raises(UserError, match=r"a cat: the denoiser returns infinite"):
        system.generate(constant, ["a cat"], [(16, 16)], rng, **arguments)
    value = 0.0
    system.autoencoder.net["decoder"].conv_out.bias[0] = torch.inf
    with pytest.raises(UserError, match=r"a cat: system.autoencoder returns infinite"):
        system.generate(constant, ["a cat"], [(16, 16)], rng, **arguments)
    dog = system.text_encoder.t5_ids(["dog"])[0][0]
    system.text_encoder.t5.shared.weight[dog] = torch.inf
    with pytest.raises(UserError, match=r"dog: system.text_encoder returns infinite"):
        system.encode({"cond": ["cat", "dog", "cat"]})
