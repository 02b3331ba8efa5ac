"""Frozen text encoders: T5 for text tokens, CLIP for the pooled vector (S.2: T5-XXL and CLIP-L)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
)

from selfe.encoders.pretrained_tokenizer import load_tokenizer, plain_errors
from selfe.encoders.token_batches import PAD_MULTIPLE, Code, copy_together, encode, group_by_length, padded
from selfe.errors import UserError
from selfe.io.safetensors_files import SafetensorsFiles, cached, read_json
from selfe.protocols import ShardLoader, TensorReader
from selfe.rng import philox
from selfe.types import DTYPES, MOST_WIDTH, Precision, TextCond, check_range

T5_FOLDER, CLIP_FOLDER = "t5-v1_1-xxl", "clip-vit-large-patch14"
T5_TOKENIZER, CLIP_TOKENIZER = ("spiece.model",), ("vocab.json", "merges.txt")
CLIP_MAX_TOKENS = 77  # size of its position table
T5_VOCABULARY, CLIP_VOCABULARY = 32128, 49408  # rows of the embedding tables
Encoders = tuple[
    PreTrainedTokenizerBase, T5Config, TensorReader, PreTrainedTokenizerBase, CLIPTextModel
]  # T5 as config and reader, CLIP as a loaded model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class T5Size:
    d_model: int = 4096  # width of a token
    num_layers: int = 24  # blocks
    num_heads: int = 64  # attention heads
    d_kv: int = 64  # width of an attention head
    d_ff: int = 10240  # width of the feed-forward layers

    def __post_init__(self):
        check_sizes(self)


@dataclass(frozen=True)
class ClipSize:
    hidden_size: int = 768  # width of a token and of the pooled vector
    num_hidden_layers: int = 12  # blocks
    num_attention_heads: int = 12  # attention heads
    intermediate_size: int = 3072  # width of the feed-forward layers

    def __post_init__(self):
        check_sizes(self)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}"
            )


def check_sizes(size: T5Size | ClipSize) -> None:
    """Raise ValueError for sizes that no network can have."""
    for name, value in vars(size).items():
        check_range(name, value, 1, MOST_WIDTH)


class T5Clip:
    """Encodes captions as T5 tokens (last hidden state, at the caption's true length) and CLIP's pooled output.

    Inside, T5 pads a caption to the next multiple of `PAD_MULTIPLE` tokens, with a mask, and runs once per padded
    length; CLIP pads all captions to its 77 positions and runs once. The padded length depends on the caption alone, so
    its embedding does not depend on the rest of the batch. A sharded T5 pads all captions to the longest, because every
    rank must make the same number of calls.
    """

    def __init__(
        self,
        cache_dir: Path | None = None,
        skip_pretrained: bool = False,
        max_tokens: int = 512,
        t5: T5Size = T5Size(),
        clip: ClipSize = ClipSize(),
        dtype: Precision = "bf16",
    ):
        """
        Args:
            cache_dir: folder with `t5-v1_1-xxl/` and `clip-vit-large-patch14/`.
            skip_pretrained: use random weights and a byte-level tokenizer, and read no files.
            max_tokens: maximum number of T5 tokens; longer captions are truncated, with one warning. CLIP truncates
                at 77.
            t5: sizes of T5; must match the files.
            clip: sizes of CLIP's text model; must match the files.
            dtype: precision of both networks.
        """
        check_range("max_tokens", max_tokens, 1, 10_000)
        self.cache_dir, self.skip_pretrained, self.max_tokens = cache_dir, skip_pretrained, max_tokens
        self.t5_size, self.clip_size = t5, clip
        self.precision, self.dtype = dtype, DTYPES[dtype]
        self.text_dim, self.pooled_dim = t5.d_model, clip.hidden_size
        self.num_cut = 0  # captions truncated for T5

    def output_settings(self) -> dict[str, Any]:
        return {
            "skip_pretrained": self.skip_pretrained,
            "max_tokens": self.max_tokens,
            "t5": asdict(self.t5_size),
            "clip": asdict(self.clip_size),
            "dtype": self.precision,
            "padding": f"T5 to a multiple of {PAD_MULTIPLE}, CLIP to {CLIP_MAX_TOKENS}",
        }

    def load(self, device: torch.device, shard: ShardLoader | None = None) -> None:
        """Load tokenizers and weights onto the device. With `shard`, T5 (but not CLIP) is sharded over ranks.

        On the meta device no file is read and no memory allocated: the networks have the configured sizes and the
        tokenizer is byte-level.

        Raises:
            UserError: files are missing or damaged, or their sizes differ from the configuration.
        """
        self.device, self.sharded = device, shard is not None
        self.t5_tokenizer, config, read, self.clip_tokenizer, self.clip = (
            self.random() if self.skip_pretrained or device.type == "meta" else self.pretrained()
        )

        # T5: built on the meta device, then materialised or sharded.
        with torch.device("meta"):
            self.t5 = T5EncoderModel(config).to(self.dtype).eval().requires_grad_(False)
        self.t5.set_input_embeddings(self.t5.shared)  # share one module, so that it is materialised once
        (shard or self.materialise)(self.t5, (self.t5.shared, *self.t5.encoder.block), read)

        self.clip.to(device, self.dtype).eval().requires_grad_(False)
        self.empty = self.encode_each([""])[0]  # the empty caption is needed in every step

    def materialise(self, module: nn.Module, blocks: Iterable[nn.Module], read: TensorReader) -> None:
        """A `ShardLoader` without sharding: materialise the module on this device and read all parameters."""
        module.to_empty(device=self.device)
        for name, parameter in module.named_parameters():
            parameter.copy_(read(name, slice(None)))

    def random(self) -> Encoders:
        """Randomly initialised networks of the configured sizes, the same on every machine."""
        tokenizer = ByT5Tokenizer()
        vocabularies = (len(tokenizer),) * 2 if self.skip_pretrained else (T5_VOCABULARY, CLIP_VOCABULARY)
        t5 = T5Config(vocab_size=vocabularies[0], feed_forward_proj="gated-gelu", **asdict(self.t5_size))
        clip = CLIPTextConfig(
            vocab_size=vocabularies[1],
            max_position_embeddings=CLIP_MAX_TOKENS,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            **asdict(self.clip_size),
        )

        # T5 one tensor at a time: T5-XXL takes 19 GB in fp32. On the meta device there are no values to draw.
        shapes = t5_shapes(t5)

        def read(name: str, rows: slice) -> Tensor:
            if self.device.type == "meta":
                return torch.empty(shapes[name], dtype=self.dtype, device="meta")[rows]
            return random_t5(name, shapes[name], t5, self.dtype)[rows]

        with torch.random.fork_rng(devices=[]), torch.device("meta" if self.device.type == "meta" else "cpu"):
            torch.manual_seed(0)
            return tokenizer, t5, read, tokenizer, CLIPTextModel(clip)

    def pretrained(self) -> Encoders:
        """Open the pretrained files and check tokenizers, sizes and parameter names.

        Raises:
            UserError: files are missing or damaged, or do not belong to the configured encoders.
        """
        # T5: configuration and tensor names only; parameters are read when the module is materialised.
        folder = cached(self.cache_dir, T5_FOLDER)
        weights = SafetensorsFiles.open(folder)
        t5 = read_config(folder, T5Config, self.t5_size)
        weights.expect(t5_shapes(t5), "T5's encoder")
        t5_tokenizer = load_tokenizer(folder, T5_TOKENIZER, t5.vocab_size, t5.eos_token_id)
        return t5_tokenizer, t5, weights.read, *self.pretrained_clip()

    def pretrained_clip(self) -> tuple[PreTrainedTokenizerBase, CLIPTextModel]:
        """CLIP's tokenizer and text model from its folder."""
        folder = cached(self.cache_dir, CLIP_FOLDER)
        weights = SafetensorsFiles.open(folder)
        config = read_config(folder, CLIPTextConfig, self.clip_size)
        with torch.device("meta"):
            shapes = {name.removeprefix("text_model."): p.shape for name, p in CLIPTextModel(config).named_parameters()}
        shapes = {f"text_model.{name}": shape for name, shape in shapes.items()}  # as in the file of the complete CLIP
        weights.expect(shapes, "CLIP's text encoder")

        tokenizer = load_tokenizer(folder, CLIP_TOKENIZER, config.vocab_size, config.eos_token_id)
        with plain_errors(folder):
            clip = CLIPTextModel.from_pretrained(
                None, config=config, state_dict={name: weights.read(name) for name in shapes}, dtype=self.dtype
            )
        return tokenizer, clip

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> TextCond:
        """Captions -> text (T, text_dim) and pooled (B, pooled_dim), float32."""
        return encode(captions, self.encode_each, self.empty, self.sharded)

    @torch.no_grad()
    def encode_each(self, captions: Sequence[str]) -> list[Code]:
        """Encode captions: B x (text (n, text_dim), pooled (pooled_dim,)), float32."""
        t5_ids, clip_ids = self.t5_ids(captions), self.clip_ids(captions)

        # T5: a batch for each padded length; CLIP: one batch
        groups = group_by_length([len(row) for row in t5_ids], same=self.sharded)
        batches = [padded([t5_ids[index] for index in group], length) for length, group in groups.items()]
        batches.append(padded(clip_ids, CLIP_MAX_TOKENS))
        *t5_batches, clip_batch = copy_together(batches, self.device)

        texts: dict[int, Tensor] = {}
        for group, batch in zip(groups.values(), t5_batches, strict=True):
            texts |= zip(group, self.forward_t5(batch[:, 1:], batch[:, :1]).float(), strict=True)

        # the padding of both is not read: T5 has a mask, and CLIP attends to earlier tokens only
        pooled = self.clip(clip_batch[:, 1:]).pooler_output.float()
        return [(texts[index][: len(row)], pooled[index]) for index, row in enumerate(t5_ids)]

    def t5_ids(self, captions: Sequence[str]) -> list[list[int]]:
        """T5 token ids of each caption, including the end token. Long captions are truncated and counted."""
        rows = self.t5_tokenizer(list(captions), verbose=False)["input_ids"]
        long = [(len(row), caption) for row, caption in zip(rows, captions, strict=True) if len(row) > self.max_tokens]
        if not long:
            return rows

        # Warn once, then truncate.
        if not self.num_cut:
            logger.warning(
                "captions are truncated to %d T5 tokens; first one (%d tokens): %.60s...", self.max_tokens, *long[0]
            )
        self.num_cut += len(long)
        return self.t5_tokenizer(list(captions), truncation=True, max_length=self.max_tokens)["input_ids"]

    def clip_ids(self, captions: Sequence[str]) -> list[list[int]]:
        """CLIP token ids of each caption, including the end token, at most 77."""
        return self.clip_tokenizer(list(captions), truncation=True, max_length=CLIP_MAX_TOKENS)["input_ids"]

    def forward_t5(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Padded token ids (B, n) and their true lengths (B, 1) -> (B, n, text_dim)."""
        # A mask in the shape of the scores; given (B, n), transformers reads its values, which waits for the device.
        padding = torch.arange(ids.shape[1], device=ids.device) >= lengths
        mask = torch.zeros_like(padding, dtype=self.dtype).masked_fill(padding, torch.finfo(self.dtype).min)
        return self.t5(ids, attention_mask=mask[:, None, None]).last_hidden_state


def read_config(
    folder: Path, kind: type[T5Config | CLIPTextConfig], size: T5Size | ClipSize
) -> T5Config | CLIPTextConfig:
    """The configuration, an object of `kind`, of a pretrained encoder.

    Raises:
        UserError: it is missing or damaged, or differs from the configured size.
    """
    read_json(folder / "config.json")  # names a missing or damaged file
    with plain_errors(folder):
        config = kind.from_pretrained(folder, local_files_only=True)
    for key, wanted in asdict(size).items():
        if (stored := getattr(config, key)) != wanted:
            raise UserError(f"{folder}: {key} is {stored}, system.text_encoder.params expects {wanted}")
    return config


def t5_shapes(config: T5Config) -> dict[str, torch.Size]:
    """Shapes of the parameters of T5's encoder; the embedding counts once, as shared.weight."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in T5EncoderModel(config).named_parameters()}
    shapes.pop("encoder.embed_tokens.weight", None)
    return shapes


def random_t5(name: str, shape: torch.Size, config: T5Config, dtype: torch.dtype) -> Tensor:
    """A random parameter of T5, a function of its name and shape, scaled as T5 is initialised."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)  # scale of a norm

    if name.endswith(".relative_attention_bias.weight"):
        std = config.d_model**-0.5
    elif name.endswith(".q.weight"):
        std = (config.d_model * config.d_kv) ** -0.5  # T5 does not divide attention scores by the root of d_kv
    else:
        std = 1.0 if name == "shared.weight" else shape[1] ** -0.5
    generator = torch.Generator().manual_seed(int(philox("t5", name).integers(2**63)))
    return torch.empty(shape, dtype=dtype).normal_(0, std, generator=generator)
