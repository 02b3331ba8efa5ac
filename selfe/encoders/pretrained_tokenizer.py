"""Tokenizers of pretrained encoders: loaded from a folder, then tested on what they do.

transformers builds a tokenizer from nearly any set of files. With those of another model, or with an empty merge table,
it runs without an error and returns ids that mean nothing to the encoder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as logging_of_transformers

from selfe.errors import UserError
from selfe.io.safetensors_files import AGAIN, read_json, refuse_pointer

SENTENCES = ["a photo of two cats on a chair", "a photo of two dogs on a chair"]
WORD_END = "</w>"  # marks the last piece of a word in CLIP's vocabulary
LEGACY_END = 2  # CLIP's first configurations name this end token, but pool at the highest id


def load_tokenizer(folder: Path, files: tuple[str, ...], rows: int, end_id: int) -> PreTrainedTokenizerBase:
    """The tokenizer of an encoder's folder.

    Args:
        files: what the tokenizer is built from, unless there is a `tokenizer.json`.
        rows: number of rows of the encoder's embedding.
        end_id: id of the end token in the encoder's configuration.

    Raises:
        UserError: a file is missing or damaged, or the tokenizer does not belong to the encoder.
    """
    check_files(folder, files)
    if (folder / "merges.txt").is_file() and (folder / "vocab.json").is_file():
        check_merges(folder / "merges.txt", folder / "vocab.json")
    with plain_errors(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        problem = mismatch(tokenizer, rows, end_id)
    if problem:
        raise UserError(f"{folder}: the tokenizer does not belong to this model: {problem}; {AGAIN}")
    return tokenizer


def check_files(folder: Path, files: tuple[str, ...], remedy: str = AGAIN) -> None:
    """Raise UserError if a file of the tokenizer is missing, a git-LFS pointer, or damaged."""
    present = {path.name: path for path in folder.iterdir()}
    if "tokenizer.json" not in present and (missing := [name for name in files if name not in present]):
        raise UserError(f"{folder / missing[0]}: no such file, and no tokenizer.json in its place; {remedy}")

    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"):
        if name in present:
            read_json(present[name], remedy)

    if "spiece.model" in present:
        refuse_pointer(present["spiece.model"], remedy)
        try:
            model = present["spiece.model"].read_bytes()
            damaged = not model or SentencePieceProcessor(model_proto=model).get_piece_size() == 0
        except RuntimeError:
            damaged = True
        if damaged:
            raise UserError(f"{present['spiece.model']}: not a sentencepiece model, the file is damaged; {remedy}")


def check_merges(merges: Path, vocabulary: Path) -> None:
    """Raise UserError unless CLIP's merges produce exactly the longer tokens of the vocabulary.

    With fewer merges (a file that was cut) words are split into other, still valid tokens.
    """
    refuse_pointer(merges)
    lines = merges.read_text(encoding="utf-8", errors="replace").split("\n")
    merged = {line.replace(" ", "") for line in lines if line.strip() and not line.startswith("#version")}

    special = ("<|startoftext|>", "<|endoftext|>")
    tokens = json.loads(vocabulary.read_text(encoding="utf-8"))
    longer = {token for token in tokens if len(token.removesuffix(WORD_END)) > 1 and token not in special}

    if merged != longer:
        raise UserError(
            f"{merges}: its {len(merged)} merges do not produce the {len(longer)} merged tokens of {vocabulary.name}, "
            f"one of the two files is damaged; {AGAIN}"
        )


def mismatch(tokenizer: PreTrainedTokenizerBase, rows: int, end_id: int) -> str:
    """Why a tokenizer cannot belong to an encoder with this embedding and end token; empty if it may."""
    largest = max(tokenizer.get_vocab().values())
    if not rows // 2 <= largest < rows:
        return f"its ids go up to {largest}, the embedding has {rows} rows"

    encoded = tokenizer(SENTENCES)["input_ids"]
    for sentence, ids in zip(SENTENCES, encoded, strict=True):
        end = max(ids) if end_id == LEGACY_END else end_id
        if ids[-1] != end:
            return f"{sentence!r} ends in the id {ids[-1]}, the end token is {end}"
        if tokenizer.unk_token_id in ids[:-1]:
            return f"{sentence!r} has unknown tokens"
        if len(ids) >= len(sentence.replace(" ", "")):
            return f"{sentence!r} is split into {len(ids)} tokens"

    if encoded[0] == encoded[1]:
        return f"{SENTENCES[0]!r} and {SENTENCES[1]!r} have the same ids"
    return ""


@contextmanager
def plain_errors(folder: Path, remedy: str = AGAIN) -> Iterator[None]:
    """Silence transformers while it loads from a folder, and report its errors as one line that names the folder."""
    verbosity = logging_of_transformers.get_verbosity()
    logging_of_transformers.set_verbosity_error()
    logging_of_transformers.disable_progress_bar()

    try:
        yield
    except Exception as error:  # the tokenizers library raises errors of this class itself
        reason = next((line for line in str(error).splitlines() if line), type(error).__name__)
        if isinstance(error, ImportError):
            remedy = "install the package in this environment"
        raise UserError(f"{folder}: cannot be loaded ({reason}); {remedy}") from error
    finally:
        logging_of_transformers.set_verbosity(verbosity)
        logging_of_transformers.enable_progress_bar()
