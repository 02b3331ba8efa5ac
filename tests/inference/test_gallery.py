"""The gallery in a real browser: slider, search, click, keys, comparison. Prompts are text; nothing is fetched."""

import base64
import json
import re
import shlex
from pathlib import Path

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from selfe import cli, config
from selfe.errors import UserError
from selfe.gallery import build
from selfe.inference import job
from tests.helpers import browser, samplers
from tests.helpers.browser import all_of, resize, until
from tests.helpers.sampling_job import captions, make_job
from tests.inference.test_infer import SMOKE, STAND_INS

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)</script><!-- <script>",
    "a `cat`, $HOME ${oc.env:HOME} \\${x} \\\\${y} 'quoted' \"twice\"; touch /tmp/no & {a: b} [c] # d = e \\",
    "Vögel 鳥 🐦 \u202e &amp; {{data}} {{code}}",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    home = tmp_path_factory.mktemp("jobs")
    photos = captions()
    prompts = [*photos[:4], *((photos[4 + i][0], prompt) for i, prompt in enumerate(HOSTILE))]
    make_job(home / "first", prompts, weights=("ema", "live"))
    make_job(home / "second", prompts, num_steps=(1, 4), num_samples=2, blur=3)
    build.build([home / "first"], home / "first" / "gallery.html")
    build.build([home / "first", home / "second"], home / "compare.html")
    return home / "first", home / "second"


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with browser.opened(str(tmp_path_factory.mktemp("profile"))) as driver:
        yield driver


def show(driver, path: Path) -> None:
    browser.requests(driver), browser.console(driver)
    driver.get(path.as_uri())
    until(driver, "document.querySelectorAll('.shot img').length")
    until(driver, "[...document.querySelectorAll('.shot img')].every((image) => image.complete && image.naturalWidth)")


def sources(driver) -> list[str]:
    return [image.get_attribute("src") for image in all_of(driver, ".shot img")]


def text(driver, selector: str) -> str:
    return driver.execute_script("return document.querySelector(arguments[0]).textContent", selector)


def press(driver, *keys: str) -> None:
    ActionChains(driver).send_keys(*keys).perform()


def quiet(driver, folder: Path) -> None:
    """No word on the console, and no request but for files of the folder."""
    assert browser.console(driver) == []
    assert [url for url in browser.requests(driver) if not url.startswith((folder.as_uri(), "data:"))] == []


@browser.needed
def test_one_slider_changes_all_images(driver, folders):
    resize(driver, 1440, 900)
    show(driver, folders[0] / "gallery.html")
    assert text(driver, "#number") == "4 steps"
    seen = {4: sources(driver)}
    assert len(seen[4]) >= 6
    for index, steps in ((0, 1), (4, 50)):
        slider = (
            "const s = document.getElementById('slider'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))"
        )
        driver.execute_script(slider, index)
        assert text(driver, "#number") == ("1 step" if steps == 1 else f"{steps} steps")
        seen[steps] = sources(driver)
    assert all(len(set(each)) == 3 for each in zip(*seen.values(), strict=True))
    all_of(driver, "#ticks button")[2].click()
    assert sources(driver) == seen[4]
    press(driver, Keys.ARROW_RIGHT)
    assert text(driver, "#number") == "8 steps"
    quiet(driver, folders[0])


@browser.needed
def test_prompts_are_text_whatever_they_say(driver, folders):
    resize(driver, 1440, 900)
    show(driver, folders[0] / "gallery.html")
    shown = [driver.execute_script("return arguments[0].textContent", title) for title in all_of(driver, ".row h2")]
    assert shown == [prompt for _, prompt in captions()[:4]] + HOSTILE
    assert not all_of(driver, "h2 *, figcaption img, #about *")
    assert len(all_of(driver, "script")) == 2
    with pytest.raises(Exception, match="no such alert"):
        _ = driver.switch_to.alert
    quiet(driver, folders[0])


@browser.needed
def test_search_filters_and_all_steps(driver, folders):
    resize(driver, 1440, 900)
    show(driver, folders[0] / "gallery.html")
    press(driver, "/", "SUIT astronaut", Keys.ESCAPE)
    assert len(all_of(driver, ".row")) == 1
    assert text(driver, "#about").startswith("1 of 8 prompts, 80 images")
    until(driver, "document.querySelectorAll('.shot img').length == 2")
    assert [caption.text for caption in all_of(driver, "figcaption")] == ["EMA", "live"]
    press(driver, "a")
    until(driver, "document.querySelectorAll('.shot img').length == 10")
    badges = [badge.text for badge in all_of(driver, ".shot span")]
    assert badges == ["1 step", "2 steps", "4 steps", "8 steps", "50 steps"] * 2
    next(chip for chip in all_of(driver, "#chips button") if chip.text == "live").click()
    until(driver, "document.querySelectorAll('.shot img').length == 5")
    quiet(driver, folders[0])


@browser.needed
def test_a_click_shows_the_image_and_the_command_that_draws_it(driver, folders):
    resize(driver, 1440, 900)
    show(driver, folders[0] / "gallery.html")
    plan = {(p.prompt, p.weights): p for p in made_plan(folders[0]) if p.num_steps == 4}
    for prompt in HOSTILE:
        all_of(driver, "#search")[0].clear()
        words = prompt.replace("\u202e", "")
        driver.execute_script(
            "const s = document.getElementById('search'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))",
            words[:12],
        )
        until(driver, "document.querySelectorAll('.shot img').length == 2")
        all_of(driver, ".shot")[1].click()
        assert text(driver, "#words") == prompt
        command = shlex.split(text(driver, "#command"))
        assert command[:3] == ["./infer.sh", str(folders[0] / "config.yaml"), "1"]
        settings = config.load(SMOKE, [*STAND_INS, *command[3:]])
        inferencer = config.build(settings, "inferencer")
        (again,) = job.plan(inferencer.requests(16), inferencer.kinds, inferencer.layout, ".png")
        assert again.file == plan[prompt, "live"].file
        assert again.record() == plan[prompt, "live"].record()
        press(driver, Keys.ESCAPE)
        until(driver, "!document.getElementById('viewer').open")
    quiet(driver, folders[0])


@browser.needed
def test_the_command_has_a_sampler_of_ones_own(driver, tmp_path):
    sampler = samplers.Named("a: b, ${c} \\${d} 'e' \"f\"")
    (spec,) = make_job(tmp_path, captions()[:1], num_steps=(4,), sampler=sampler)
    build.build([tmp_path], tmp_path / "gallery.html")
    show(driver, tmp_path / "gallery.html")
    all_of(driver, ".shot")[0].click()
    command = shlex.split(text(driver, "#command"))
    inferencer = config.build(config.load(SMOKE, [*STAND_INS, *command[3:]]), "inferencer")
    (again,) = job.plan(inferencer.requests(16), inferencer.kinds, inferencer.layout, ".png")
    assert again.file == spec.file
    assert again.record() == spec.record()
    assert again.record()["schedule"] == sampler.output_settings()["schedule"]


def test_the_command_imports_classes_from_where_they_are(tmp_path, monkeypatch):
    """PYTHONPATH is set for modules that Python does not find by itself, and without importing them."""
    (tmp_path / "modules/own_package").mkdir(parents=True)
    (tmp_path / "modules/own_package/__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/own_data.py").write_text("raise SystemExit('imported')")
    (tmp_path / "config.yaml").write_text("data: {module: own_data.Images, params: {}}\ntrainer: {wandb: null}")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.syspath_prepend(tmp_path / "other")

    def path(*names: str) -> str:
        return build.python_path(tmp_path / "config.yaml", [{"sampler": name} for name in names])

    assert path("own_package.heun.Heun", "renoise") == f"{tmp_path}/modules:{tmp_path}/other"
    assert path("json.Sampler", "numpy.Sampler", "missing_module.Sampler") == f"{tmp_path}/other"
    assert build.python_path(tmp_path / "none.yaml", [{"sampler": "tests.helpers.samplers.Named"}]) == ""


def made_plan(folder: Path) -> list[job.ImageSpec]:
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    sampler = config.build(config.load(SMOKE, ["inferencer.prompts=[a]"]), "inferencer").defaults.sampler
    skipped = {"eta", "step", "checkpoint", "fingerprint", "sampler"}
    return [job.ImageSpec(**{k: v for k, v in line.items() if k not in skipped}, sampler=sampler) for line in lines]


@browser.needed
def test_keys_in_the_large_view(driver, folders):
    resize(driver, 1440, 900)
    show(driver, folders[0] / "gallery.html")
    all_of(driver, ".shot")[0].click()
    assert text(driver, "#number") == "4 steps"
    seen = [all_of(driver, "#full")[0].get_attribute("src")]
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_UP, Keys.ARROW_LEFT):
        press(driver, key)
        seen.append(all_of(driver, "#full")[0].get_attribute("src"))
    assert seen[0] == seen[4] != seen[1] == seen[3] != seen[2]
    all_of(driver, "#sizes button")[0].click()
    assert "steps1guidance5" in text(driver, "#facts")
    all_of(driver, "#copy")[0].click()
    assert text(driver, "#copy") == "Copied"
    press(driver, Keys.ESCAPE)
    until(driver, "!document.getElementById('viewer').open")
    assert text(driver, "#number") == "1 step"
    press(driver, "j")
    assert driver.execute_script("return document.activeElement.className") == "shot"
    quiet(driver, folders[0])


@browser.needed
def test_zoom_and_the_file_itself(driver, folders, tmp_path):
    resize(driver, 1440, 900)
    show(driver, folders[0] / "gallery.html")
    all_of(driver, ".shot")[0].click()
    until(driver, "document.getElementById('full').naturalWidth == 64")

    def width() -> float:
        return driver.execute_script("return document.getElementById('full').getBoundingClientRect().width")

    fitted = width()
    assert (fitted > 700, text(driver, "#zoom")) == (True, "fit")
    all_of(driver, "#actual")[0].click()
    assert (width(), text(driver, "#zoom")) == (64, "100 %")
    press(driver, "+", "+")
    assert (width(), text(driver, "#zoom")) == (144, "225 %")
    press(driver, Keys.ARROW_RIGHT)  # another image, in the same size
    assert width() == 144
    press(driver, "-", "-", "0")
    assert (width(), text(driver, "#zoom")) == (fitted, "fit")

    # the wheel keeps the point under the pointer
    stage = all_of(driver, "#stage")[0]
    press(driver, "1", *"+++++++++")
    where = "const i = document.getElementById('full').getBoundingClientRect(); return (400 - i.left) / i.width"
    before = driver.execute_script(where)
    wheel = "arguments[0].dispatchEvent(new WheelEvent('wheel', {deltaY: -200, clientX: 400, clientY: 300}))"
    driver.execute_script(wheel, stage)
    assert driver.execute_script(where) == pytest.approx(before, abs=0.002)

    # embedded: the link holds the file, byte for byte, under its name
    (link,) = all_of(driver, "#download")
    assert not all_of(driver, "#original")[0].is_displayed()
    content = base64.b64decode(link.get_attribute("href").partition(",")[2])
    assert content == (folders[0] / link.get_attribute("download")).read_bytes()
    quiet(driver, folders[0])

    # not embedded: the link leads to the file
    build.build([folders[0]], tmp_path / "page.html", embed_bytes=0)
    show(driver, tmp_path / "page.html")
    all_of(driver, ".shot")[0].click()
    assert all_of(driver, "#original")[0].get_attribute("href") == all_of(driver, "#full")[0].get_attribute("src")
    assert (folders[0] / all_of(driver, "#download")[0].get_attribute("download")).is_file()


@browser.needed
def test_a_and_b_in_the_same_place(driver, folders):
    resize(driver, 1440, 900)
    show(driver, folders[0].parent / "compare.html")

    # by one script, because the page replaces its elements
    visible = "[...document.querySelectorAll('figcaption')].filter((caption) => caption.checkVisibility())"
    visible += ".map((caption) => caption.innerText.split(/\\s+/).join(' '))"

    def shown() -> list[str]:
        return driver.execute_script(f"return {visible}")

    choose = "const s = document.getElementById('ab'); s.value = arguments[0]; s.dispatchEvent(new Event('change'))"
    driver.execute_script(choose, "weights")
    until(driver, f"{visible}[1] == 'second EMA sample 0'")
    assert text(driver, "#switch") == "A: EMA"
    assert shown()[:3] == ["first EMA sample 0", "second EMA sample 0", "second EMA sample 1"]
    place = driver.execute_script("return document.querySelector('.shot').getBoundingClientRect().y")
    press(driver, "b")
    assert text(driver, "#switch") == "B: live"
    assert set(shown()) == {"first live sample 0"}
    assert next(shot.rect["y"] for shot in all_of(driver, ".shot") if shot.is_displayed()) == place
    driver.execute_script(choose, "off")
    until(driver, f"{visible}[1] == 'first live sample 0'")
    assert shown()[0] == "first EMA sample 0"

    # in the large view: the same prompt, steps and settings from the other folder, and back
    all_of(driver, ".shot")[0].click()
    assert text(driver, "#flip") == "Switch to second"
    first = all_of(driver, "#full")[0].get_attribute("src")
    press(driver, "b")
    assert text(driver, "#facts").endswith("foldersecond")
    assert (text(driver, "#flip"), all_of(driver, "#full")[0].get_attribute("src") == first) == (
        "Switch to first",
        False,
    )
    press(driver, "b")
    assert all_of(driver, "#full")[0].get_attribute("src") == first
    quiet(driver, folders[0].parent)


@browser.needed
def test_many_samples_of_a_prompt_in_a_compact_view(driver, tmp_path):
    make_job(tmp_path, captions()[:2], num_steps=(4,), num_samples=40)
    build.build([tmp_path], tmp_path / "gallery.html")
    resize(driver, 1440, 900)
    driver.get((tmp_path / "gallery.html").as_uri())
    set_size = "const s = document.getElementById('size'); s.value = 48; s.dispatchEvent(new Event('input'))"
    driver.execute_script(set_size)
    shots = all_of(driver, ".row:first-child .shot")
    assert (len(shots), {shot.rect["width"] for shot in shots}) == (40, {48})
    assert len({shot.rect["y"] for shot in shots}) == 2
    assert not any(caption.is_displayed() for caption in all_of(driver, "figcaption"))
    driver.execute_script("document.getElementById('size').dispatchEvent(new Event('dblclick'))")
    assert all_of(driver, ".row:first-child .shot")[0].rect["width"] > 150


@browser.needed
def test_two_folders_side_by_side(driver, folders):
    resize(driver, 1440, 900)
    page = folders[0].parent / "compare.html"
    show(driver, page)
    labels = [" ".join(caption.text.split()) for caption in all_of(driver, ".row figcaption")][:4]
    assert labels == ["first EMA sample 0", "first live sample 0", "second EMA sample 0", "second EMA sample 1"]
    assert len(set(sources(driver)[:4])) == 4
    driver.execute_script("document.querySelector('h2').innerHTML = '<img src=x onerror=\"window.ran = 1\">'")
    until(driver, "document.querySelector('h2 img').complete")
    assert driver.execute_script("return window.ran") is None  # the policy stops even markup that got in
    assert any("Content Security Policy" in line for line in browser.console(driver))
    press(driver, Keys.ARROW_RIGHT)
    assert all_of(driver, ".shot.none")[0].text == "no 8 steps"
    assert all(url.startswith((page.parent.as_uri(), "data:")) for url in browser.requests(driver))


@browser.needed
def test_dark_light_and_a_telephone(driver, folders):
    colour = "return getComputedStyle(document.body).backgroundColor"
    for scheme in ("dark", "light"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        show(driver, folders[0] / "gallery.html")
        before = driver.execute_script(colour)
        assert (int(re.findall(r"\d+", before)[0]) < 60) == (scheme == "dark")
        press(driver, "t")
        assert driver.execute_script(colour) != before
    resize(driver, 390, 844)
    show(driver, folders[0] / "gallery.html")
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
    slider, (first, second) = all_of(driver, "#slider")[0], all_of(driver, ".shot")[:2]
    assert slider.rect["y"] > 740  # under the thumb
    assert first.rect["y"] == second.rect["y"]
    assert first.rect["width"] > 160
    quiet(driver, folders[0])

    # all filters are inside of the window, and so is Close, however far the large view is scrolled
    show(driver, folders[0].parent / "compare.html")
    assert all(chip.rect["x"] + chip.rect["width"] <= 390 for chip in all_of(driver, "#chips button, #chips select"))
    all_of(driver, ".shot")[0].click()
    driver.execute_script("document.querySelector('.view').scrollTo(0, 9999)")
    (close,) = all_of(driver, "#close")
    box = driver.execute_script("return document.getElementById('close').getBoundingClientRect().toJSON()")
    assert 0 <= box["top"] < box["bottom"] <= 844
    close.click()
    until(driver, "!document.getElementById('viewer').open")
    quiet(driver, folders[0].parent)


@browser.needed
def test_ten_thousand_images_stay_usable(driver, tmp_path):
    """Images beside the page, only those near the window in it, thumbnails where images are large."""
    (photo, _), *_ = captions()
    made = make_job(tmp_path, [(photo, f"number {i}") for i in range(4)], size=(512, 512), num_steps=(1, 2, 4, 8, 50))
    lines = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    many = [line | {"prompt": f"number {i}"} for i in range(2000) for line in lines[5 * (i % 4) :][:5]]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in many))
    build.build([tmp_path], tmp_path / "gallery.html")
    assert len(list((tmp_path / "thumbs").iterdir())) == len(made)
    assert (tmp_path / "gallery.html").stat().st_size < 4_000_000
    resize(driver, 1440, 900)
    show(driver, tmp_path / "gallery.html")
    assert text(driver, "#about").startswith("2,000 prompts, 10,000 images")
    assert len(all_of(driver, ".row")) == 2000
    assert len(all_of(driver, ".shot img")) < 60
    assert "/thumbs/" in sources(driver)[0]
    driver.execute_script("scrollTo(0, document.body.scrollHeight)")
    until(driver, "document.querySelector('.row:last-child .shot img')?.naturalWidth")
    assert len(all_of(driver, ".shot img")) < 100
    all_of(driver, ".row:last-child .shot")[0].click()
    until(driver, "document.getElementById('full').naturalWidth == 512")
    quiet(driver, tmp_path)


def test_what_is_no_job_is_one_line(tmp_path):
    for text in (None, '{"file": "gone.png"}\n', "no JSON\n"):
        if text:
            (tmp_path / "metadata.jsonl").write_text(text)
        with pytest.raises(UserError) as raised:
            cli.run(["gallery", str(tmp_path)])
        assert len(str(raised.value).splitlines()) == 1
    (tmp_path / "metadata.jsonl").write_text('{"file": "gone.png"}\n')
    with pytest.raises(UserError, match="no images that exist"):
        build.build([tmp_path], tmp_path / "gallery.html")
