"""Frozen text encoders: T5 for text tokens, CLIP for the pooled vector (S.2: T5-XXL and CLIP-L)."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
)
from transformers.utils import logging as logging_of_transformers

from selfe.io.safetensors_files import AGAIN, SafetensorsFiles, cached
from selfe.protocols import ShardLoader, TensorReader
from selfe.types import DTYPES, MOST_WIDTH, Precision, TextCond, UserError, check_range, packed

T5_FOLDER, CLIP_FOLDER = "t5-v1_1-xxl", "clip-vit-large-patch14"
TOKENIZERS = (
    {"tokenizer.json"},
    {"spiece.model"},
    {"vocab.json", "merges.txt"},
)  # without these files transformers builds an empty tokenizer
CLIP_MAX_TOKENS = 77  # size of its position table
T5_VOCABULARY, CLIP_VOCABULARY = 32128, 49408  # rows of the embedding tables
Tokenizer = PreTrainedTokenizerBase
Parts = tuple[
    Tokenizer, T5Config, TensorReader, Tokenizer, CLIPTextModel
]  # T5 as config and reader, CLIP as a loaded model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class T5Size:
    d_model: int = 4096
    num_layers: int = 24
    num_heads: int = 64
    d_kv: int = 64
    d_ff: int = 10240

    def __post_init__(self):
        check_sizes(self)


@dataclass(frozen=True)
class ClipSize:
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072

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
    """Encodes captions as T5 tokens (last hidden state) and CLIP's pooled output, each caption at its true length.

    Captions are batched by length, so that no padding is needed and an embedding does not depend on the rest of the
    batch. A sharded T5 instead encodes all captions in one padded, masked batch, because every rank must make the same
    calls; its output is trimmed to the true lengths.
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
        (shard or self.whole)(self.t5, (self.t5.shared, *self.t5.encoder.block), read)

        self.clip.to(device, self.dtype).eval().requires_grad_(False)
        self.empty = self.encode_each([""])[0]  # the empty caption is needed in every step

    def whole(self, module: nn.Module, blocks: Iterable[nn.Module], read: TensorReader) -> None:
        """A `ShardLoader` without sharding: materialise the module on this device and read all parameters."""
        module.to_empty(device=self.device)
        for name, parameter in module.named_parameters():
            parameter.copy_(read(name, slice(None)))

    def random(self) -> Parts:
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

        with torch.random.fork_rng(devices=[]), torch.device("meta" if self.device.type == "meta" else "cpu"):
            torch.manual_seed(0)
            state = T5EncoderModel(t5).state_dict()
            return tokenizer, t5, lambda name, rows: state[name][rows], tokenizer, CLIPTextModel(clip)

    def pretrained(self) -> Parts:
        """Open the pretrained files and check tokenizers, sizes and parameter names.

        Raises:
            UserError: files are missing or damaged, or their sizes differ from the configuration.
        """
        # T5: configuration and tensor names only; parameters are read when the module is materialised.
        folder = cached(self.cache_dir, T5_FOLDER)
        weights = SafetensorsFiles.open(folder)
        with naming(folder):
            t5_tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            t5 = T5Config.from_pretrained(folder, local_files_only=True)
        expect_size(folder, t5, self.t5_size)
        with torch.device("meta"):
            wanted = {name: p.shape for name, p in T5EncoderModel(t5).named_parameters()}
        wanted.pop("encoder.embed_tokens.weight", None)  # tied to shared.weight
        weights.expect(wanted, "T5's encoder")

        # CLIP: loaded at once.
        folder = cached(self.cache_dir, CLIP_FOLDER)
        SafetensorsFiles.open(folder)
        with naming(folder):
            clip_tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            clip, loaded = CLIPTextModel.from_pretrained(
                folder, dtype=self.dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        expect_size(folder, clip.config, self.clip_size)
        if loaded["missing_keys"]:
            raise UserError(f"{folder}: {min(loaded['missing_keys'])} is missing from the weights; {AGAIN}")
        return t5_tokenizer, t5, weights.read, clip_tokenizer, clip

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> TextCond:
        """Captions -> text (T, text_dim) and pooled (B, pooled_dim), float32."""
        # Empty captions use the precomputed embedding.
        others = [caption for caption in captions if caption]
        if self.sharded and not others:
            others = [""]  # every rank must take part in the collectives
        codes = iter(self.encode_each(others) if others else ())
        texts, pooled = zip(*(next(codes) if caption else self.empty for caption in captions), strict=True)
        return TextCond(packed(torch.cat(texts), [(1, len(text)) for text in texts]), torch.stack(pooled))

    @torch.no_grad()
    def encode_each(self, captions: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        """Encode captions: B x (text (n, text_dim), pooled (pooled_dim,)), float32."""
        # T5 tokens.
        ids = self.t5_ids(captions)
        groups = [list(range(len(ids)))] if self.sharded else by_length(ids)
        texts = self.forward_each(ids, groups, self.forward_t5)
        texts = [text[: len(row)] for text, row in zip(texts, ids, strict=True)]

        # CLIP's pooled output.
        ids = self.clip_tokenizer(list(captions), truncation=True, max_length=CLIP_MAX_TOKENS)["input_ids"]
        pooled = self.forward_each(ids, by_length(ids), lambda ids, mask: self.clip(ids).pooler_output)
        return list(zip(texts, pooled, strict=True))

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

    def forward_t5(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids (B, n) -> (B, n, text_dim). The mask is only needed for padded batches (sharded T5)."""
        padded = self.sharded and not ids.is_meta
        return self.t5(ids, attention_mask=mask if padded else None).last_hidden_state

    def forward_each(
        self, ids: list[list[int]], groups: list[list[int]], forward: Callable[[Tensor, Tensor], Tensor]
    ) -> list[Tensor]:
        """Run `forward(ids, mask)` on each group of rows, padded to its longest; one float32 result per row."""
        results: dict[int, Tensor] = {}
        for group in groups:
            padded = nn.utils.rnn.pad_sequence([torch.tensor(ids[n]) for n in group], batch_first=True)
            mask = torch.arange(padded.shape[1]) < torch.tensor([len(ids[n]) for n in group])[:, None]
            results |= zip(group, forward(padded.to(self.device), mask.to(self.device)).float(), strict=True)
        return [results[n] for n in range(len(ids))]


@contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Silence transformers while it loads from a folder and report its errors as one line that names the folder.

    Raises:
        UserError: tokenizer files are missing, or loading failed.
    """
    if not any(files <= {file.name for file in folder.iterdir()} for files in TOKENIZERS):
        raise UserError(f"{folder}: the tokenizer's files are missing; {AGAIN}")

    verbosity = logging_of_transformers.get_verbosity()
    logging_of_transformers.set_verbosity_error()  # it would list the unused weights of CLIP's vision tower
    logging_of_transformers.disable_progress_bar()

    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: cannot be loaded ({str(error).splitlines()[0]}); {AGAIN}") from error
    finally:
        logging_of_transformers.set_verbosity(verbosity)
        logging_of_transformers.enable_progress_bar()


def expect_size(folder: Path, config: T5Config | CLIPTextConfig, size: T5Size | ClipSize) -> None:
    """Raise UserError if a loaded configuration differs from the configured size."""
    for key, wanted in asdict(size).items():
        if (found := getattr(config, key)) != wanted:
            raise UserError(f"{folder}: {key} is {found}, system.text_encoder.params expects {wanted}")


def by_length(ids: Sequence[list[int]]) -> list[list[int]]:
    """Group row indices by length, so that each group can be batched without padding."""
    groups = defaultdict(list)
    for number, row in enumerate(ids):
        groups[len(row)].append(number)
    return list(groups.values())
