"""`selfe check-latents` measures what it should, and names the constant that is wrong."""

import json
import re
from pathlib import Path

import pytest
import torch

from selfe import cli, config
from selfe.errors import UserError
from selfe.tools.check_latents import LatentStatistics, diagnose, measure
from tests.method.test_diffusers_vae import loaded, model_folder

ROOT = Path(__file__).parents[2]
SMOKE, MINI = (str(ROOT / "configs" / name) for name in ("debug/selfe_smoke.yaml", "mini/base.yaml"))


@pytest.mark.parametrize(
    ("raw_mean", "raw_std", "scale", "shift", "words"),
    [
        (0.0, 5.49, 0.18215, 0.0, ""),
        (0.0609, 0.6534, 1.5305, 0.0609, ""),
        (0.0, 5.49, 1.0, 0.0, "of 5.49 .*scaling_factor is 1, .* need about 0.1821: it is missing from the config"),
        (0.0, 5.49, 5.49, 0.0, "scaling_factor is 5.49, .* need about 0.1821: it is the inverse"),
        (0.0, 1.0, 0.18215, 0.0, "of 0.182 .* need about 1: they are normalised before it, so it is applied twice"),
        (0.0, 5.49, 0.08, 0.0, "scaling_factor is 0.08, .* need about 0.1821$"),
        (1.2, 0.65, 1.5, 0.0, "mean of 1.8 .*shift_factor is 0, .* need about 1.2: it is missing"),
        (-1.2, 0.65, 1.5, 1.2, "shift_factor is 1.2, .* need about -1.2: its sign is wrong"),
        (2.0, 0.65, 1.5, 1.2, "shift_factor is 1.2, .* need about 2$"),
    ],
)
def test_the_likely_wrong_constant_is_named(raw_mean, raw_std, scale, shift, words):
    mean, std = torch.full((3,), (raw_mean - shift) * scale), torch.full((3,), raw_std * scale)
    problem = diagnose(LatentStatistics(4, mean, std, (30.0,) * 4), {"scaling_factor": scale, "shift_factor": shift})
    assert bool(problem) == bool(words)
    assert re.search(words, problem)


def test_moments_are_those_of_sampled_tokens():
    """Mean and deviation by channel, of the smoke run's images; a reconstruction of pixels is exact."""
    settings = config.load(SMOKE, ["system.autoencoder.module=selfe.encoders.identity.Identity"])
    settings["system"]["autoencoder"]["params"] = {"patch": 16}
    autoencoder, data = config.build_part(settings["system"]["autoencoder"], "x"), config.build(settings, "data")
    autoencoder.load(torch.device("cpu"))
    measured = measure(autoencoder, data, 0, 6, batch_size=4)
    images = data.batch(0, 0, range(6), range(6), "train").images
    tokens = autoencoder.encode([image.float() / 127.5 - 1 for image in images], None).tokens.double()
    torch.testing.assert_close(measured.mean, tokens.mean(dim=0))
    torch.testing.assert_close(measured.std, tokens.std(dim=0, correction=0))
    assert measured.total_mean == pytest.approx(tokens.mean().item())
    assert measured.total_std == pytest.approx(tokens.std(correction=0).item())
    assert measured.psnr == (pytest.approx(126, abs=1),) * 6


def test_the_command_refuses_a_wrong_scale_and_a_decoder_of_other_weights(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SELFE_SKIP_PRETRAINED", "1")
    folder = model_folder(tmp_path / "sd", "SD")
    params = {"model": str(folder), "latent_channels": 4, "dtype": "fp32"}
    path = tmp_path / "config.yaml"
    part = {"module": "selfe.encoders.diffusers_vae.DiffusersVAE", "params": params}
    path.write_text(
        json.dumps({"base": SMOKE, "system": {"autoencoder": part, "backbone": {"params": {"patch_dim": 16}}}})
    )

    # the deviation of the latents of random weights
    data = config.build(config.load(path), "data")
    raw = measure(loaded(folder, "SD"), data, 0, 8, 8).total_std / 0.18215
    settings = json.loads((folder / "config.json").read_text())

    def check(scale: float) -> None:
        (folder / "config.json").write_text(json.dumps(settings | {"scaling_factor": scale}))
        cli.run(["check-latents", str(path), "--images", "8"])

    with pytest.raises(UserError, match=f"scaling_factor is {0.1 / raw:.6g}, the latents of these images need about"):
        check(0.1 / raw)
    with pytest.raises(UserError, match=r"reconstructions have a PSNR of .* dB, although the tokens are normalised"):
        check(1 / raw)
    assert "8 images, tokens of 16 channels" in capsys.readouterr().out

    cli.run(["check-latents", MINI, "--images", "8"])
    assert capsys.readouterr().out.endswith("these latents can be trained on\n")
