"""The frozen parts read files in their real format; text equals that of transformers, on one rank and on two."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

from selfe import compare, config
from selfe.distributed import fsdp
from selfe.distributed.collectives import World
from selfe.encoders import t5_clip
from selfe.encoders.flux_vae import FluxVAE
from selfe.encoders.t5_clip import ClipSize, T5Clip, T5Size
from selfe.errors import UserError
from selfe.rng import SampleRNG
from selfe.samplers.euler import Euler
from selfe.types import Batch, TextCond, packed, raise_if_not_finite
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


def captions_of(encoder: T5Clip, lengths: range) -> list[str]:
    """A caption of each number of T5 tokens."""
    captions = {}
    words = " ".join(CAPTIONS).split()
    for count in range(1, len(words)):
        caption = " ".join(words[:count])
        captions.setdefault(len(encoder.t5_ids([caption])[0]), caption)
    return [caption for length, caption in captions.items() if length in lengths]


class CopiesFromHost(TorchDispatchMode):
    """Counts how often a tensor of the host is made or copied to another device; meta stands for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" and result.device.type == "meta":
            self.count += 1
        return result


def test_many_lengths_take_few_calls_and_one_copy(cache):
    """32 captions of more than 20 lengths: one call of T5 for each multiple of 32 tokens, one of CLIP."""
    encoder = loaded(cache)
    captions = captions_of(encoder, range(3, 128))
    captions = (captions[:: max(len(captions) // 32, 1)] + captions)[:32]
    assert len({len(row) for row in encoder.t5_ids(captions)}) > 20

    shapes = {"t5": [], "clip": []}
    for name, calls in shapes.items():
        getattr(encoder, name).register_forward_pre_hook(
            lambda _, args, calls=calls: calls.append(tuple(args[0].shape)), with_kwargs=False
        )
    encoder(captions)
    lengths = sorted({-(-len(row) // 32) * 32 for row in encoder.t5_ids(captions)})
    assert sorted(length for _, length in shapes["t5"]) == lengths
    assert len(lengths) <= 4
    assert shapes["clip"] == [(32, 77)]

    meta = T5Clip(skip_pretrained=True, **SIZES)
    meta.load(torch.device("meta"))
    with CopiesFromHost() as copies:
        meta(captions)
    assert copies.count <= 2  # the ids, and the owners of the packed tokens


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_caption_has_the_same_embedding_beside_any_others(cache, dtype):
    encoder = loaded(cache, dtype=dtype)
    captions = captions_of(encoder, range(3, 70))[::4]
    together = encoder(captions)
    alone = [encoder([caption]) for caption in captions]
    for text, pooled, single in zip(together.text.split(), together.pooled, alone, strict=True):
        assert torch.equal(text, single.text.tokens)
        assert torch.equal(pooled, single.pooled[0])


def test_a_cache_records_how_captions_are_padded(monkeypatch):
    before = compare.describe("text_encoder", T5Clip(**SIZES))
    monkeypatch.setattr(t5_clip, "PAD_MULTIPLE", 64)
    after = compare.describe("text_encoder", T5Clip(**SIZES))
    assert compare.differences(before, after).keys() == {"text_encoder.params.padding"}


def test_random_t5_is_made_tensor_by_tensor_from_names(monkeypatch):
    """In the configured precision; a tensor does not depend on the others, nor on the rows that are read."""
    made = []

    def recorded(name, shape, config, dtype):
        made.append((name, dtype))
        return random_t5(name, shape, config, dtype)

    random_t5 = t5_clip.random_t5
    monkeypatch.setattr(t5_clip, "random_t5", recorded)
    deep, shallow = (
        T5Clip(skip_pretrained=True, **SIZES | {"dtype": "bf16", "t5": T5Size(64, layers, 4, 16, 128)})
        for layers in (2, 1)
    )
    for encoder in (deep, shallow):
        encoder.load(torch.device("cpu"))
    names = [name for name, _ in deep.t5.named_parameters()]
    assert [name for name, _ in made[: len(names)]] == names
    assert {dtype for _, dtype in made} == {torch.bfloat16}
    state = deep.t5.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in shallow.t5.state_dict().items())
    assert state["shared.weight"].float().std() == pytest.approx(1, rel=0.1)
    assert state["encoder.block.1.layer.0.SelfAttention.k.weight"].float().std() == pytest.approx(1 / 8, rel=0.1)


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
    results = on_ranks(2, sharded, str(cache))
    text = packed(results["tokens"], [(1, n) for n in results["lens"].tolist()])
    assert_equals_reference(TextCond(text, results["pooled"]), cache, MIXED)
    kept, after, total = results["kept"].tolist()
    assert kept == after
    assert kept == pytest.approx(total / 2, rel=0.01)


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


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a22486222e1f0\nsize 9524583400\n"


@pytest.mark.parametrize(
    "file",
    [
        "t5-v1_1-xxl/model.safetensors",
        "t5-v1_1-xxl/config.json",
        "t5-v1_1-xxl/spiece.model",
        "t5-v1_1-xxl/tokenizer.json",
        "t5-v1_1-xxl/tokenizer_config.json",
        "clip-vit-large-patch14/vocab.json",
        "clip-vit-large-patch14/merges.txt",
        "ae.safetensors",
    ],
)
def test_a_pointer_of_git_lfs_is_recognised_in_any_file(cache, tmp_path, file):
    copy, path = damaged(cache, tmp_path, file)
    path.write_text(POINTER)
    frozen = FluxVAE(cache_dir=str(copy), width=32) if file == "ae.safetensors" else T5Clip(str(copy), **SIZES)
    with pytest.raises(UserError, match=f"{file}: a git-LFS pointer, not the file itself; run git lfs pull"):
        frozen.load(torch.device("cpu"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("t5-v1_1-xxl/spiece.model", Path.unlink, "spiece.model: no such file, and no tokenizer.json in its place"),
        ("t5-v1_1-xxl/spiece.model", cut, "spiece.model: not a sentencepiece model, the file is damaged"),
        ("t5-v1_1-xxl/spiece.model", empty, "spiece.model: not a sentencepiece model, the file is damaged"),
        ("t5-v1_1-xxl/config.json", Path.unlink, "config.json: no such file"),
        ("t5-v1_1-xxl/config.json", cut, "config.json: not JSON, the file is damaged"),
        ("t5-v1_1-xxl/tokenizer_config.json", cut, "tokenizer_config.json: not JSON, the file is damaged"),
        ("clip-vit-large-patch14/vocab.json", Path.unlink, "vocab.json: no such file"),
        ("clip-vit-large-patch14/vocab.json", cut, "vocab.json: not JSON, the file is damaged"),
        ("clip-vit-large-patch14/merges.txt", Path.unlink, "merges.txt: no such file"),
        ("clip-vit-large-patch14/merges.txt", cut, r"merges.txt: its \d+ merges do not produce the \d+ merged tokens"),
        ("clip-vit-large-patch14/merges.txt", empty, r"merges.txt: its 0 merges do not produce the \d+ merged tokens"),
        ("clip-vit-large-patch14/config.json", Path.unlink, "config.json: no such file"),
    ],
)
def test_missing_and_damaged_files_are_named(cache, tmp_path, file, change: Callable[[Path], None], words):
    copy, path = damaged(cache, tmp_path, file)
    change(path)
    with pytest.raises(UserError, match=f"{path.parent}/{words}.*cache_pretrained_only.sh"):
        loaded(copy)


def foreign_tokenizer(folder: Path, change: str) -> None:
    """Replace a tokenizer by one that transformers loads without an error."""
    t5, clip = folder / "t5-v1_1-xxl", folder / "clip-vit-large-patch14"
    if change == "CLIP's files for T5":
        (t5 / "spiece.model").unlink()
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(clip / name, t5)
    elif change == "CLIP's tokenizer for T5":
        AutoTokenizer.from_pretrained(clip).save_pretrained(t5)
    elif change == "T5's file for CLIP":
        (clip / "vocab.json").unlink()
        shutil.copy(t5 / "spiece.model", clip)
    elif change == "T5's tokenizer for CLIP":
        AutoTokenizer.from_pretrained(t5).save_pretrained(clip)
    elif change == "ids past the embedding":
        vocabulary = json.loads((clip / "vocab.json").read_text())
        (clip / "vocab.json").write_text(json.dumps(vocabulary | {"<|endoftext|>": 49407}))
    else:
        AutoTokenizer.from_pretrained(t5).backend_tokenizer.save(str(t5 / "tokenizer.json"))
        for name in ("spiece.model", "special_tokens_map.json"):
            (t5 / name).unlink()
        description = json.loads((t5 / "tokenizer.json").read_text())
        (t5 / "tokenizer.json").write_text(json.dumps(description | {"post_processor": None}))
        generic = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
        (t5 / "tokenizer_config.json").write_text(json.dumps(generic))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("CLIP's files for T5", "spiece.model: no such file"),
        ("CLIP's tokenizer for T5", r"xxl: the tokenizer does not belong to this model: its ids go up to \d+, the"),
        ("T5's file for CLIP", "vocab.json: no such file"),
        ("T5's tokenizer for CLIP", "patch14: the tokenizer does not belong to this model"),
        ("ids past the embedding", "patch14: the tokenizer does not belong to this model: its ids go up to 49407"),
        ("no end token", r"xxl: the tokenizer does not belong to this model: .* the end token is 1"),
    ],
)
def test_the_tokenizer_of_another_model_is_refused(cache, tmp_path, change, words):
    copy, _ = damaged(cache, tmp_path, "")
    foreign_tokenizer(copy, change)
    with pytest.raises(UserError, match=words):
        loaded(copy)


@pytest.mark.parametrize("encoder", ["t5-v1_1-xxl", "clip-vit-large-patch14"])
@pytest.mark.parametrize(
    ("extra", "dtype", "words"),
    [
        ("scale_weight", torch.float8_e4m3fn, r"scale_weight: the weights are quantised; use the bf16"),
        ("weight_scale", torch.float8_e4m3fn, r"weight_scale: the weights are quantised"),
        ("SCB", torch.int8, r"SCB: the weights are quantised"),
        ("weight.absmax", torch.uint8, r"weight.absmax: the weights are quantised"),
        ("weight.quant_state.bitsandbytes__nf4", torch.uint8, r"bitsandbytes__nf4: the weights are quantised"),
        (None, torch.int8, r"\.weight: stored as I8, the weights are quantised"),
        ("config", torch.float8_e4m3fn, r"config.json: quantization_config: the weights are quantised"),
    ],
)
def test_quantised_encoders_are_refused(cache, tmp_path, encoder, extra, dtype, words):
    copy, path = damaged(cache, tmp_path, f"{encoder}/model.safetensors")
    state = load_file(path)
    names = {
        "t5-v1_1-xxl": "encoder.block.0.layer.0.SelfAttention.k.weight",
        "clip-vit-large-patch14": "text_model.encoder.layers.0.self_attn.k_proj.weight",
    }
    name = names[encoder]
    state[name] = state[name].to(dtype)
    if extra == "config":
        config = json.loads((path.parent / "config.json").read_text())
        (path.parent / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_8bit": True}}))
    elif extra:
        state[name.replace("weight", extra, 1)] = torch.ones(1)
    save_file(state, path)
    with pytest.raises(UserError, match=f"{path.parent}/.*{words}"):
        loaded(copy)


def test_encoders_in_any_floating_point_format_load(cache, tmp_path):
    """fp16 and plain fp8, under another file name."""
    copy, path = damaged(cache, tmp_path, "t5-v1_1-xxl/model.safetensors")
    state = load_file(path)
    plain = {name: tensor.to(torch.float8_e4m3fn if ".k." in name else torch.float16) for name, tensor in state.items()}
    save_file(plain, path.with_name("t5xxl_fp8.safetensors"))
    path.unlink()
    clip = copy / "clip-vit-large-patch14/model.safetensors"
    clip.rename(clip.with_name("clip_l.safetensors"))
    expected, close = loaded(cache)(MIXED), loaded(copy)(MIXED)
    assert torch.equal(expected.pooled, close.pooled)
    assert torch.cosine_similarity(expected.text.tokens, close.text.tokens).min() > 0.98


def test_other_sizes_are_one_line(cache):
    with pytest.raises(UserError, match=r"num_layers is 2, system.text_encoder.params expects 24"):
        loaded(cache, t5=T5Size(d_model=64))


def test_infinite_numbers_name_the_caption_image_or_prompt():
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

    value = 0.0
    loss = system.loss(constant, constant, batch, SampleRNG.of_step(0, 0, (0, 1)), 0)
    with pytest.raises(UserError, match=r"dog.jpg: system.autoencoder returns infinite"):
        raise_if_not_finite(loss.checks)
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
