"""A pretrained text model of the Hugging Face Hub in a folder: its configuration, tokenizer, network and weights.

Only safetensors files are read, and no code of the folder is run.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from selfe import packaged
from selfe.encoders.pretrained_tokenizer import SENTENCES, check_files, plain_errors
from selfe.errors import UserError
from selfe.io.model_folder import find_model, is_path
from selfe.io.safetensors_files import SafetensorsFiles, read_json
from selfe.protocols import TensorReader

# models that no mask makes independent of padding, and why
UNSUITABLE = {
    "siglip_text_model": "it was trained on captions padded to 64 tokens, and reads the padding",
    "siglip2_text_model": "it was trained on captions padded to 64 tokens, and reads the padding",
}

# names in old checkpoints of BERT
OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


def model_folder(model: str, cache_dir: Path | None) -> Path:
    """The folder of a model (`find_model`); one that the cache folder does not have may be installed as a package.

    Raises:
        UserError: there is no such folder; the message has the command that downloads it.
    """
    installed = packaged.folder(model)
    if installed is not None and not (cache_dir and (Path(cache_dir) / model).is_dir()):
        return installed
    return find_model(model, cache_dir, "system.text_encoder.params.model", remedy(model))


def remedy(model: str) -> str:
    """How to get the files of a model."""
    if is_path(model):
        return "copy the files of the model again"
    return f"download it with selfe cache-pretrained --text-encoder {model}{packaged.remedy(model)}"


def read_config(folder: Path, advice: str) -> PreTrainedConfig:
    """The configuration of the text encoder in a folder: for models of text and images, that of the text part.

    Raises:
        UserError: it is missing or damaged, or transformers has no text encoder for it.
    """
    described = read_json(folder / "config.json", advice)
    if "auto_map" in described and "model_type" not in described:
        raise UserError(f"{folder}/config.json: auto_map: the model is code in its folder, which is not run")
    with plain_errors(folder, advice):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    if type(config) not in MODEL_FOR_TEXT_ENCODING_MAPPING:
        if config.is_encoder_decoder:
            raise UserError(f"{folder}: transformers has no class for the encoder alone of a {config.model_type} model")
        config = config.get_text_config()
    if type(config) not in MODEL_FOR_TEXT_ENCODING_MAPPING and type(config) not in MODEL_MAPPING:
        raise UserError(f"{folder}: transformers has no text encoder for the model_type {config.model_type}")

    if config.model_type in UNSUITABLE:
        raise UserError(f"{folder}: {config.model_type} cannot be used: {UNSUITABLE[config.model_type]}")

    config.is_encoder_decoder = config.use_cache = False
    return config


def empty_network(config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    """The network of a configuration: parameters on the meta device, buffers (such as rotary tables) with values."""
    text_only = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
    with init_empty_weights(include_buffers=False):
        network = (AutoModelForTextEncoding if text_only else AutoModel).from_config(config, dtype=dtype)
    network.set_input_embeddings(network.get_input_embeddings())  # T5: share one module, so that it is read once
    return network.eval().requires_grad_(False)


def open_weights(folder: Path, network: nn.Module, hashes: Sequence[str], advice: str) -> TensorReader:
    """A reader of the network's parameters by their names.

    Checkpoints hold the network under a prefix, such as `model.`, beside tensors that are not needed.

    Args:
        hashes: sha256 of the safetensors files, in the order of their names; not checked if empty.

    Raises:
        UserError: a file is missing, damaged or not the expected one, or it belongs to another network.
    """
    if not list(folder.glob("*.safetensors*")) and (others := sorted(folder.glob("*.bin"))):
        raise UserError(f"{others[0]}: only safetensors is read, because loading other formats can run code; {advice}")
    weights = SafetensorsFiles.open(folder, advice)
    check_hashes(folder, sorted(set(weights.files.values())), hashes)

    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    names = stored_names(shapes, weights.shapes)
    if missing := [name for name in shapes if ".experts." in name and names[name] not in weights.shapes]:
        raise UserError(f"{folder}: {missing[0]} is stored in parts; mixtures of experts are not supported")
    stored_shapes = {names[name]: shape for name, shape in shapes.items()}
    weights.expect(stored_shapes, f"the {type(network).__name__} of config.json", advice)
    return lambda name, rows: weights.read(names[name], rows)


def stored_names(wanted: Iterable[str], stored: Iterable[str]) -> dict[str, str]:
    """The name in the file of each wanted tensor, with the prefix under which the file has most of them."""
    wanted, stored = list(wanted), set(stored)
    first = wanted[0]
    prefixes = [name.removesuffix(first) for name in sorted(stored) if name == first or name.endswith(f".{first}")]
    prefix = max(prefixes or [""], key=lambda prefix: sum(prefix + name in stored for name in wanted))

    names = {}
    for name in wanted:
        names[name] = prefix + name
        for new, old in OLD_NAMES.items():
            other = prefix + name.removesuffix(new) + old
            if name.endswith(new) and names[name] not in stored and other in stored:
                names[name] = other
    return names


def check_hashes(folder: Path, files: Sequence[Path], hashes: Sequence[str]) -> None:
    """Raise UserError unless the sha256 of the files are these; empty: not checked."""
    if hashes and len(hashes) != len(files):
        raise UserError(f"{folder}: has {len(files)} safetensors files, but params.sha256 has {len(hashes)} values")
    for file, wanted in zip(files, hashes, strict=False):
        if (actual := sha256(file)) != wanted.lower():
            raise UserError(f"{file}: its sha256 is {actual}, system.text_encoder.params.sha256 expects {wanted}")


def sha256(file: Path) -> str:
    """The hash of a file, in hexadecimal."""
    hasher = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 24):
            hasher.update(chunk)
    return hasher.hexdigest()


def load_fast_tokenizer(folder: Path, rows: int, advice: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder.

    Args:
        rows: number of rows of the network's embedding.

    Raises:
        UserError: a file is missing or damaged, the tokenizer does not belong to the network, or it does not know which
            characters a token stands for.
    """
    check_files(folder, (), advice)
    with plain_errors(folder, advice):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        problem = mismatch(tokenizer, rows)
    if problem:
        raise UserError(f"{folder}: the tokenizer does not belong to this model: {problem}; {advice}")
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: {type(tokenizer).__name__} is a tokenizer in Python; a tokenizer.json is needed")
    return tokenizer


def mismatch(tokenizer: PreTrainedTokenizerBase, rows: int) -> str:
    """Why a tokenizer cannot belong to a network with an embedding of so many rows; empty if it may."""
    encoded = tokenizer(SENTENCES, add_special_tokens=False)["input_ids"]
    largest = max(itertools.chain(tokenizer.get_vocab().values(), *encoded))
    if not rows // 2 <= largest < rows:
        return f"its ids go up to {largest}, the embedding has {rows} rows"

    for sentence, ids in zip(SENTENCES, encoded, strict=True):
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            return f"{sentence!r} has unknown tokens"
    if encoded[0] == encoded[1]:
        return f"{SENTENCES[0]!r} and {SENTENCES[1]!r} have the same ids"
    return ""
