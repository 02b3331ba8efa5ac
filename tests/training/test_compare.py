"""What decides an image besides the weights is compared by name with the run's config.yaml."""

from pathlib import Path

import pytest
import torch

from selfe import compare, config
from selfe.errors import UserError

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs/debug/selfe_smoke.yaml"
RANDOM = [f"system.{part}.params.skip_pretrained=true" for part in ("text_encoder", "autoencoder")]
BACKBONE, TEXT, IMAGE = (f"system.{part}.params" for part in compare.PARTS)


@pytest.fixture
def run(tmp_path) -> Path:
    """The config.yaml of a run with random encoders."""
    path = tmp_path / "config.yaml"
    config.save(config.load(SMOKE, RANDOM), path)
    return path


def check(run: Path, *overrides: str, allowed: tuple[str, ...] = ()) -> None:
    compare.check_run(run, config.load(SMOKE, [*RANDOM, *overrides]), allowed, "inferencer")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"{BACKBONE}.rope_axes=[4,14,14]", f"{BACKBONE}.rope_axes was [8, 12, 12], is now [4, 14, 14]"),
        (f"{BACKBONE}.rope_theta=100", f"{BACKBONE}.rope_theta was 10000.0, is now 100.0"),
        (f"{BACKBONE}.num_single_blocks=3", f"{BACKBONE}.num_single_blocks was 2, is now 3"),
        (f"{TEXT}.max_tokens=77", f"{TEXT}.max_tokens was 512, is now 77"),
        (f"{TEXT}.skip_pretrained=false", f"{TEXT}.skip_pretrained was True, is now False (true: random encoders"),
        (f"{IMAGE}.skip_pretrained=false", f"{IMAGE}.skip_pretrained was True, is now False (true: random encoders"),
        (f"{IMAGE}.latent=mean", f"{IMAGE}.latent was sample, is now mean"),
        (
            "system.text_encoder={module: selfe.encoders.words.Words, params: {dim: 64}}",
            "system.text_encoder.module was selfe.encoders.t5_clip.T5Clip, is now selfe.encoders.words.Words",
        ),
    ],
)
def test_a_setting_that_no_shape_shows_is_refused_with_both_values(run, override, message):
    with pytest.raises(UserError) as caught:
        check(run, override)
    key = message.split(" was")[0]
    assert str(caught.value).startswith(f"{run}: the system differs from the run's: {message}")
    assert str(caught.value).endswith(f"inferencer.allow_changes=[{key}]")
    assert "\n" not in str(caught.value)
    check(run, override, allowed=(key,))


def test_all_differences_are_listed_and_each_must_be_allowed(run):
    overrides = f"{BACKBONE}.rope_theta=100", f"{TEXT}.max_tokens=77"
    with pytest.raises(UserError, match=r"rope_theta was .*; system.text_encoder.params.max_tokens was"):
        check(run, *overrides)
    with pytest.raises(UserError, match=r"run's: system.text_encoder.params.max_tokens was 512, is now 77;"):
        check(run, *overrides, allowed=(f"{BACKBONE}.rope_theta",))


@pytest.mark.parametrize(
    "override",
    [
        f"{BACKBONE}.mlp_ratio=4",  # the default, given
        f"{TEXT}.cache_dir=elsewhere",
        f"{TEXT}.dtype=bf16",
        f"{IMAGE}.decode_pixels=1000000",
        "system.objective.params.k_cls=0.5",
        "trainer.lr=1",
    ],
)
def test_settings_that_do_not_decide_the_image_may_differ(run, override):
    check(run, override)


def test_a_run_trained_from_a_feature_cache_is_compared_by_the_cached_encoders(tmp_path):
    """The cache itself may be gone."""
    settings = config.load(SMOKE, RANDOM)
    system = settings["system"]
    for name, module, inner in (
        ("text_encoder", "selfe.encoders.cached_text.CachedText", "encoder"),
        ("autoencoder", "selfe.encoders.cached_latents.CachedLatents", "autoencoder"),
    ):
        system = system | {name: {"module": module, "params": {"cache_dir": "gone", inner: system[name]}}}
    config.save(settings | {"system": system}, tmp_path / "config.yaml")

    check(tmp_path / "config.yaml")
    with pytest.raises(UserError, match="max_tokens was 512, is now 77"):
        check(tmp_path / "config.yaml", f"{TEXT}.max_tokens=77")


def test_a_module_that_only_the_runs_config_names_is_not_imported(run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "hostile.py").write_text("raise SystemExit('imported')")
    text = run.read_text()
    run.write_text(text.replace("selfe.encoders.t5_clip.T5Clip", "hostile.Encoder"))
    with pytest.raises(UserError, match=r"text_encoder.module was hostile.Encoder, is now selfe.encoders.t5_clip"):
        check(run)

    run.write_text(text.replace("max_tokens: 512", "max_tokens: {module: hostile.Tokens}"))
    with pytest.raises(UserError, match=r"names hostile.Tokens, which is not part of selfe"):
        check(run)


def test_declared_settings_have_the_names_and_values_of_the_config():
    """A part may declare more than its parameters, such as how its code pads."""
    settings = config.load(SMOKE, RANDOM)["system"]
    for name in compare.PARTS:
        with torch.device("meta"):
            part = config.build_part(settings[name], name)
        declared, given = config.plain(part.output_settings()), config.plain(settings[name]["params"])
        assert given.keys() - declared.keys() <= {"cache_dir"}
        assert {key: declared[key] for key in given.keys() & declared.keys()} == {
            key: given[key] for key in given.keys() & declared.keys()
        }
