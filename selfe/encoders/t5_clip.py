"""The frozen text encoders: T5 for the tokens, CLIP for the pooled vector (S.2: T5-XXL and CLIP-L)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

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

from selfe.types import DTYPES, Precision, TextCond, UserError, packed

CLIP_MAX_TOKENS = 77  # its position table


@dataclass(frozen=True)
class T5Size:
    d_model: int = 4096
    num_layers: int = 24
    num_heads: int = 64
    d_kv: int = 64
    d_ff: int = 10240


@dataclass(frozen=True)
class ClipSize:
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072


class T5Clip:
    """Captions to T5 tokens (last hidden state) and CLIP's pooled output, every caption at its true length.

    Captions of equal length share a forward pass, so no token is ever padded and a caption's code does not depend on
    its neighbours' lengths.
    """

    def __init__(
        self,
        cache_dir: str | None = None,
        skip_pretrained: bool = False,
        max_tokens: int = 512,
        t5: T5Size = T5Size(),
        clip: ClipSize = ClipSize(),
        dtype: Precision = "bf16",
    ):
        """
        Args:
            cache_dir: holds `t5-v1_1-xxl/` and `clip-vit-large-patch14/`.
            skip_pretrained: random weights of these sizes and a byte-level tokenizer instead; nothing is read.
            max_tokens: of T5; longer captions are cut. CLIP cuts at 77.
        """
        self.cache_dir, self.skip_pretrained, self.max_tokens = cache_dir, skip_pretrained, max_tokens
        self.t5_size, self.clip_size, self.dtype = t5, clip, DTYPES[dtype]
        self.text_dim, self.pooled_dim = t5.d_model, clip.hidden_size

    def load(self, device: torch.device) -> None:
        """Bring tokenizers and weights to the device.

        Raises:
            UserError: files are missing, or do not have the sizes of the configuration.
        """
        parts = self.random() if self.skip_pretrained else self.pretrained()
        self.t5_tokenizer, self.t5, self.clip_tokenizer, self.clip = parts
        for model in (self.t5, self.clip):
            model.to(device, self.dtype).eval().requires_grad_(False)
        self.device = device
        self.empty = self.encode_each([""])[0]  # needed in every step
        if not all(code.isfinite().all() for code in self.empty):
            raise UserError(f"{self.cache_dir}: the text encoders give infinite numbers; fetch the weights again")

    def random(self) -> tuple[PreTrainedTokenizerBase, nn.Module, PreTrainedTokenizerBase, nn.Module]:
        """Stand-ins of the configured sizes, the same on every machine."""
        tokenizer = ByT5Tokenizer()
        t5 = T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **asdict(self.t5_size))
        clip = CLIPTextConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=CLIP_MAX_TOKENS,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            **asdict(self.clip_size),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return tokenizer, T5EncoderModel(t5), tokenizer, CLIPTextModel(clip)

    def pretrained(self) -> tuple[PreTrainedTokenizerBase, nn.Module, PreTrainedTokenizerBase, nn.Module]:
        parts = []
        for name, kind, size in (
            ("t5-v1_1-xxl", T5EncoderModel, self.t5_size),
            ("clip-vit-large-patch14", CLIPTextModel, self.clip_size),
        ):
            folder = cached(self.cache_dir, name)
            try:
                model = kind.from_pretrained(folder, dtype=self.dtype, local_files_only=True, use_safetensors=True)
                parts += [AutoTokenizer.from_pretrained(folder, local_files_only=True), model]
            except (OSError, ValueError) as error:
                raise UserError(f"{folder}: cannot be loaded: {str(error).splitlines()[0]}") from error
            for key, wanted in asdict(size).items():
                if (found := getattr(model.config, key)) != wanted:
                    raise UserError(f"{folder}: {key} is {found}, system.text_encoder.params asks for {wanted}")
        return tuple(parts)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> TextCond:
        """Captions -> text (T, text_dim) and pooled (B, pooled_dim), float32."""
        others = [caption for caption in captions if caption]
        codes = iter(self.encode_each(others) if others else ())
        texts, pooled = zip(*(next(codes) if caption else self.empty for caption in captions), strict=True)
        return TextCond(packed(torch.cat(texts), [(1, len(text)) for text in texts]), torch.stack(pooled))

    def encode_each(self, captions: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        """B x (text (n, text_dim), pooled (pooled_dim,))."""
        texts = self.forward_by_length(
            self.ids(self.t5_tokenizer, captions, self.max_tokens), lambda ids: self.t5(ids).last_hidden_state
        )
        pooled = self.forward_by_length(
            self.ids(self.clip_tokenizer, captions, CLIP_MAX_TOKENS), lambda ids: self.clip(ids).pooler_output
        )
        return list(zip(texts, pooled, strict=True))

    def ids(self, tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], max_tokens: int) -> list[list[int]]:
        return tokenizer(list(captions), truncation=True, max_length=max_tokens)["input_ids"]

    @torch.no_grad()
    def forward_by_length(self, ids: list[list[int]], forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Rows of equal length go through `forward` together; results in the order of `ids`, float32."""
        groups = defaultdict(list)
        for number, row in enumerate(ids):
            groups[len(row)].append(number)
        results: list = [None] * len(ids)
        for numbers in groups.values():
            output = forward(torch.tensor([ids[n] for n in numbers], device=self.device)).float()
            for n, row in zip(numbers, output, strict=True):
                results[n] = row
        return results


def cached(cache_dir: str | None, name: str) -> Path:
    """The path of a frozen part's files, or one line that says how to get them."""
    remedy = "run scripts/cache_pretrained_only.sh, or set SELFE_SKIP_PRETRAINED=1 for random weights"
    if cache_dir is None:
        raise UserError(
            f"{name} is needed, but SELFE_CACHE_DIR is not set; set it to the folder of the weights, {remedy}"
        )
    path = Path(cache_dir) / name
    if not path.exists():
        raise UserError(f"{path}: not found in SELFE_CACHE_DIR; {remedy}")
    return path
