"""Text encoders that remember what they have encoded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from selfe import compare, config
from selfe.encoders.remembered_text import RememberedText
from selfe.errors import UserError
from selfe.types import TextCond, packed

MINI = Path(__file__).parents[2] / "configs/mini/selfe.yaml"
REMEMBERED = "selfe.encoders.remembered_text.RememberedText"


class Letters:
    """A text encoder of one token per letter that keeps count."""

    text_dim = pooled_dim = 1

    def __init__(self):
        self.seen = []

    def load(self, device, shard=None):
        pass

    def __call__(self, captions):
        self.seen += captions
        codes = [torch.tensor([[float(ord(c))] for c in caption + "."]) for caption in captions]
        return TextCond(packed(torch.cat(codes), [(1, len(c)) for c in codes]), torch.stack([c.sum(0) for c in codes]))


def test_texts_are_encoded_once_while_there_is_room():
    letters = Letters()
    remembered = RememberedText(letters, max_tokens=12)
    remembered.load(torch.device("cpu"))
    for captions in (["abc", "", "abc"], ["de", "abc"], ["", "de"]):
        conditioning, expected = remembered(captions), Letters()(captions)
        assert torch.equal(conditioning.text.tokens, expected.text.tokens)
        assert conditioning.text.grids == expected.text.grids
        assert torch.equal(conditioning.pooled, expected.pooled)
    assert letters.seen == ["abc", "", "de"]
    remembered(["fghijk"])  # 7 tokens more: the longest unused goes, the null prompt stays
    remembered(["", "de", "abc"])
    assert letters.seen == ["abc", "", "de", "fghijk", "abc"]


def test_ranks_that_share_an_encoder_cannot_remember_different_captions():
    with pytest.raises(UserError, match=r"trainer\.shard_text_encoder: cannot be used with RememberedText"):
        RememberedText(Letters()).load(torch.device("cpu"), shard=lambda *_: None)


def test_a_config_names_it_around_another_encoder(tmp_path):
    """It computes the same, and runs are compared by the encoder inside."""
    words = config.plain(config.load(MINI)["system"]["text_encoder"])
    settings = {"base": str(MINI), "system": {"text_encoder": {"module": REMEMBERED, "params": {"encoder": words}}}}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(settings))

    captions = ["red cross on blue", "", "red cross on blue"]
    encoders = [config.build(config.load(source), "system").text_encoder for source in (MINI, path)]
    for encoder in encoders:
        encoder.load(torch.device("cpu"))
    expected, conditioning = (encoder(captions) for encoder in encoders)
    assert torch.equal(conditioning.text.tokens, expected.text.tokens)
    assert torch.equal(conditioning.pooled, expected.pooled)

    described = [compare.describe_system(compare.uncached(config.load(source)["system"])) for source in (MINI, path)]
    assert described[0] == described[1]
