"""Hugging Face models as extractors: their own preprocessing, embeddings and pooled outputs; one line for mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2Model

from selfe.errors import UserError
from selfe.evaluation import hf_extractor
from selfe.evaluation.hf_extractor import HFExtractor
from tests.helpers.encoder_files import write_clip
from tests.helpers.images import make_image

CPU = torch.device("cpu")
PROCESSOR = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "crop_size": {"height": 224, "width": 224}}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A folder as SELFE_CACHE_DIR, with a tiny CLIP and a tiny DINOv2."""
    folder = tmp_path_factory.mktemp("cache")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        write_clip(folder / "openai/clip")
        size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2}
        Dinov2Model(Dinov2Config(image_size=56, patch_size=14, **size)).save_pretrained(folder / "facebook/dino")
    (folder / "openai/clip/preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    processor = PROCESSOR | {"crop_size": {"height": 56, "width": 56}}
    (folder / "facebook/dino/preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def loaded(*arguments, **keywords) -> HFExtractor:
    extractor = HFExtractor(*arguments, **keywords)
    extractor.load(CPU)
    return extractor


def images() -> list[torch.Tensor]:
    arrays = [np.asarray(make_image(seed, (40 + 8 * seed, 48))) for seed in range(3)]
    return [torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 127.5 - 1 for array in arrays]


def as_clean_fid(image: torch.Tensor, side: int) -> np.ndarray:
    """(side, side, 3) in [0, 255]: Pillow's bicubic in floating point, channel by channel, and clipped."""
    channels = [Image.fromarray(channel.numpy()) for channel in (image + 1) * 127.5]
    resized = [np.asarray(channel.resize((side, side), Image.Resampling.BICUBIC)) for channel in channels]
    return np.stack(resized, axis=-1).clip(0, 255)


@pytest.mark.parametrize("side", [16, 56])
def test_images_are_resized_as_clean_fid_does(side):
    for image in images():
        ours = (hf_extractor.resized(image[None], side)[0].permute(1, 2, 0) + 1) * 127.5
        np.testing.assert_allclose(ours, as_clean_fid(image, side), atol=0.01)


@pytest.mark.parametrize("model", ["facebook/dino", "openai/clip"])
def test_maps_are_unit_vectors_at_each_position(cache, model):
    extractor = loaded(model, cache, maps=2)
    output = extractor(images(), ["", "", ""])
    plain = loaded(model, cache)
    torch.testing.assert_close(output["features"], plain(images(), ["", "", ""])["features"])
    assert extractor.record() == plain.record() | {"maps": 2}

    maps = output["maps"].unflatten(1, (-1, 4))
    torch.testing.assert_close(maps.norm(dim=1), torch.full((3, 4), 0.5))
    torch.testing.assert_close(output["maps"].norm(dim=1), torch.ones(3))

    # the distance of two images is the mean of the cosine distances at their positions
    distance = 1 - output["maps"][0] @ output["maps"][1]
    torch.testing.assert_close(distance, (1 - F.cosine_similarity(maps[0], maps[1], dim=0)).mean())


def test_clip_gives_aligned_embeddings_of_images_and_captions(cache):
    extractor = loaded("openai/clip", cache)
    assert extractor.has_texts
    output = extractor(images(), ["", "", ""])

    # the model itself on the images as clean-fid resizes them
    folder = cache / "openai/clip"
    net, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    mean, std = np.array(PROCESSOR["image_mean"]), np.array(PROCESSOR["image_std"])
    pixels = np.stack([(as_clean_fid(image, 224) / 255 - mean) / std for image in images()])
    wanted = net.get_image_features(pixel_values=torch.from_numpy(pixels).float().permute(0, 3, 1, 2))
    torch.testing.assert_close(output["features"], hf_extractor.embedding(wanted), atol=1e-3, rtol=1e-3)
    assert output["aligned"] is output["features"]

    # captions of different lengths, alone and together
    captions = ["a red bird", "a quiet street in the rain at night, seen from above"]
    together = extractor.texts(captions)
    for caption, row in zip(captions, together, strict=True):
        wanted = hf_extractor.embedding(net.get_text_features(**tokenizer([caption], return_tensors="pt")))
        torch.testing.assert_close(row[None], wanted, atol=1e-5, rtol=1e-4)


def test_models_without_texts_give_their_pooled_output_or_means_of_tokens(cache):
    extractor = loaded("facebook/dino", cache)
    assert not extractor.has_texts
    assert extractor.side == 56
    pooled = extractor(images(), [""] * 3)
    assert pooled.keys() == {"features"}
    assert pooled["features"].shape == (3, 16)
    first = loaded("facebook/dino", cache, output="cls")(images(), [""] * 3)["features"]
    torch.testing.assert_close(pooled["features"], first)  # of DINOv2, the pooled output is the first token
    mean = loaded("facebook/dino", cache, output="mean")(images(), [""] * 3)["features"]
    assert mean.shape == (3, 16)
    assert not torch.allclose(mean, first)


def test_the_record_names_model_weights_and_resizing(cache):
    record = HFExtractor("facebook/dino", cache).record()
    assert record["model"] == "facebook/dino"
    assert record["resize"] == "56 x 56, antialiased bicubic, no crop"
    assert [len(value) for value in record["weights"]] == [64]
    assert HFExtractor(str(cache / "openai/clip")).record()["weights"] != record["weights"]


def test_missing_models_and_weights_are_named(cache, tmp_path):
    with pytest.raises(
        UserError, match="facebook/x: no such folder; download it with selfe cache-pretrained --vision-model facebook/x"
    ):
        HFExtractor("facebook/x", cache)
    with pytest.raises(UserError, match="SELFE_CACHE_DIR is not set"):
        HFExtractor("facebook/dino")

    # weights without a tensor of the model
    copy = tmp_path / "dino"
    copy.mkdir()
    for file in (cache / "facebook/dino").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    described = json.loads((copy / "config.json").read_text()) | {"num_hidden_layers": 2}
    (copy / "config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"the weights have no .*layer.1.*, which the model of config.json needs"):
        loaded(str(copy))
