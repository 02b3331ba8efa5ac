"""The miniature's data set, and the encoders that replace VAE and T5."""

import numpy as np
import pytest
import torch

from selfe.backbones.mmdit import MMDiT
from selfe.data.shapes import COLOURS, COMBINATIONS, ShapesData
from selfe.encoders.identity import Identity
from selfe.encoders.words import Words
from selfe.errors import UserError
from selfe.rng import SampleRNG
from selfe.types import TextCond, packed

CPU = torch.device("cpu")


def test_a_picture_depends_on_seed_and_number_alone():
    data = ShapesData()
    complete = data.batch(3, 5, range(40, 48), range(8), "train")
    parts = [data.batch(3, 5, range(40, 48), positions, "train") for positions in (range(3), range(3, 8))]
    assert complete.prompts == parts[0].prompts + parts[1].prompts
    for a, b in zip(complete.images, parts[0].images + parts[1].images, strict=True):
        assert torch.equal(a, b)
    other = data.batch(4, 5, range(40, 48), range(8), "train")
    assert not torch.equal(complete.images[0], other.images[0])


def test_held_out_combinations_are_in_validation_and_nowhere_else():
    data = ShapesData(held_out=6)
    prompts = {split: set(data.batch(0, 0, range(2000), range(2000), split).prompts) for split in ("train", "val")}
    assert len(prompts["train"]) == len(COMBINATIONS) - 6
    assert len(prompts["val"]) == 6
    assert not prompts["train"] & prompts["val"]


def test_pictures_show_what_their_captions_say():
    data = ShapesData(size=32, held_out=0)
    batch = data.batch(0, 0, range(400), range(400), "train")
    for image, prompt in zip(batch.images, batch.prompts, strict=True):
        foreground, shape, _, background = prompt.split()
        assert image.abs().max() <= 1
        nearest = {
            name: (image - torch.tensor(colour)[:, None, None]).abs().amax(dim=0) < 0.25
            for name, colour in COLOURS.items()
        }
        shown, ground = nearest[foreground], nearest[background]
        assert shown.sum() > 40
        assert ground.sum() > 300
        assert shown.sum() + ground.sum() > 0.85 * 32 * 32  # the rest is the edge between them
        rows, columns = shown.any(dim=1).sum().item(), shown.any(dim=0).sum().item()
        filled = shown.sum().item() / (rows * columns)
        assert {"plank": columns > 1.7 * rows, "pole": rows > 1.7 * columns}.get(shape, abs(rows - columns) < 3)
        assert filled < 0.75 if shape == "cross" else filled > 0.9


def test_contrast_varies_the_norm():
    def norms(**changes) -> torch.Tensor:
        images = ShapesData(**changes).batch(0, 0, range(300), range(300), "train").images
        return torch.stack([image.norm() for image in images]).log()

    assert norms().std() < 0.1
    assert norms(contrast=(0.15, 1.0)).std() > 0.4


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"held_out": 48}, "held_out"), ({"radius": (0.4, 0.6)}, "radius"), ({"contrast": (0, 1)}, "contrast")],
)
def test_impossible_data_are_refused(changes, word):
    with pytest.raises(ValueError, match=word):
        ShapesData(**changes)


def test_pixels_come_back_as_they_were():
    autoencoder = Identity(patch=2)
    autoencoder.load(CPU)
    images = [torch.randn(3, 4, 6), torch.randn(3, 2, 2)]
    latents = autoencoder.encode(images, SampleRNG(((0,), (1,))))
    assert latents.grids == ((2, 3), (1, 1))
    assert latents.tokens.shape == (7, autoencoder.token_dim)
    for image, decoded in zip(images, autoencoder.decode(latents), strict=True):
        assert torch.equal(image, decoded)
    # the first token is the upper left patch
    assert torch.equal(latents.tokens[0], images[0][:, :2, :2].flatten())
    noise = autoencoder.noise([(4, 6), (2, 2)], SampleRNG(((0,), (1,))))
    assert noise.grids == latents.grids
    with pytest.raises(UserError, match="multiples of 2"):
        autoencoder.noise([(3, 4)], SampleRNG(((0,),)))


def test_words_are_the_same_everywhere_and_their_order_matters():
    encoder = Words(dim=32, max_words=4)
    encoder.load(CPU)
    captions = ["red cross on blue", "blue cross on red", "", "red cross on blue and more"]
    cond = encoder(captions)
    assert cond.text.lens == (4, 4, 1, 4)
    assert torch.equal(cond.pooled[0], cond.pooled[3])
    assert (cond.pooled[0] - cond.pooled[1]).norm() > 1
    alone = encoder(captions[1:2])
    assert torch.equal(alone.text.tokens, cond.text.split()[1])
    assert torch.equal(alone.pooled[0], cond.pooled[1])
    words = torch.stack([encoder([word]).text.tokens[0] for word in ("red", "blue", "cross", "on")])
    assert torch.cdist(words, words)[~torch.eye(4, dtype=bool)].min() > 4


def test_learned_places_start_at_zero_and_tell_places_apart():
    net = MMDiT(
        patch_dim=12, text_dim=8, pooled_dim=8, width=48, num_heads=2, num_double_blocks=1, num_single_blocks=1,
        rope_axes=(8, 8, 8), learned_grid=(3, 4),
    )  # fmt: skip
    for name, parameter in net.named_parameters():
        parameter.data = net.initial(name, parameter.shape, 0) + 0.05 * torch.randn(parameter.shape)
    assert net.initial("position.weight", net.position.weight.shape, 0).abs().max() == 0
    cond = TextCond(packed(torch.zeros(1, 8), [(1, 1)]), torch.zeros(1, 8))
    time = torch.tensor([0.5])
    x = packed(torch.randn(4, 12), [(2, 2)])
    before = net(x, time, time, cond)
    net.position.weight.data[5] += torch.randn(48)  # row 1, column 1: the last of the four
    assert (net(x, time, time, cond) - before).abs().max() > 1e-3
    after = net(x, time, time, cond)
    net.position.weight.data[6] += torch.randn(48)  # row 1, column 2: not in this image
    assert torch.equal(net(x, time, time, cond), after)
    with pytest.raises(UserError, match="too small for an image"):
        net(packed(torch.randn(16, 12), [(4, 4)]), time, time, cond)


def test_draw_covers_the_right_area():
    """Anti-aliased by exact coverage: the mean of the mask is the rectangle's area, for any position."""
    data = ShapesData(size=16)
    combination = next(c for c in COMBINATIONS if c.prompt == "red plank on blue")
    look = data.look(np.full((50, 11), 0.5))
    look.centre[:] += np.random.default_rng(0).uniform(-1, 1, (50, 2))
    red = data.draw([combination] * 50, look)[:, 0]
    area = ((red + 0.7) / 1.4).sum(dim=(1, 2))
    expected = 2 * look.radius[0] * 2 * 0.4 * look.radius[0]
    torch.testing.assert_close(area, torch.full((50,), expected, dtype=area.dtype), rtol=1e-4, atol=0)
