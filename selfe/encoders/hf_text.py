"""Any frozen text encoder or decoder language model of Hugging Face: captions to states of its layers."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedConfig, PreTrainedTokenizerFast

from selfe.encoders import hf_folder
from selfe.encoders.token_batches import PAD_MULTIPLE, Code, copy_together, encode, group_by_length, padded
from selfe.errors import UserError
from selfe.io.model_folder import model_name
from selfe.protocols import ShardLoader, TensorReader
from selfe.rng import philox
from selfe.types import DTYPES, MOST_WIDTH, Precision, TextCond, check_range

Norm = Literal["none", "unit", "rms"]
Pooling = Literal["mean", "first", "last", "pooler", "none"]
CAPTION = "{}"  # its place in a template

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """The token ids of a caption in its template, and the range of them that is returned."""

    ids: list[int]
    start: int
    end: int


@dataclass(frozen=True)
class Outputs:
    """What the network returns for B captions of the same padded length n."""

    tokens: Tensor  # (B, n, text_dim), float32
    pooler: Tensor | None  # (B, d), float32


class HFText:
    """Encodes captions as states of one or several layers of a Hugging Face model, at the captions' true lengths.

    Works with encoders (T5, BERT, CLIP's text model, T5Gemma) and with decoders (Qwen3, Gemma-3, SmolLM). Inside,
    captions are padded to the next multiple of 32 tokens and run once per padded length, as those of T5Clip.
    """

    def __init__(
        self,
        model: str,
        text_dim: int,
        cache_dir: Path | None = None,
        skip_pretrained: bool = False,
        layers: int | tuple[int, ...] = -1,
        template: str = CAPTION,
        keep_suffix: bool = False,
        max_tokens: int = 256,
        token_norm: Norm = "none",
        pooling: Pooling = "mean",
        pooled_norm: Norm = "none",
        pooled_dim: int | None = None,
        dtype: Precision = "bf16",
        sha256: tuple[str, ...] = (),
    ):
        """
        Args:
            model: name on the Hub, such as `Qwen/Qwen3-0.6B`, of a folder in `cache_dir`; or the path of a folder,
                which is absolute or starts with `.` or `~`.
            text_dim: width of a token, that of the model times the number of layers.
            cache_dir: folder with the models, each under its name.
            skip_pretrained: use a small network with random weights and a byte-level tokenizer, and read no files.
            layers: the layer whose states are returned, or several, whose states are concatenated. 0 is the embedding,
                n the output of block n; -1, the last layer, is the output of the model, after its final norm.
            template: text around the caption, whose place is `{}`. Only the tokens of the caption are returned.
            keep_suffix: also return the tokens behind the caption; those of a decoder have read the caption.
            max_tokens: maximum number of tokens returned; longer captions are truncated, with one warning.
            token_norm: scale each token to length 1 (`unit`), or to a root mean square of 1 (`rms`).
            pooling: the pooled vector. `mean` of the returned tokens; the `first` or the `last` token of all, template
                included; the model's own `pooler` output, as CLIP has it; `none`: zeros.
            pooled_norm: as `token_norm`, for the pooled vector.
            pooled_dim: width of the pooled vector; by default that of a token, and 1 if there is none.
            dtype: precision of the network.
            sha256: expected hashes of the safetensors files, in the order of their names. By default not checked.
        """
        self.layers = (layers,) if isinstance(layers, int) else tuple(layers)
        check_range("text_dim", text_dim, 1, MOST_WIDTH)
        check_range("pooled_dim", pooled_dim, 1, MOST_WIDTH)
        check_range("max_tokens", max_tokens, 1, 10_000)
        check_range("layers", self.layers, -1000, 1000)
        if not self.layers:
            raise ValueError("layers: name at least one layer, such as -1")
        if text_dim % len(self.layers):
            raise ValueError(f"text_dim {text_dim} must be a multiple of the number of layers, {len(self.layers)}")
        if template.count(CAPTION) != 1:
            raise ValueError(f"template {template!r} must have {{}} once, where the caption belongs")

        # width of the pooled vector
        natural = {"pooler": text_dim // len(self.layers), "none": pooled_dim or 1}.get(pooling, text_dim)
        if pooled_dim not in (None, natural):
            raise ValueError(f"pooled_dim must be {natural} for the pooling {pooling!r}, got {pooled_dim}")

        self.model, self.cache_dir, self.skip_pretrained = model, cache_dir, skip_pretrained
        self.template, self.keep_suffix, self.max_tokens = template, keep_suffix, max_tokens
        self.token_norm, self.pooling, self.pooled_norm = token_norm, pooling, pooled_norm
        self.text_dim, self.pooled_dim = text_dim, natural
        self.precision, self.dtype, self.sha256 = dtype, DTYPES[dtype], sha256
        self.num_cut = 0  # truncated captions
        self.count_words = False  # a token per word, for captions of a wanted length on the meta device

    def output_settings(self) -> dict[str, Any]:
        return {
            "model": model_name(self.model),
            "skip_pretrained": self.skip_pretrained,
            "layers": list(self.layers),
            "template": self.template,
            "keep_suffix": self.keep_suffix,
            "max_tokens": self.max_tokens,
            "token_norm": self.token_norm,
            "pooling": self.pooling,
            "pooled_norm": self.pooled_norm,
            "dtype": self.precision,
            "padding": f"to a multiple of {PAD_MULTIPLE}",
        }

    # ---- loading ----

    def load(self, device: torch.device, shard: ShardLoader | None = None) -> None:
        """Load tokenizer and weights onto the device. With `shard`, the network is sharded over ranks.

        On the meta device no weights are read: outputs have shapes but no values.

        Raises:
            UserError: files are missing or damaged, or do not fit the settings.
        """
        self.device, self.sharded = device, shard is not None
        config, read = self.stand_in() if self.skip_pretrained else self.pretrained()
        blocks = [self.net.get_input_embeddings(), *blocks_of(self.net)]
        buffers = {name: buffer.to(device) for name, buffer in self.net.named_buffers()}
        (shard or self.materialise)(self.net, blocks, read)
        for name, buffer in buffers.items():  # without their values since the parameters were allocated
            owner, _, attribute = name.rpartition(".")
            setattr(self.net.get_submodule(owner), attribute, buffer)

        self.takes_scores_mask, self.window = takes_scores_mask(self.net), attention_window(config)
        self.is_causal = device.type != "meta" and self.measure_causality()
        self.check_length()
        self.empty = self.encode_each([""])[0]  # the empty caption is needed in every step
        self.check_widths()

    def pretrained(self) -> tuple[PreTrainedConfig, TensorReader]:
        """Open the files of the model: makes the tokenizer and the network, without its weights."""
        folder, advice = hf_folder.model_folder(self.model, self.cache_dir), hf_folder.remedy(self.model)
        config = hf_folder.read_config(folder, advice)
        with hf_folder.plain_errors(folder, advice):
            self.net = hf_folder.empty_network(config, self.dtype)
        self.drop_unused(config)

        rows = self.net.get_input_embeddings().weight.shape[0]
        self.tokenizer = hf_folder.load_fast_tokenizer(folder, rows, advice)
        self.pad_id = config.pad_token_id or 0
        if self.device.type == "meta":
            return config, self.no_values
        return config, hf_folder.open_weights(folder, self.net, self.sha256, advice)

    def stand_in(self) -> tuple[PreTrainedConfig, TensorReader]:
        """As `pretrained`, without files: a BERT of few layers with random weights, the same on every machine."""
        self.tokenizer, width = byte_tokenizer(), self.text_dim // len(self.layers)
        config = BertConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=width,
            num_hidden_layers=max(2, *map(abs, self.layers)),
            num_attention_heads=next(heads for heads in (8, 4, 2, 1) if width % heads == 0),
            intermediate_size=2 * width,
            max_position_embeddings=self.max_tokens + 8 * len(self.template) + PAD_MULTIPLE,
        )
        self.net, self.pad_id = hf_folder.empty_network(config, self.dtype), 0
        self.drop_unused(config)

        shapes = {name: parameter.shape for name, parameter in self.net.named_parameters()}
        read = self.no_values if self.device.type == "meta" else lambda name, rows: random(name, shapes[name])[rows]
        return config, read

    def drop_unused(self, config: PreTrainedConfig) -> None:
        """Remove what the outputs do not need: the pooling head, and blocks behind the last of the layers.

        Raises:
            UserError: the network has no such layer.
        """
        if self.pooling != "pooler" and isinstance(getattr(self.net, "pooler", None), nn.Module):
            self.net.pooler = None  # some checkpoints lack it

        blocks = blocks_of(self.net)
        self.num_blocks = getattr(config, "num_hidden_layers", None)
        if len(blocks) != self.num_blocks:
            self.num_blocks = None  # repeated or nested blocks
            return
        deepest = max(self.layer_number(layer, self.num_blocks) for layer in self.layers)
        if self.pooling == "pooler":
            return  # the pooling head reads the last block
        del blocks[deepest + 1 :]  # one more than needed: the model applies its final norm to the last one

    def no_values(self, name: str, rows: slice) -> Tensor:
        """A `TensorReader` for the meta device."""
        return torch.empty(self.net.get_parameter(name).shape, dtype=self.dtype, device="meta")[rows]

    def materialise(self, module: nn.Module, blocks: Iterable[nn.Module], read: TensorReader) -> None:
        """A `ShardLoader` without sharding: materialise the module on this device and read all parameters."""
        module.to_empty(device=self.device)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(read(name, slice(None)))

    @torch.no_grad()
    def measure_causality(self) -> bool:
        """Whether tokens attend to earlier tokens only, so that padding behind them needs no mask.

        Measured, because models name this property in different ways: does the first token depend on the second?
        """
        ids = torch.tensor([[3, 4], [3, 5]], device=self.device)
        states = self.net(input_ids=ids).last_hidden_state
        return torch.equal(states[0, 0], states[1, 0]) and not torch.equal(states[0, 1], states[1, 1])

    def check_length(self) -> None:
        """Find the largest number of positions. Raises UserError if a caption of `max_tokens` has more."""
        self.max_positions = num_positions(self.net)
        (row,) = self.rows(["a"])
        self.num_before, self.num_behind = row.start, len(row.ids) - row.end
        longest = self.max_tokens + self.num_before + self.num_behind
        if self.max_positions is not None and longest > self.max_positions:
            raise UserError(
                f"system.text_encoder.params.max_tokens: {self.max_tokens} tokens and those of the template are "
                f"{longest}, {self.model} has {self.max_positions} positions; lower max_tokens"
            )

    def check_widths(self) -> None:
        """Raise UserError if the outputs do not have the configured widths."""
        tokens, pooled = self.empty
        for key, value, width in (
            ("text_dim", self.text_dim, tokens.shape[1]),
            ("pooled_dim", self.pooled_dim, len(pooled)),
        ):
            if value != width:
                where = f"{len(self.layers)} layers" if len(self.layers) > 1 else "a layer"
                raise UserError(
                    f"system.text_encoder.params.{key}: is {value}, but the states of {where} of {self.model} have the "
                    f"width {width}; set {key}, and that of the backbone, to {width}"
                )

    # ---- encoding ----

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> TextCond:
        """Captions -> text (T, text_dim) and pooled (B, pooled_dim), float32."""
        return encode(captions, self.encode_each, self.empty, self.sharded)

    @torch.no_grad()
    def encode_each(self, captions: Sequence[str]) -> list[Code]:
        """Encode captions: B x (tokens (n, text_dim), pooled (pooled_dim,)), float32."""
        rows = self.rows(captions)
        groups = group_by_length([len(row.ids) for row in rows], self.max_positions, same=self.sharded)

        # of each group the padded ids, and where the returned tokens start and end
        host = []
        for length, group in groups.items():
            host.append(padded([rows[index].ids for index in group], length, self.pad_id))
            host.append(torch.tensor([[rows[index].start, rows[index].end] for index in group]))
        tensors = copy_together(host, self.device)

        codes: dict[int, Code] = {}
        for group, ids, ranges in zip(groups.values(), tensors[::2], tensors[1::2], strict=True):
            outputs = self.forward(ids[:, 1:], ids[:, :1])
            values = normalised(outputs.tokens, self.token_norm), self.pool(outputs, ids[:, :1], ranges)
            tokens, pooled = (value.to(self.dtype).float() for value in values)  # as a cache in bf16 has them
            for place, index in enumerate(group):
                codes[index] = tokens[place, rows[index].start : rows[index].end], pooled[place]
        return [codes[index] for index in range(len(rows))]

    def forward(self, ids: Tensor, lengths: Tensor) -> Outputs:
        """Padded token ids (B, n) and their true lengths (B, 1)."""
        inner = any(layer != -1 for layer in self.layers)
        output = self.net(input_ids=ids, attention_mask=self.mask(ids, lengths), output_hidden_states=inner)

        states = [self.state(output, layer) if inner else output.last_hidden_state for layer in self.layers]
        tokens = torch.cat([state.float() for state in states], dim=-1)
        pooler = getattr(output, "pooler_output", None)
        return Outputs(tokens, None if pooler is None else pooler.float())

    def mask(self, ids: Tensor, lengths: Tensor) -> Tensor | None:
        """The attention mask of padded ids, in the form that the network takes; None if it needs none.

        A mask in the shape of the scores (B, heads, queries, keys), where transformers uses it as it is. Given (B, n)
        or none, it reads the values of masks or positions, which waits for the device.
        """
        num_tokens = ids.shape[1]
        places = torch.arange(num_tokens, device=ids.device)
        sees_all = self.window is None or num_tokens <= self.window or ids.is_meta
        if not self.takes_scores_mask or not sees_all:
            return None if self.is_causal else (places < lengths).long()

        # where tokens see earlier ones only, they do not see the padding behind them
        later, padding = (places > places[:, None])[None, None], (places >= lengths)[:, None, None]
        hidden = later if self.is_causal else padding
        return torch.zeros_like(hidden, dtype=self.dtype).masked_fill(hidden, torch.finfo(self.dtype).min)

    def state(self, output: Any, layer: int) -> Tensor:
        """The states (B, n, d) of a layer. Raises UserError if the network has no such layer."""
        num_blocks = self.num_blocks or len(output.hidden_states) - 1
        number = self.layer_number(layer, num_blocks)
        return output.last_hidden_state if number == num_blocks else output.hidden_states[number]

    def layer_number(self, layer: int, num_blocks: int) -> int:
        """A layer counted from 0, the embedding. Raises UserError if the network has no such layer."""
        if not -num_blocks - 1 <= layer <= num_blocks:
            raise UserError(
                f"system.text_encoder.params.layers: {layer}; {self.model} has the layers 0 to {num_blocks}, and -1 to "
                f"{-num_blocks - 1} counted from the last"
            )
        return layer % (num_blocks + 1)

    def pool(self, outputs: Outputs, lengths: Tensor, ranges: Tensor) -> Tensor:
        """The pooled vectors (B, pooled_dim); `ranges` (B, 2) are the returned tokens."""
        tokens = outputs.tokens
        if self.pooling == "none":
            return tokens.new_zeros(len(tokens), self.pooled_dim)

        if self.pooling == "pooler":
            if outputs.pooler is None:
                raise UserError(
                    f"system.text_encoder.params.pooling: {self.model} has no pooler output; use mean, first or last"
                )
            vectors = outputs.pooler
        elif self.pooling == "first":
            vectors = tokens[:, 0]
        elif self.pooling == "last":
            vectors = tokens.gather(1, (lengths - 1)[:, :, None].expand(-1, -1, tokens.shape[2]))[:, 0]
        else:
            starts, ends = ranges[:, :1], ranges[:, 1:]
            places = torch.arange(tokens.shape[1], device=tokens.device)
            inside = ((places >= starts) & (places < ends))[:, :, None]
            vectors = tokens.where(inside, 0).sum(dim=1) / (ends - starts)
        return normalised(vectors, self.pooled_norm)

    # ---- token ids ----

    def rows(self, captions: Sequence[str]) -> list[Row]:
        """The token ids of captions in the template, truncated so that at most `max_tokens` are returned."""
        if self.count_words:
            return [self.row_of_words(caption) for caption in captions]
        prefix, _, suffix = self.template.partition(CAPTION)
        texts = [prefix + caption + suffix for caption in captions]
        encoded = self.tokenizer(texts, return_offsets_mapping=True, verbose=False)
        rows, long = [], []
        for caption, ids, offsets in zip(captions, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            row, num_tokens = self.row(ids, offsets, len(prefix), len(prefix) + len(caption))
            rows.append(row)
            if num_tokens > self.max_tokens:
                long.append((num_tokens, caption))

        if long and not self.num_cut:
            logger.warning(
                "captions are truncated to %d tokens; first one (%d tokens): %.60s...", self.max_tokens, *long[0]
            )
        self.num_cut += len(long)
        return rows

    def row_of_words(self, caption: str) -> Row:
        """A row without ids for a caption of as many tokens as words, in the template."""
        num_words = min(max(len(caption.split()), 1), self.max_tokens)
        return Row([0] * (self.num_before + num_words + self.num_behind), self.num_before, self.num_before + num_words)

    def row(self, ids: list[int], offsets: list[tuple[int, int]], begin: int, stop: int) -> tuple[Row, int]:
        """The row of a caption that is the characters `begin` to `stop` of the text, and its tokens before truncation.

        A token that stands for characters of both the caption and the template belongs to the caption.
        """
        if not ids:
            ids, offsets = [self.blank_id()], [(0, 0)]

        # tokens without characters (start and end of a text) belong to neither
        inside = [index for index, (low, high) in enumerate(offsets) if low < high and low < stop and high > begin]
        behind = [index for index, (low, high) in enumerate(offsets) if low < high and low >= stop]
        first = inside[0] if inside else (behind[0] if behind else len(ids) - 1)
        last = inside[-1] + 1 if inside else first

        # the tokens to return: without a template all of them
        start, end = first, (len(ids) if self.keep_suffix else last)
        if self.template == CAPTION:
            start, end = 0, len(ids)
        elif start == end:
            start, end = len(ids) - 1, len(ids)  # an empty caption: the last token, which has read the template

        # truncate the caption, and keep what surrounds it
        excess = end - start - self.max_tokens
        if excess > 0:
            cut = max(last - excess, first)
            ids, end = ids[:cut] + ids[last:], end - (last - cut)
        return Row(ids, start, end), end - start + max(excess, 0)

    def blank_id(self) -> int:
        """The token that an empty caption consists of, if the tokenizer adds none."""
        tokenizer = self.tokenizer
        ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, 0)
        return next(number for number in ids if number is not None)


def blocks_of(network: nn.Module) -> nn.ModuleList:
    """The blocks of a network, which are sharded one by one: its longest list of modules."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())


def takes_scores_mask(network: nn.Module) -> bool:
    """Whether a network takes a mask in the shape of the attention scores as it is: if it makes its own with the shared
    functions of transformers."""
    module = sys.modules[type(network).__module__]
    return hasattr(module, "create_causal_mask") or hasattr(module, "create_bidirectional_mask")


def attention_window(config: PreTrainedConfig) -> int | None:
    """The number of tokens up to which all layers attend to all tokens; None if they always do."""
    inner = getattr(config, "encoder", None)
    config = inner if isinstance(inner, PreTrainedConfig) else config
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if (kinds is None and window is None) or (kinds is not None and set(kinds) == {"full_attention"}):
        return None
    return (window or 0) // 2  # encoders attend to half of it on each side


def num_positions(network: nn.Module) -> int | None:
    """The largest number of tokens that a network takes; None if it has no limit."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith(("position_embedding", "position_embeddings")):
            unused = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa counts from there
            return module.num_embeddings - unused
    return getattr(network.config, "max_position_embeddings", None)


def normalised(values: Tensor, norm: Norm) -> Tensor:
    """Vectors (..., d) of length 1 (`unit`), or of root mean square 1 (`rms`)."""
    if norm == "none":
        return values
    values = nn.functional.normalize(values, dim=-1)
    return values * values.shape[-1] ** 0.5 if norm == "rms" else values


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer without files: a token per byte, and one at the end."""
    special = ["<pad>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *letters])}

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def random(name: str, shape: torch.Size) -> Tensor:
    """A random parameter of a stand-in, a function of its name and shape."""
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    std = 1.0 if "embeddings" in name else shape[1] ** -0.5
    generator = torch.Generator().manual_seed(int(philox("hf_text", name).integers(2**63)))
    return torch.empty(shape).normal_(0, std, generator=generator)
