"""The demo: the image that infer.sh draws, a page that works in a real browser, and a door that stays shut."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common.keys import Keys

from selfe import cli, config
from selfe.errors import UserError
from selfe.tools import demo
from tests.helpers import browser
from tests.helpers.browser import all_of, until
from tests.inference.test_infer import SMOKE, STAND_INS, draw, trained  # noqa: F401 - a fixture


@pytest.fixture(scope="module")
def model(trained):  # noqa: F811
    settings = config.load(SMOKE, [*STAND_INS, "trainer.samples.size=[32,48]"])
    config.save(settings, trained.parent / "config.yaml")
    return demo.DemoModel(trained, None, "ema", "fp32", None)


def test_the_image_is_that_of_the_inferencer(model, trained, tmp_path):  # noqa: F811
    shown = list(model.show("a cat", "a dog", 2, 3, 7, "renoise", 0.5, 0.25))
    image, said, strip = shown[-1]
    assert said.startswith("2 steps in ")
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
            assert "4 steps in" in all_of(driver, "#time textarea, #time input")[0].get_property("value")
            assert [
                url for url in browser.requests(driver) if not url.startswith((blocks.local_url, "data:", "blob:"))
            ] == []
            assert [line for line in browser.console(driver) if "SEVERE" in line or "alert" in line] == []
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


def test_mistakes_are_one_line(trained, tmp_path, monkeypatch):  # noqa: F811
    with pytest.raises(UserError, match="contains no complete checkpoint"):
        cli.run(["demo", str(tmp_path)])
    with pytest.raises(UserError, match="no such config file"):
        cli.run(["demo", str(trained), "--config", str(tmp_path / "none.yaml")])
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"gradio is not installed; run \./scripts/setup.sh"):
        cli.run(["demo", str(trained), "--precision", "fp32"])
