"""The autoencoder equals diffusers' at FLUX's full width."""

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from selfe.checkpoint import flux
from selfe.encoders.flux_vae import SCALE, SHIFT, FluxVAE, patchify, unpatchify
from selfe.rng import SampleRNG


def full_vae() -> tuple[FluxVAE, AutoencoderKL]:
    """Both autoencoders of FLUX's architecture around the same random weights."""
    ours = FluxVAE(skip_pretrained=True, dtype="fp32", latent="mean")
    ours.load(torch.device("cpu"))
    config = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 16,
        "layers_per_block": 2,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    with torch.device("meta"):
        theirs = AutoencoderKL(**config)
    state = ours.net.state_dict()
    converted = convert_ldm_vae_checkpoint(dict(state), theirs.config)
    mapped = flux.vae_to_diffusers(state)
    assert mapped.keys() == converted.keys()
    assert all(torch.equal(mapped[name], tensor) for name, tensor in converted.items())
    theirs.load_state_dict(mapped, assign=True)
    return ours, theirs.eval()


@torch.no_grad()
def test_vae_equals_diffusers_at_full_width():
    ours, theirs = full_vae()
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 64, 96, generator=generator) * 2 - 1, torch.rand(3, 48, 32, generator=generator) * 2 - 1]
    latents = ours.encode(images, SampleRNG(((0,), (1,))))
    expected = [(theirs.encode(image[None]).latent_dist.mean[0] - SHIFT) * SCALE for image in images]
    torch.testing.assert_close(latents.tokens, patchify(expected).tokens, rtol=0, atol=1e-4)

    z = latents.with_tokens(torch.randn(latents.tokens.shape, generator=generator))
    for ours_image, grid in zip(ours.decode(z), unpatchify(z), strict=True):
        theirs_image = theirs.decode(grid[None] / SCALE + SHIFT, return_dict=False)[0][0]
        assert theirs_image.std() > 1e-2
        torch.testing.assert_close(ours_image, theirs_image, rtol=0, atol=1e-4)
