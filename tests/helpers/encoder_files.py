"""A folder as the cache script leaves it, in the sizes of the smoke run: real formats and tokenizers, random weights.

Every file is written by the library that defines its format.
"""

import io
import json
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, T5Config, T5ForConditionalGeneration

from selfe.encoders.flux_vae import FluxVAE

ROOT = Path(__file__).parents[2]
CAPTIONS = [
    line.split("\t")[1] for line in (ROOT / "debug_data/t2i_smoke/manifest.tsv").read_text("utf-8").splitlines()
]


def write_cache(folder: Path) -> Path:
    """`t5-v1_1-xxl/`, `clip-vit-large-patch14/` and `ae.safetensors`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        write_t5(folder / "t5-v1_1-xxl")
        write_clip(folder / "clip-vit-large-patch14")
        vae = FluxVAE(skip_pretrained=True, width=32, dtype="fp32")
        vae.load(torch.device("cpu"))
        save_file(vae.net.state_dict(), folder / "ae.safetensors")
    return folder


def write_t5(folder: Path) -> None:
    """The whole of T5, as Google's folder has it, with a sentencepiece model."""
    folder.mkdir(parents=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS * 3),
        model_writer=model,
        vocab_size=400,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", special | {"extra_ids": 0, "model_max_length": 512})
    config = T5Config(
        vocab_size=320, d_model=64, num_layers=2, num_heads=4, d_kv=16, d_ff=128, feed_forward_proj="gated-gelu"
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)


def write_clip(folder: Path) -> None:
    """All of CLIP, with its image tower, with byte-pair merges."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, end_of_word_suffix="</w>")
    tokenizer.train_from_iterator([word for line in CAPTIONS for word in line.lower().split()], trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    words = [*trained["vocab"], "<|startoftext|>", "<|endoftext|>"]  # the end has the highest number, as in CLIP
    write_json(folder / "vocab.json", {word: number for number, word in enumerate(words)})
    merges = [" ".join(pair) for pair in trained["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    write_json(folder / "special_tokens_map.json", special | {"pad_token": "<|endoftext|>"})
    write_json(
        folder / "tokenizer_config.json",
        special | {"pad_token": "<|endoftext|>", "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"},
    )
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    # CLIP's own configuration names 2 as the end token, which transformers takes as "the highest number"
    text = size | {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 2}
    CLIPModel(CLIPConfig(text_config=text, vision_config=size, projection_dim=32)).save_pretrained(folder)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
