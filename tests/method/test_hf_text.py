"""Text encoders of Hugging Face: tokens equal those of transformers, for every family, on one rank and on two."""

import argparse
import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForTextEncoding, AutoTokenizer, CLIPTextModel

from selfe import cli, compare, config, packaged
from selfe.distributed import fsdp
from selfe.distributed.collectives import World
from selfe.encoders.composed_text import ComposedText
from selfe.encoders.hf_text import HFText, blocks_of
from selfe.encoders.t5_clip import ClipSize, T5Clip, T5Size
from selfe.encoders.words import Words
from selfe.errors import UserError
from selfe.rng import SampleRNG
from selfe.samplers.euler import Euler
from selfe.tools import precompute, probe_text
from tests.helpers import train_processes
from tests.helpers.encoder_files import CAPTIONS, write_text_model
from tests.helpers.ranks import on_ranks
from tests.method.test_pretrained import CopiesFromHost

FAMILIES = ("t5", "clip", "bert", "qwen3", "gemma3", "t5gemma")
MIXED = [CAPTIONS[0], "a red cat", *CAPTIONS[1:3], "a cup of coffee", "a cat", "a red cat"]
WIDTH = {"t5": 64}  # of the others 32
CPU, META = torch.device("cpu"), torch.device("meta")

MINILM = "sentence-transformers/all-MiniLM-L6-v2"  # installed as a package
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        write_text_model(root / family, family)
    return root


def loaded(folders: Path, family: str, shard=None, **changes) -> HFText:
    settings = {"text_dim": WIDTH.get(family, 32), "cache_dir": folders, "max_tokens": 64, "dtype": "fp32"}
    encoder = HFText(family, **settings | changes)
    encoder.load(CPU, shard)
    return encoder


def copied(folders: Path, tmp_path: Path, family: str = "bert") -> Path:
    return Path(shutil.copytree(folders / family, tmp_path / family))


class Reference:
    """transformers' own classes, caption by caption."""

    def __init__(self, folder: Path):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        if folder.name == "clip":
            self.net = CLIPTextModel.from_pretrained(folder).eval()
        elif folder.name in ("t5", "t5gemma"):
            self.net = AutoModelForTextEncoding.from_pretrained(folder, is_encoder_decoder=False).eval()
        else:
            self.net = AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def __call__(self, text: str):
        return self.net(**self.tokenizer(text, return_tensors="pt"), output_hidden_states=True)


def assert_near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_pooled_vectors_equal_those_of_transformers(folders, family):
    cond, reference = loaded(folders, family)(MIXED), Reference(folders / family)
    outputs = [reference(caption).last_hidden_state[0] for caption in MIXED]
    assert cond.text.lens == tuple(map(len, outputs))
    assert len(set(cond.text.lens)) > 3
    for tokens, output in zip(cond.text.split(), outputs, strict=True):
        assert_near(tokens, output)
    assert_near(cond.pooled, torch.stack([output.mean(dim=0) for output in outputs]))


@pytest.mark.parametrize("family", ["gemma3", "t5gemma"])
def test_captions_within_the_sliding_window_need_no_mask_of_the_model(folders, tmp_path, family):
    folder = copied(folders, tmp_path, family)
    described = json.loads((folder / "config.json").read_text())
    for part in (described, described.get("encoder", {})):
        part["sliding_window"] = 128
    (folder / "config.json").write_text(json.dumps(described))

    encoder, reference = loaded(tmp_path, family), Reference(folder)
    assert encoder.window == 64
    for caption, tokens in zip(MIXED, encoder(MIXED).text.split(), strict=True):
        assert_near(tokens, reference(caption).last_hidden_state[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_several_layers_are_concatenated(folders, family):
    """0 is the embedding; the last layer is the output of the model, for CLIP after its final norm."""
    num_blocks = {"t5": 2, "clip": 2}.get(family, 3)
    layers = (0, -2, num_blocks, -1)
    cond = loaded(folders, family, layers=layers, text_dim=4 * WIDTH.get(family, 32), pooling="none")(MIXED[:2])
    reference = Reference(folders / family)
    for caption, tokens in zip(MIXED[:2], cond.text.split(), strict=True):
        output = reference(caption)
        last, states = output.last_hidden_state, output.hidden_states
        assert len(states) == num_blocks + 1
        assert_near(tokens, torch.cat([states[0], states[-2], last, last], dim=-1)[0])
    assert cond.pooled.shape == (2, 1)
    assert not cond.pooled.any()


@pytest.mark.parametrize("family", ["bert", "qwen3", "gemma3"])
def test_blocks_behind_the_last_layer_are_not_computed(folders, family):
    """One block more than needed is: its input is the state before the final norm of the model."""
    short, full = loaded(folders, family, layers=-3), loaded(folders, family, layers=(1, -1), text_dim=64)
    assert (len(blocks_of(short.net)), len(blocks_of(full.net))) == (2, 3)
    assert torch.equal(short(MIXED).text.tokens, full(MIXED).text.tokens[:, :32])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_caption_has_the_same_codes_beside_any_others(folders, family, dtype):
    encoder = loaded(folders, family, dtype=dtype)
    captions = [*MIXED, "", " ".join(CAPTIONS)[:150]]
    together = encoder(captions)
    for caption, tokens, pooled in zip(captions, together.text.split(), together.pooled, strict=True):
        alone = encoder([caption])
        assert torch.equal(tokens, alone.text.tokens)
        assert torch.equal(pooled, alone.pooled[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_on_the_meta_device_are_those_of_the_network(folders, family):
    """For the plan: as many FLOPs, and shapes of the same numbers of tokens, from config.json and the tokenizer."""
    real = loaded(folders, family, layers=(1, 2), text_dim=2 * WIDTH.get(family, 32), template="a {}")
    meta = HFText(
        family, 2 * WIDTH.get(family, 32), folders, layers=(1, 2), template="a {}", max_tokens=64, dtype="fp32"
    )
    meta.load(META)
    counts = []
    for encoder in (real, meta):
        with FlopCounterMode(display=False) as counter:
            cond = encoder(MIXED)
        counts.append((counter.get_total_flops(), cond.text.lens, cond.pooled.shape))
    assert counts[0] == counts[1]
    assert counts[0][0] > 0


@pytest.mark.parametrize("family", ["bert", "gemma3"])
def test_many_lengths_take_few_calls_and_one_copy(folders, family):
    encoder = loaded(folders, family)
    words = " ".join(CAPTIONS).split()
    captions = [" ".join(words[:count]) for count in range(1, 33)]
    lengths = [len(row.ids) for row in encoder.rows(captions)]
    assert len(set(lengths)) > 20

    calls = []
    encoder.net.register_forward_pre_hook(
        lambda _, args, keywords: calls.append(tuple(keywords["input_ids"].shape)), with_kwargs=True
    )
    encoder(captions)
    assert sorted(length for _, length in calls) == sorted({-(-length // 32) * 32 for length in lengths})

    meta = HFText(family, 32, folders, max_tokens=64)
    meta.load(META)
    with CopiesFromHost() as copies:
        meta(captions)
    assert copies.count <= 2  # the ids, and the owners of the packed tokens


@pytest.mark.parametrize("family", ["bert", "qwen3", "gemma3"])
def test_tokens_of_a_template_are_dropped(folders, family):
    """What remains are the states of the caption's tokens among all of the template."""
    template, caption = "Describe the {}, please", "cup of coffee {"
    plain = loaded(folders, family, template=template, pooling="last")([caption])
    more = loaded(folders, family, template=template, pooling="last", keep_suffix=True)([caption])

    text = "Describe the cup of coffee {, please"
    output = Reference(folders / family)(text).last_hidden_state[0]
    tokenizer = AutoTokenizer.from_pretrained(folders / family)
    kept = [
        index
        for index, (begin, end) in enumerate(tokenizer(text, return_offsets_mapping=True)["offset_mapping"])
        if begin < end and end > len("Describe the ") and begin < len("Describe the cup of coffee {")
    ]
    assert_near(plain.text.tokens, output[kept])
    assert_near(more.text.tokens, output[kept[0] :])
    assert_near(plain.pooled[0], output[-1])
    assert len(kept) < len(more.text.tokens) < len(output)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_null_prompt_has_at_least_one_token(folders, family):
    for template in ("{}", "Describe {}", "{}, please"):
        assert min(loaded(folders, family, template=template)(["", " ", "a cat"]).text.lens) >= 1


@pytest.mark.parametrize(
    ("pooling", "vector"),
    [
        ("mean", lambda output: output.last_hidden_state[0].mean(dim=0)),
        ("first", lambda output: output.last_hidden_state[0, 0]),
        ("last", lambda output: output.last_hidden_state[0, -1]),
        ("pooler", lambda output: output.pooler_output[0]),
    ],
)
@pytest.mark.parametrize("family", ["bert", "clip"])
def test_pooled_vectors(folders, family, pooling, vector):
    reference = Reference(folders / family)
    wanted = torch.stack([vector(reference(caption)) for caption in MIXED])
    assert_near(loaded(folders, family, pooling=pooling)(MIXED).pooled, wanted)
    if pooling == "pooler":  # of the last layer, whatever the layer of the tokens
        assert_near(loaded(folders, family, pooling=pooling, layers=1)(MIXED).pooled, wanted)


def test_pooled_vectors_are_scaled(folders):
    plain, unit, rms = (
        loaded(folders, "qwen3", pooling="last", pooled_norm=norm)(MIXED).pooled for norm in ("none", "unit", "rms")
    )
    assert_near(unit, plain / plain.norm(dim=1, keepdim=True))
    assert_near(rms, plain / plain.square().mean(dim=1, keepdim=True).sqrt())


def test_tokens_are_scaled(folders):
    plain, scaled = (loaded(folders, "gemma3", token_norm=norm)(MIXED).text.tokens for norm in ("none", "rms"))
    assert_near(scaled, plain / plain.square().mean(dim=1, keepdim=True).sqrt())


def test_long_captions_are_truncated_before_the_end_of_the_template(folders, caplog):
    encoder, roomy = (
        loaded(folders, "bert", max_tokens=number, template="a photo of {}, high quality") for number in (4, 64)
    )
    cond = encoder(["a cat on a red chair", "a cat"])
    assert cond.text.lens == (4, 2)
    assert torch.equal(cond.text.split()[0], encoder(["a cat on a"]).text.tokens)
    (num_tokens,) = roomy(["a cat on a red chair"]).text.lens
    assert encoder.num_cut == 1
    assert f"truncated to 4 tokens; first one ({num_tokens} tokens)" in caplog.text

    ends = loaded(folders, "bert", max_tokens=4)
    ids = ends.rows(["a cat on a red chair"])[0].ids
    tokenizer = AutoTokenizer.from_pretrained(folders / "bert")
    assert ids == tokenizer("a cat on a red chair", truncation=True, max_length=4)["input_ids"]


SHARDED = ("qwen3", "gemma3", "bert")


def sharded(world: World, folders: str) -> dict[str, torch.Tensor]:
    """Rank 1 has other captions, and at last none at all: the number of calls must not depend on them."""
    mesh = fsdp.make_mesh(world, None)

    def shard(module, blocks, read) -> None:
        fsdp.load_sharded(module, blocks, read, mesh=mesh)

    results = {}
    for family in SHARDED:
        encoder = loaded(Path(folders), family, shard)
        assert all(isinstance(parameter, DTensor) for parameter in encoder.net.parameters())
        cond = encoder(MIXED if world.is_main else ["a cat"])
        encoder(MIXED[:2] if world.is_main else ["", ""])
        local = sum(fsdp.local(parameter).numel() for parameter in encoder.net.parameters())
        total = sum(parameter.numel() for parameter in encoder.net.parameters())
        results |= {f"{family} tokens": cond.text.tokens, f"{family} pooled": cond.pooled}
        results[f"{family} share"] = torch.tensor(local / total)
    return results


def test_sharded_tokens_equal_those_of_one_rank(folders):
    results = on_ranks(2, sharded, str(folders))
    for family in SHARDED:
        cond = loaded(folders, family)(MIXED)
        assert_near(results[f"{family} tokens"], cond.text.tokens)
        assert_near(results[f"{family} pooled"], cond.pooled)
        assert results[f"{family} share"] == pytest.approx(0.5, rel=0.02)


def test_random_weights_need_no_files():
    encoder = HFText("nobody/nothing", 24, skip_pretrained=True, layers=(1, -1), dtype="fp32", template="a {}")
    encoder.load(CPU)
    cond = encoder(["cat", "", "red cat"])
    assert cond.text.lens == (3, 1, 7)
    assert cond.pooled.shape == (3, 24)
    again = HFText("nobody/nothing", 24, skip_pretrained=True, layers=(1, -1), dtype="fp32", template="a {}")
    again.load(CPU)
    assert torch.equal(again(["cat"]).text.tokens, cond.text.split()[0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_dim": 48}, "text_dim: is 48, but the states of a layer of bert have the width 32; set text_dim"),
        ({"layers": 4}, "layers: 4; bert has the layers 0 to 3, and -1 to -4 counted from the last"),
        ({"max_tokens": 200}, "max_tokens: 200 tokens and those of the template are 200, bert has 128 positions"),
        ({"sha256": ("ab",)}, r"model.safetensors: its sha256 is \w{64}, system.text_encoder.params.sha256 expects ab"),
        ({"sha256": ("ab", "cd")}, "has 1 safetensors files, but params.sha256 has 2 values"),
        ({"cache_dir": None}, "bert is needed, but SELFE_CACHE_DIR is not set"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(folders, changes, words):
    with pytest.raises(UserError, match=words):
        loaded(folders, "bert", **changes)


def test_a_model_without_pooler_output_is_refused(folders):
    with pytest.raises(UserError, match="pooling: qwen3 has no pooler output; use mean, first or last"):
        loaded(folders, "qwen3", pooling="pooler")


def test_minilm_gives_the_embeddings_of_sentence_transformers():
    encoder = HFText(MINILM, 384, pooled_norm="unit", dtype="fp32", sha256=(MINILM_SHA256,))
    encoder.load(CPU)
    cond, reference = encoder(MIXED), Reference(packaged.folder(MINILM))
    outputs = [reference(caption).last_hidden_state[0] for caption in MIXED]
    assert_near(cond.text.tokens, torch.cat(outputs))
    means = torch.stack([output.mean(dim=0) for output in outputs])
    assert_near(cond.pooled, torch.nn.functional.normalize(means))

    cat, kitten, car = encoder(["a photo of a cat", "a picture of a kitten", "the engine of a car"]).pooled
    assert cat @ kitten > 0.6 > 0.3 > cat @ car


# ---- files that are missing, damaged or foreign ----


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", None, "config.json: no such file"),
        ("config.json", b"{", "config.json: not JSON, the file is damaged"),
        ("config.json", b'{"model_type": "never_heard_of"}', "bert: cannot be loaded .*never_heard_of"),
        ("config.json", b'{"model_type": "bart"}', "no class for the encoder alone of a bart model"),
        ("config.json", b'{"model_type": "bert", "vocab_size": 600}', "the file contains .* the BertModel of config"),
        (
            "config.json",
            b'{"auto_map": {}}',
            "config.json: auto_map: the model is code in its folder, which is not run",
        ),
        ("tokenizer.json", b"{", "tokenizer.json: not JSON, the file is damaged"),
        ("model.safetensors", None, "bert: the directory must contain one .*safetensors file"),
        ("model.safetensors", b"short", "model.safetensors: cannot be read"),
    ],
)
def test_missing_and_damaged_files_are_one_line(folders, tmp_path, file, content, words):
    folder = copied(folders, tmp_path)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        loaded(tmp_path, "bert")
    assert "\n" not in str(error.value)


def test_pickles_are_refused(folders, tmp_path):
    folder = copied(folders, tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin: only safetensors is read, because loading other"):
        loaded(tmp_path, "bert")


def test_the_tokenizer_of_another_model_is_refused(folders, tmp_path):
    folder = copied(folders, tmp_path)
    shutil.copy(folders / "t5gemma/tokenizer.json", folder)
    with pytest.raises(UserError, match="the tokenizer does not belong to this model: its ids go up to"):
        loaded(tmp_path, "bert")


def test_a_model_is_named_by_its_path_or_by_its_name_in_the_cache(folders):
    by_name, by_path = HFText("bert", 32, cache_dir=folders), HFText(str(folders / "bert"), 32)
    assert by_name.output_settings() == by_path.output_settings()  # a run may move to another machine
    with pytest.raises(
        UserError, match=r"/owner/name: no such folder; download it with selfe cache-pretrained --text-e"
    ):
        HFText("owner/name", 32, cache_dir=folders).load(CPU)
    with pytest.raises(UserError, match=r"name: no such folder; system.text_encoder.params.model names it"):
        HFText("./name", 32).load(CPU)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": ()}, "layers: name at least one"),
        ({"layers": (1, 2), "text_dim": 33}, "text_dim 33 must be a multiple of the number of layers, 2"),
        ({"template": "a photo"}, "template 'a photo' must have {} once"),
        ({"pooled_dim": 8}, "pooled_dim must be 32 for the pooling 'mean', got 8"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        HFText("bert", **{"text_dim": 32} | changes)


# ---- composition ----


def test_tokens_come_from_one_encoder_and_the_pooled_vector_from_another(folders):
    tokens, pooled = loaded(folders, "qwen3", pooling="none"), loaded(folders, "clip", pooling="pooler")
    both = ComposedText(tokens=tokens, pooled=pooled)
    cond = both(MIXED)
    assert (both.text_dim, both.pooled_dim) == (32, 32)
    assert torch.equal(cond.text.tokens, tokens(MIXED).text.tokens)
    assert torch.equal(cond.pooled, pooled(MIXED).pooled)
    assert torch.equal(ComposedText(tokens=pooled)(MIXED).pooled, cond.pooled)

    described = compare.describe("text_encoder", both)
    assert described["text_encoder.params.tokens.params.model"] == "qwen3"
    assert described["text_encoder.params.pooled.module"] == "selfe.encoders.hf_text.HFText"
    assert described["text_encoder.params.pooled.params.pooling"] == "pooler"
    assert "text_encoder.params.pooled.module" not in compare.describe("text_encoder", ComposedText(Words()))


def test_t5_and_clip_are_a_composition(folders, tmp_path):
    for name, family in (("t5-v1_1-xxl", "t5"), ("clip-vit-large-patch14", "clip")):
        (tmp_path / name).symlink_to(folders / family)
    clip = ClipSize(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    pair = T5Clip(tmp_path, t5=T5Size(64, 2, 4, 16, 128), clip=clip, dtype="fp32")
    pair.load(CPU)
    tokens, pooled = loaded(folders, "t5", pooling="none"), loaded(folders, "clip", pooling="pooler")

    expected, cond = pair([*MIXED, ""]), ComposedText(tokens, pooled)([*MIXED, ""])
    assert torch.equal(cond.text.tokens, expected.text.tokens)
    assert_near(cond.pooled, expected.pooled)


# ---- in a run ----

COMPOSED = (
    "system.text_encoder={module: selfe.encoders.composed_text.ComposedText, params: {"
    "tokens: {module: ENCODER, params: {model: FOLDER/gemma3, text_dim: 32, max_tokens: 64, pooling: none}}, "
    "pooled: {module: ENCODER, params: {model: FOLDER/bert, text_dim: 32, max_tokens: 64, pooled_norm: rms}}}}"
).replace("ENCODER", "selfe.encoders.hf_text.HFText")
WIDTHS = "system.backbone.params.text_dim=32", "system.backbone.params.pooled_dim=32"


def overrides(folders: Path) -> list[str]:
    return [COMPOSED.replace("FOLDER", str(folders)), *WIDTHS]


def test_training_on_two_ranks_resumes_bitwise_and_exports(folders, tmp_path):
    """Both encoders sharded."""
    settings = [*overrides(folders), "trainer.shard_text_encoder=true", "trainer.max_steps=3", "trainer.val_every=3"]
    train = partial(train_processes.finish, config=train_processes.TINY)
    train(tmp_path / "one", 2, *settings)
    train_processes.copy_until(Path("checkpoints/step_00000002"), tmp_path / "one", tmp_path / "two")
    assert "resuming from" in train(tmp_path / "two", 2, *settings)
    assert train_processes.lines(tmp_path / "one") == train_processes.lines(tmp_path / "two")
    last = [train_processes.files(tmp_path / name / "checkpoints/step_00000003") for name in ("one", "two")]
    assert last[0] == last[1]

    checkpoints = str(tmp_path / "one/checkpoints")
    cli.run(["export", checkpoints, str(tmp_path / "denoiser")])
    assert (tmp_path / "denoiser/model.safetensors").is_file()
    with pytest.raises(UserError, match=r"--format diffusers supports T5Clip only, the run has selfe.*ComposedText"):
        cli.run(["export", checkpoints, str(tmp_path / "pipeline"), "--format", "diffusers"])


def test_images_are_the_same_with_cached_and_with_live_codes(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("SELFE_SKIP_PRETRAINED", "1")
    monkeypatch.chdir(train_processes.ROOT)
    settings = config.load(train_processes.TINY, [*overrides(folders), "trainer.max_steps=8"])
    options = argparse.Namespace(workers=0, batch_size=4, one_sample=False)
    monkeypatch.setattr(precompute.collectives, "barrier", lambda: None)
    precompute.encode_all(settings, tmp_path, options, World(0, 1, CPU))
    cached = config.load(tmp_path / "config.yaml", ["system.autoencoder.params.decode=true"])

    images = []
    for system_settings in (settings, cached):
        with META:
            system = config.build(system_settings, "system")
        net = system.backbone.to_empty(device=CPU)
        for name, parameter in net.named_parameters():
            parameter.data.copy_(net.initial(name, parameter.shape, 0) + 0.02)  # the last layer starts at zero
        system.load_encoders(CPU)
        rng = SampleRNG.of_images([(0, "a", 0), (0, "b", 0)])
        how = {"sampler": Euler(), "num_steps": 2, "cfg_scale": 2.0, "s_ratio": 1.0}
        images.append(system.generate(net, [CAPTIONS[0], CAPTIONS[3]], [(32, 32)] * 2, rng, **how))
    assert not torch.equal(images[0][0], images[0][1])
    for live, from_cache in zip(*images, strict=True):
        assert torch.equal(live, from_cache)


def test_a_missing_cache_folder_is_reported_before_imports(monkeypatch, tmp_path):
    composed = COMPOSED.replace("FOLDER/gemma3", "owner/gemma3")
    where = "system.text_encoder.params.tokens.params.cache_dir: SELFE_CACHE_DIR is not set"
    monkeypatch.chdir(train_processes.ROOT)
    monkeypatch.setenv("SELFE_SKIP_PRETRAINED", "1")
    with pytest.raises(UserError, match=where):
        config.check(str(train_processes.TINY), [composed, *WIDTHS], ("system", "data", "trainer"))
    config.check(str(train_processes.TINY), overrides(tmp_path), ("system", "data", "trainer"))  # paths need none


def test_configs_of_the_page_are_complete(tmp_path, monkeypatch):
    """Each `system:` over a shipped config: keys are valid, and the widths of encoder and denoiser agree."""
    monkeypatch.setenv("SELFE_SKIP_PRETRAINED", "1")
    page = (train_processes.ROOT / "docs/text_encoders.md").read_text()
    fragments = re.findall(r"^```yaml\n(system:.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(fragments) == 2
    for fragment in fragments:
        path = tmp_path / "train.yaml"
        path.write_text(f"base: {train_processes.ROOT}/configs/train/selfe_0.5b.yaml\n{fragment}")
        with META:
            config.build(config.load(path), "system")


# ---- selfe probe-text ----


class Bags:
    """An encoder that ignores the order of words: a caption is the sum of its words' vectors."""

    text_dim, pooled_dim = 64, 64

    def __init__(self):
        self.words = Words(64)
        self.words.load(CPU)

    def __call__(self, captions):
        return self.words([" ".join(sorted(caption.split())) for caption in captions])


def test_probe_text_shows_that_an_encoder_ignores_the_order_of_words(tmp_path):
    prompts = tmp_path / "prompts.tsv"
    prompts.write_text(
        "# comment\n\nattributes\tred cube on blue ball\tblue ball under red cube\tblue cube on red ball\n"
        "count\tone dog\ta dog\ttwo dogs\tthree dogs\n"
    )
    lines = probe_text.read_prompts(prompts)
    result = probe_text.probe(Bags(), lines)
    for measured in result["representations"].values():
        row = measured["kinds"]["attributes"]
        assert row["distance"] == pytest.approx(0, abs=1e-6)
        assert row["right"] == 0
        assert row["worst"]["other"] == "blue cube on red ball"
        assert measured["nearest"]["least"] == pytest.approx(0, abs=1e-6)
        assert measured["kinds"]["count"]["pairs"] == 2
    by_order = probe_text.probe(Bags().words, lines)
    assert by_order["representations"]["pooled"]["kinds"]["attributes"]["distance"] > 0.1


def test_probe_text_prints_a_table_or_json(folders, capsys, monkeypatch):
    monkeypatch.setenv("SELFE_SKIP_PRETRAINED", "1")
    monkeypatch.chdir(train_processes.ROOT)
    arguments = [str(train_processes.TINY), "examples/probe_prompts.tsv", *overrides(folders)]
    cli.run(["probe-text", *arguments, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["text_encoder"]["params"]["tokens"]["params"]["text_dim"] == 32
    kinds = result["representations"]["pooled"]["kinds"]
    assert {"attributes", "count", "negation", "all"} <= kinds.keys()
    assert 0 <= kinds["all"]["right"] <= 1

    cli.run(["probe-text", *arguments])
    printed = capsys.readouterr().out
    assert "matched tokens (unrelated captions: cosine" in printed
    assert f"{kinds['count']['margin']:>8.3f}" in printed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("count\ta dog\tone dog\n", "prompts.tsv, line 1: expected kind, caption, .* got 3 columns with text"),
        ("count\ta dog\t\ttwo dogs\n", "prompts.tsv, line 1: .* got 3 columns with text"),
        ("# nothing\n", "at least two lines with different captions are needed"),
    ],
)
def test_a_prompt_file_with_a_mistake_is_one_line(tmp_path, text, words):
    (tmp_path / "prompts.tsv").write_text(text)
    with pytest.raises(UserError, match=words):
        probe_text.read_prompts(tmp_path / "prompts.tsv")
