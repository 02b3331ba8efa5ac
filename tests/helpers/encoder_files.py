"""The folder that `selfe cache-pretrained` writes, in the sizes of the smoke run: real formats, random weights.

Every file is written by the library that defines its format.
"""

import io
import json
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
)

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
    """The complete T5, encoder and decoder as in Google's folder, with a sentencepiece model."""
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
    """The complete CLIP, with its image encoder, and a byte-pair tokenizer."""
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


# ---- small models of other families, for HFText ----

SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
GROUPED = SIZE | {"num_key_value_heads": 2, "head_dim": 8}  # decoders share keys and values between heads


def write_text_model(folder: Path, kind: str) -> Path:
    """A small model of a family with random weights, and a tokenizer of the same kind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "t5":
            write_t5(folder)
        elif kind == "clip":
            write_clip(folder)
        else:
            TEXT_MODELS[kind](folder)
    return folder


def write_bert(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    train_tokenizer(tokenizer, trainers.WordPieceTrainer(vocab_size=600, special_tokens=special))
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    save_tokenizer(tokenizer, folder, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    BertModel(BertConfig(vocab_size=600, max_position_embeddings=128, **SIZE)).save_pretrained(folder)


def write_qwen3(folder: Path) -> None:
    """Byte-level, and without tokens at the start and the end: an empty caption has none."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    train_tokenizer(tokenizer, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=special))
    save_tokenizer(tokenizer, folder, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    config = Qwen3Config(vocab_size=608, **GROUPED)
    Qwen3ForCausalLM(config).save_pretrained(folder)


def write_gemma_tokenizer(folder: Path) -> None:
    """Spaces are part of the words behind them; bytes replace unknown characters."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    train_tokenizer(tokenizer, trainers.BpeTrainer(vocab_size=900, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    save_tokenizer(tokenizer, folder, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>")


def write_gemma3(folder: Path) -> None:
    """With a sliding window shorter than captions."""
    write_gemma_tokenizer(folder)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(vocab_size=900, sliding_window=8, layer_types=kinds, **GROUPED)
    Gemma3ForCausalLM(config).save_pretrained(folder)


def write_t5gemma(folder: Path) -> None:
    """Encoder and decoder."""
    write_gemma_tokenizer(folder)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    module = GROUPED | {"vocab_size": 900, "sliding_window": 8, "layer_types": kinds}
    config = T5GemmaConfig(encoder=module, decoder=module, vocab_size=900)
    T5GemmaForConditionalGeneration(config).save_pretrained(folder)


TEXT_MODELS = {"bert": write_bert, "qwen3": write_qwen3, "gemma3": write_gemma3, "t5gemma": write_t5gemma}


def train_tokenizer(tokenizer: Tokenizer, trainer: trainers.Trainer) -> None:
    trainer.show_progress = False
    tokenizer.train_from_iterator(CAPTIONS * 3, trainer)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, **special: str) -> None:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
