"""The demo: the image that infer.sh generates, the page in a real browser, and the addresses it listens on."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common.keys import Keys

from selfe import cli, config, recorded_run
from selfe.errors import UserError
from selfe.generator import Generator
from selfe.tools import demo
from tests.helpers import browser
from tests.helpers.browser import all_of, until
from tests.inference.test_infer import SMOKE, STAND_INS, draw, save_checkpoint, trained  # noqa: F401 - a fixture

OWN = (
    "inferencer.defaults.sampler={module: tests.helpers.samplers.Midpoint}",
    "inferencer.defaults.samplers={half: {module: selfe.samplers.renoise.Renoise, params: {eta: 0.5}}}",
    "inferencer.defaults.cfg_scale=[3,5]",
    "inferencer.defaults.s_ratio=[0.25,0.5]",
)


@pytest.fixture(scope="module")
def model(trained, tmp_path_factory):  # noqa: F811
    """A run with two checkpoints of different weights and a sampler of its own in its config."""
    run = tmp_path_factory.mktemp("demo")
    settings = config.load(SMOKE, [*STAND_INS, "trainer.samples.size=[32,48]", *OWN])
    config.save(settings, run / "config.yaml")
    shutil.copytree(trained / "step_00000012", run / "checkpoints/step_00000012")
    save_checkpoint(run / "checkpoints", seed=7, step=24)
    return demo.DemoModel(Generator(run / "checkpoints/step_00000012", precision="fp32", trust=True))


def test_the_image_is_that_of_the_inferencer(model, trained, tmp_path):  # noqa: F811
    model.choose("step_00000012")
    shown = list(model.show("a cat", "a dog", 2, 3, 7, "renoise", 0.5, 0.25))
    image, summary, strip = shown[-1]
    assert summary.startswith("2 steps in ")
    assert [label.split(",")[0] for _, label in strip] == ["1 step", "2 steps", "4 steps", "8 steps"]
    assert (len(shown), image.size) == (5, (48, 32))
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "a cat", "negative_prompt": "a dog", "cfg_scale": 3, "seed": 7, "eta": 0.5, "s_ratio": 0.25}'
    )
    lines = draw(
        trained,
        tmp_path / "images",
        f"inferencer.defaults.prompt_file={file}",
        "inferencer.defaults.num_steps=[1,2,4,8]",
    )
    for line, (drawn, _) in zip(lines, strip, strict=True):
        expected = np.asarray(Image.open(tmp_path / "images" / line["file"]), dtype=int)
        assert np.abs(expected - np.asarray(drawn)).max() <= 1


def test_samplers_and_checkpoints_of_the_run(model):
    def image(sampler: str, checkpoint: str | None = None, eta: float = 1.0):
        return next(model.show("a cat", "", 2, 3, 7, sampler, eta, 0, checkpoint))[0].tobytes()

    assert model.samplers() == [
        "tests.helpers.samplers.Midpoint",
        "half",
        "renoise",
        "euler",
        "heun",
        "adams_bashforth",
    ]
    assert model.checkpoints() == ["step_00000024", "step_00000012"]
    assert (model.defaults.cfg_scale, model.defaults.s_ratio) == (3.0, 0.25)  # the first of each list

    # eta only changes samplers that have it
    images = {name: image(name) for name in ("tests.helpers.samplers.Midpoint", "renoise", "euler")}
    assert len(set(images.values())) == 3
    assert image("half", eta=0.25) == image("renoise", eta=0.25) != images["renoise"]
    assert image("tests.helpers.samplers.Midpoint", eta=0.25) == images["tests.helpers.samplers.Midpoint"]

    # another checkpoint and back
    other = image("euler", "step_00000024")
    assert (other != images["euler"], model.generator.path.name) == (True, "step_00000024")
    assert image("euler", "step_00000012") == images["euler"]
    with pytest.raises(UserError, match=r"no complete checkpoint '../elsewhere'; choose another one"):
        image("euler", "../elsewhere")
    assert image("euler") == images["euler"]


def test_a_preset_takes_the_place_of_the_controls(model, tmp_path, monkeypatch):
    def image(cfg_scale: float, sampler: str, s_ratio: float, preset: bool = True) -> bytes:
        return next(model.show("a cat", "", 2, cfg_scale, 7, sampler, 1, s_ratio, preset=preset))[0].tobytes()

    file = tmp_path / "preset.yaml"
    file.write_text("presets: {2: {cfg_scale: 3, s_ratio: 0.5, sampler: {module: selfe.samplers.euler.Euler}}}")
    expected = image(3, "euler", 0.5)
    monkeypatch.setattr(model, "defaults", replace(model.defaults, preset=file))
    assert image(1, "renoise", 0) == expected
    assert image(1, "renoise", 0, preset=False) != expected


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((" ", "", 4, 5, 0, "renoise", 1, 0), "prompt: must not be empty"),
        (("a", "", 0, 5, 0, "renoise", 1, 0), "num_steps: 0 is not between"),
        (("a", "", 4, 5, -1, "renoise", 1, 0), "seed: -1 is not between"),
        (("a", "", 4, 5, None, "renoise", 1, 0), "int"),
        (("a", "", 4, 5, 0, "renoise", 2, 0), "eta must be between"),
        (("a", "", 4, 5, 0, "os.system", 1, 0), "no sampler 'os.system'"),
        (("a", "", 4, 5, 0, "euler", 1, 2), "s_ratio: 2.0 is not between"),
    ],
)
def test_settings_out_of_range_are_one_line(model, values, words):
    with pytest.raises(UserError, match=words):
        list(model.show(*values))


@browser.needed
def test_the_page_in_a_browser(model, tmp_path):
    blocks = demo.serve(model, None, everywhere=False, block=False)
    try:
        assert listening(blocks.server_port) == {"0100007F"}  # 127.0.0.1, and nothing else
        with browser.opened(str(tmp_path)) as driver:
            browser.resize(driver, 1440, 1000)
            driver.get("about:blank")
            browser.requests(driver)
            driver.get(blocks.local_url)
            until(driver, "document.querySelector('#prompt textarea')")
            (box,) = all_of(driver, "#prompt textarea")
            box.clear()
            box.send_keys("<img src=x onerror=alert(1)>", Keys.TAB)
            all_of(driver, "#draw")[0].click()
            until(driver, "document.querySelector('#image img')?.naturalWidth == 48")
            until(driver, "document.querySelectorAll('#strip img').length >= 4")
            shown = all_of(driver, "#image img")[0].rect
            assert min(shown["width"], shown["height"]) > 500  # 48 x 32 pixels, enlarged
            assert "4 steps in" in all_of(driver, "#time textarea, #time input")[0].get_property("value")
            assert [
                url for url in browser.requests(driver) if not url.startswith((blocks.local_url, "data:", "blob:"))
            ] == []
            assert [line for line in browser.console(driver) if "SEVERE" in line or "alert" in line] == []

            # a prompt of the run's sample grids
            example = all_of(driver, "#examples button")[-1]
            assert example.text in recorded_run.example_prompts(model.generator.settings)
            example.click()
            until(driver, f"document.querySelector('#prompt textarea').value == {json.dumps(example.text)}")

            # another seed, another image
            seed = "document.querySelector('#seed input').value"
            before = all_of(driver, "#image img")[0].get_attribute("src")
            all_of(driver, "#shuffle")[0].click()
            until(driver, f"Number({seed}) > 0")
            until(driver, f"document.querySelector('#image img').src != '{before}'")

            # a mistake is shown in the page, and gone with the next image
            box.send_keys(Keys.CONTROL, "a", Keys.DELETE, Keys.NULL, Keys.TAB)
            all_of(driver, "#draw")[0].click()
            until(driver, "document.querySelector('#problem textarea, #problem input')")
            (problem,) = all_of(driver, "#problem textarea, #problem input")
            assert problem.get_property("value") == "prompt: must not be empty"
            box.send_keys("a cat", Keys.TAB)
            all_of(driver, "#draw")[0].click()
            until(driver, "!document.querySelector('#problem textarea, #problem input')")

            # on a phone, all images of the strip are inside of the window
            browser.resize(driver, 390, 844)
            until(driver, "document.querySelectorAll('#strip img').length >= 4")
            until(driver, "document.documentElement.scrollWidth <= 390")
            inside = "(image) => { const b = image.getBoundingClientRect(); return b.left >= 0 && b.right <= 390; }"
            until(driver, f"[...document.querySelectorAll('#image img, #strip img')].every({inside})")
    finally:
        blocks.close()


def listening(port: int) -> set[str]:
    """The local addresses, as Linux writes them, on which somebody listens to this port."""
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return {line[1].split(":")[0] for line in lines if line[3] == "0A" and int(line[1].split(":")[1], 16) == port}


def test_other_addresses_are_refused(model, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    with pytest.raises(UserError, match="this machine only"):
        demo.serve(model, None, everywhere=False, block=False)
    with pytest.raises(SystemExit):
        cli.run(["demo", str(tmp_path), "--host", "0.0.0.0"])
    assert "unrecognized arguments" in capsys.readouterr().err


def test_mistakes_are_one_line(model, trained, tmp_path, monkeypatch):  # noqa: F811
    with pytest.raises(UserError, match="contains no complete checkpoint"):
        cli.run(["demo", str(tmp_path)])
    with pytest.raises(UserError, match="no such config file"):
        cli.run(["demo", str(trained), "--config", str(tmp_path / "none.yaml")])
    with pytest.raises(
        UserError, match=r"no config.yaml beside the checkpoints; give the run's \(config_path, --config"
    ):
        cli.run(["demo", str(trained)])
    checkpoint = str(model.generator.path)
    for size, problem in (("100 96", "size: 100 is not a multiple of 16"), ("0 96", "height 0 and width 96 must be")):
        with pytest.raises(UserError, match=problem):
            cli.run(["demo", checkpoint, "--trust", "--size", *size.split()])
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"gradio is not installed; run \./scripts/setup.sh"):
        cli.run(["demo", str(trained), "--precision", "fp32"])
