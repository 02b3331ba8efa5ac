"""The page of `selfe report`: numbers, warnings, what it does in a browser, and updates while a run trains."""

import base64
import csv
import io
import json
import math
import os
import re
import signal
import threading
import time
import urllib.error
import urllib.request
from itertools import product
from pathlib import Path

import pytest
from PIL import Image

from selfe import cli
from selfe.errors import UserError
from selfe.io import image_encode
from selfe.io.folder_lock import FolderLock
from selfe.tools.report import comparability, page, server, sheets
from selfe.tools.report.columns import Columns
from selfe.tools.report.lines import JsonLines
from selfe.tools.report.run_folder import RunFolder
from tests.helpers import browser, run_folders
from tests.helpers.browser import all_of, resize, until
from tests.helpers.run_folders import add_evaluation, append, make_run

FLOW_MATCHING = "system.objective={module: selfe.objectives.flow_matching.FlowMatching, params: {}}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[RunFolder]:
    home = tmp_path_factory.mktemp("runs")
    make_run(home / "first")
    make_run(home / "second", 60, 0.5, "trainer.lr=2e-3", "system.objective.params.tau_steps=20")
    add_evaluation(home / "first" / "images")
    return [RunFolder(home / name, name) for name in ("first", "second")]


# ---- numbers ----


def test_the_page_has_the_numbers_of_the_files(runs):
    run = page.static(runs, 40)["runs"][0]
    lines = [run_folders.line(step) for step in range(1, 41)]
    assert run["num_lines"] == 40
    for name in ("step", "samples", "elapsed", "time", "epoch", "train/loss", "val_ema/loss", "memory/peak_gib"):
        assert run["columns"][name] == [line.get(name) for line in lines]
    assert run["columns"]["time/validation"] == [0.0 if step % 10 else 0.1 for step in range(1, 41)]
    assert run["cells"]["steps"] == [10, 20, 30, 40]
    assert run["cells"]["tables"]["loss"][1] == run_folders.cells(20)["loss"]
    assert run["config"]["trainer.lr"] == "0.001"
    assert run["starts"][0]["command"] == [
        "selfe",
        "train",
        str(run_folders.SMOKE.relative_to(run_folders.ROOT)),
        "1",
        "trainer.name=run first",
    ]


def test_a_point_is_the_mean_of_adjacent_values():
    columns = Columns()
    for step in range(1, 12):
        columns.add(
            {"step": step, "train/loss": math.nan if step == 5 else step} | ({"val/loss": 7} if step == 10 else {}), ""
        )
    reduced = columns.reduced(3)
    assert reduced["columns"] == {
        "step": [4, 8, 10, 11],
        "train/loss": [2.5, 7.0, None, 10.0],  # of 1 to 4; of 6, 7 and 8; of 9, 10 and 11
        "val/loss": [None, None, 7.0, None],
    }
    assert reduced["not_finite"] == {"train/loss": 1}


def test_values_that_are_not_finite_are_kept_as_text():
    columns = Columns()
    for step, value in enumerate((1.0, math.inf, math.nan), 1):
        columns.add({"step": step, "train/loss": value}, "")
    reduced = columns.reduced(10)
    assert reduced["columns"]["train/loss"] == [1.0, "inf", "nan"]
    assert reduced["not_finite"] == {"train/loss": 2}


def test_a_growing_file_is_read_once_and_a_replaced_one_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    assert lines.read_new() == (False, [])

    # the last line is incomplete; other line separators of Unicode end no line
    first = {"step": 1, "command": "a\x85cat \u2028"}
    path.write_text(json.dumps(first, ensure_ascii=False) + '\n{"step": 2', encoding="utf-8")
    assert lines.read_new() == (False, [first])
    assert lines.read_new() == (False, [])
    with path.open("a") as file:
        file.write("}\n")
    assert lines.read_new() == (False, [{"step": 2}])

    # a resumed run drops the steps that it repeats
    (tmp_path / "new").write_text('{"step": 1}\n')
    (tmp_path / "new").replace(path)
    assert lines.read_new() == (True, [{"step": 1}])

    with path.open("a") as file:
        file.write('{"step": 2}\nnot JSON\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 3 is not JSON"):
        lines.read_new()


def test_sheets_are_embedded_evenly_and_without_loss(runs):
    table = page.static(runs[:1], 3)["runs"][0]["sheets"]
    assert table["totals"] == {"ema": 4, "live": 4}
    assert [sheet["step"] for sheet in table["live"]] == [10, 30, 40]
    sheet = table["live"][1]
    assert (sheet["prompts"], sheet["num_steps"]) == (list(run_folders.PROMPTS), [1, 2, 4])
    left, top, width, height, across, down = sheet["cell"]
    assert (width, height) == (24, 16)
    image = Image.open(io.BytesIO(base64.b64decode(sheet["source"].partition(",")[2])))
    assert image.getpixel((left + 2 * across + width - 1, top + down + height - 1)) == (100, 160, 31)


def test_labels_are_cut_off_a_sheet(tmp_path):
    colours = [["red", "lime", "blue"], ["black", "gray", "yellow"]]
    rows = [[Image.new("RGB", (24, 16), colour) for colour in row] for row in colours]
    rows[1][2].putpixel((5, 7), (1, 2, 3))
    prompts = ["a bird", "a very long prompt " * 20]
    sheet = image_encode.sample_sheet(rows, prompts, [1, 2, 4], "EMA weights, step 12")
    path = image_encode.save_sheet(sheet, tmp_path / "samples", 12)

    # the file has labels, the images with every pixel enlarged, and their positions
    with Image.open(path) as image:
        layout = json.loads(image.text["selfe"])
        left, top, width, height, across, down = layout.pop("cell")
        assert layout == {"title": "EMA weights, step 12", "prompts": prompts, "num_steps": [1, 2, 4], "zoom": 3}
        assert (width, height) == (72, 48)
        for y, x in product(range(2), range(3)):
            corner = (left + x * across, top + y * down)
            cell = image.crop((*corner, corner[0] + 72, corner[1] + 48))
            assert cell.tobytes() == rows[y][x].resize((72, 48), Image.Resampling.NEAREST).tobytes()
        for labels in ((0, 0, image.width, top - 4), (0, top, left - 4, image.height)):
            assert len(image.crop(labels).getcolors()) > 1

    source = sheets.embed(path)["source"]
    image = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    assert image.tobytes() == image_encode.grid(rows, sheets.GAP).tobytes()
    no_zoom = json.dumps({"prompts": prompts, "num_steps": [1, 2, 4], "cell": [left, top, 72, 48, across, down]})
    for text in ("[]", "{}", '{"cell": [1], "prompts": [], "num_steps": []}', no_zoom, "no JSON"):
        sheet.info["selfe"] = text
        image_encode.save_sheet(sheet, tmp_path / "samples", 12)
        with pytest.raises(UserError, match="not a complete image"):
            sheets.embed(path)


def test_large_images_are_reduced_and_unknown_sheets_have_no_labels(tmp_path):
    path = tmp_path / "step_00000001.png"
    large = Image.new("RGB", (600, 300), (200, 40, 40))
    image_encode.save_sheet(image_encode.sample_sheet([[large, large]], ["a"], [1, 4], "step 1"), tmp_path, 1)
    embedded = sheets.embed(path)
    image = Image.open(io.BytesIO(base64.b64decode(embedded["source"].partition(",")[2])))
    assert (image.format, image.size) == ("WEBP", (2 * 256 + sheets.GAP, 128))
    assert embedded["cell"] == [0, 0, 256, 128, 256 + sheets.GAP, 128 + sheets.GAP]

    large.save(path)
    assert (sheets.embed(path)["cell"], sheets.embed(path)["prompts"]) == (None, [])


def test_the_page_marks_where_objective_and_schedule_change(tmp_path):
    changes = ("trainer.phases=[{step: 30, total_batch_size: 16}]", "trainer.total_batch_size=8")
    marks = RunFolder(make_run(tmp_path / "run", 40, 0, *changes), "run").marks()
    assert marks == [
        {"step": 11, "text": "self-evaluation"},  # tau is still 0 in the step with index start_step = 10
        {"step": 20, "text": "self-evaluation and auxiliary term"},
        {"step": 30, "text": "total_batch_size 16"},
    ]


# ---- warnings ----


@pytest.mark.parametrize(
    ("change", "warned", "comparable", "words"),
    [
        (FLOW_MATCHING, "train/loss", "val_plain/loss", "objective: SelfEvaluation (first), FlowMatching (second)"),
        ("system.objective.params.k_cls=0.5", "val_ema/loss", "train/lr", "objective.k_cls: 1.0 (first), 0.5 (second)"),
        ("system.objective.params.t_std=2", "val_plain/loss", "train/lr", "objective.t_std: 1.0 (first), 2.0 (second)"),
        (
            "system.autoencoder.params.width=16",
            "val_plain/loss",
            "train/lr",
            "autoencoder.width: 32 (first), 16 (second)",
        ),
        ("seed=1", "val_plain/loss", "train/loss", "seed: 0 (first), 1 (second)"),
        ("data.params.train_manifest=other.tsv", "train/loss", "val/loss", "train_manifest: debug_data/t2i_smoke/m"),
        ("trainer.lr=1", None, "train/loss", ""),
        ("system.autoencoder.params.dtype=bf16", None, "train/loss", ""),
    ],
)
def test_losses_that_measure_different_things_have_a_warning(tmp_path, change, warned, comparable, words):
    make_run(tmp_path / "first", 1)
    make_run(tmp_path / "second", 1, 0, change)
    warnings = comparability.warnings([RunFolder(tmp_path / name, name) for name in ("first", "second")])
    assert bool(warnings) == bool(warned)
    if warned:
        assert any(re.search(each["metrics"], warned) for each in warnings)
    assert not any(re.search(each["metrics"], comparable) for each in warnings)
    assert words in " ".join(each["text"] for each in warnings)


# ---- state of a run ----


def test_the_state_of_a_run(tmp_path):
    folder = make_run(tmp_path / "run", 40, 0, "trainer.max_steps=100")
    run = RunFolder(folder, "run")
    state = run.state()
    assert (state["state"], state["step"], state["end"], state["eta"]) == ("stopped", 40, 100, None)
    assert (state["seconds_per_step"], state["loss"]) == (1.5, run_folders.line(40)["train/loss"])
    assert (state["memory_gib"], state["mfu"], state["skipped"]) == (12.5, 0.35, 0)
    assert state["checkpoint"]["step"] == 40
    assert 0 <= state["checkpoint"]["age"] < 60

    with FolderLock(folder, "trainer.output_dir", lost=print):
        assert (run.state()["state"], run.state()["eta"]) == ("running", 60 * 1.5)

    # a holder on another machine counts as alive while its heartbeat is recent
    lock = folder / ".lock"
    lock.write_text(json.dumps({"machine": "another", "pid": 1, "started": "1"}))
    assert run.state()["state"] == "running"
    os.utime(lock, (time.time() - 300,) * 2)
    assert run.state()["state"] == "stopped"

    append(folder, "metrics.jsonl", run_folders.line(100))
    run.refresh()
    assert (run.state()["state"], run.state()["step"]) == ("finished", 100)


# ---- mistakes ----


def test_mistakes_are_one_line(tmp_path):
    folder, out = make_run(tmp_path / "run", 1), ["--out", str(tmp_path / "report.html")]
    (tmp_path / "empty").mkdir()
    (make_run(tmp_path / "new", 1) / "metrics.jsonl").unlink()
    bad = make_run(tmp_path / "bad", 1)
    append(bad, "metrics.jsonl", {"step": 2, "train/loss": "low"})
    (make_run(tmp_path / "cut", 10) / "samples/step_00000010.png").write_bytes(b"")

    for arguments, words in (
        ([tmp_path / "none"], "none: no such folder; pass the output folder"),
        ([tmp_path / "empty"], r"empty: neither config\.yaml nor metrics\.jsonl"),
        ([tmp_path / "new"], r"new: metrics\.jsonl has no lines; wait for the first logged step"),
        ([folder, folder], "run: given 2 times"),
        ([folder, "--port", "80"], "--port: needs --serve"),
        ([bad], r"bad/metrics\.jsonl: line 2: train/loss is not a number"),
        ([tmp_path / "cut"], r"step_00000010\.png: not a complete image"),
    ):
        with pytest.raises(UserError, match=words):
            cli.run(["report", *map(str, arguments), *out])

    with server.start([RunFolder(folder, "run")], 0) as taken:
        for port in (taken.server_port, 70000):
            with pytest.raises(UserError, match=f"--port {port}: cannot be listened on"):
                server.start([], port)


# ---- the server ----


@pytest.fixture
def served(tmp_path):
    """A server with one run; the page asks for news ten times a second."""
    folder = make_run(tmp_path / "run", 40, 0, "trainer.max_steps=100")
    with server.Server([RunFolder(folder, "run")], 0, refresh_seconds=0.1) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield folder, running
        running.shutdown()
        thread.join()


def get(running: server.Server, path: str, host: str | None = None) -> bytes:
    request = urllib.request.Request(running.url + path, headers={"Host": host} if host else {})
    with urllib.request.urlopen(request) as answer:
        return answer.read()


def test_the_server_reads_what_is_new(served):
    folder, running = served
    assert running.server_address[0] == "127.0.0.1"
    data = json.loads(get(running, "data.json"))
    (version,) = data["version"]
    assert data["runs"][0]["columns"]["step"][-1] == 40
    assert set(json.loads(get(running, f"data.json?{version}"))) == {"states"}

    append(folder, "metrics.jsonl", run_folders.line(41))
    news = json.loads(get(running, f"data.json?{version}"))
    assert news["runs"][0]["columns"]["train/loss"][-1] == run_folders.line(41)["train/loss"]
    assert news["states"][0]["step"] == 41

    # a run that starts again has no lines at first
    (folder / "new").touch()
    (folder / "new").replace(folder / "metrics.jsonl")
    restarted = json.loads(get(running, "data.json"))
    assert (restarted["runs"][0]["columns"], restarted["states"][0]["step"]) == ({"step": []}, 0)
    append(folder, "metrics.jsonl", *map(run_folders.line, range(1, 42)))

    # a sheet is the file itself
    source = news["runs"][0]["sheets"]["live"][-1]["source"]
    assert get(running, source) == (folder / "samples_live/step_00000040.png").read_bytes()

    # a line that cannot be read is reported until it is corrected; no other line is lost
    good = (folder / "metrics.jsonl").read_bytes()
    for bad, words in ((b"{]\n", "line 43 is not JSON"), (b'{"step": 43, "train/loss": ""}\n', "line 43: train/loss")):
        (folder / "metrics.jsonl").write_bytes(good + json.dumps(run_folders.line(42)).encode() + b"\n" + bad)
        for _ in range(2):
            assert words in json.loads(get(running, "data.json"))["error"]
    (folder / "metrics.jsonl").write_bytes(good)
    append(folder, "metrics.jsonl", run_folders.line(42), run_folders.line(43))
    assert json.loads(get(running, "data.json"))["runs"][0]["columns"]["step"] == list(range(1, 44))


def test_the_server_answers_only_for_its_own_name_and_files(served):
    _, running = served
    for path, host, code in (
        ("", "example.org:80", 403),
        ("data.json", "example.org:80", 403),
        ("sheet/0/live/41", None, 404),
        ("sheet/1/live/40", None, 404),
        ("sheet/0/../40", None, 404),
        ("config.yaml", None, 404),
    ):
        with pytest.raises(urllib.error.HTTPError, match=str(code)):
            get(running, path, host)
    assert get(running, "", f"localhost:{running.server_port}").startswith(b"<!doctype html>")


def test_ctrl_c_ends_the_server_in_good_order(tmp_path, monkeypatch, capsys):
    folder = make_run(tmp_path / "run", 1)
    # called by the server in its loop
    monkeypatch.setattr(server.Server, "service_actions", lambda self: signal.raise_signal(signal.SIGINT))
    cli.run(["report", str(folder), "--serve", "--port", "0"])
    assert re.fullmatch(r"open http://127\.0\.0\.1:\d+/ \(Ctrl-C ends it\)\n\nstopped\n", capsys.readouterr().out)


# ---- in a browser ----


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with browser.opened(str(tmp_path_factory.mktemp("profile"))) as driver:
        yield driver


def chart(driver, panel: str, expression: str):
    """A JavaScript expression over `chart`, the element of a chart that is in view."""
    driver.execute_script("document.querySelector(`[data-panel='${arguments[0]}']`).scrollIntoView()", panel)
    find = f"document.querySelector(`[data-panel='{panel}'] .chart`)"
    until(driver, f"{find}.data && !panels.get('{panel}').stale")
    return driver.execute_script(f"const chart = {find}; return {expression}")


def press(driver, selector: str) -> None:
    driver.execute_script("document.querySelector(arguments[0]).click()", selector)


def slide(driver, selector: str, value: float) -> None:
    script = "const node = document.querySelector(arguments[0]); node.value = arguments[1];"
    driver.execute_script(script + "node.dispatchEvent(new Event('input'))", selector, value)


def saved(folder: Path, name: str) -> bytes:
    """A downloaded file, once it is complete."""
    for _ in range(600):
        if (folder / name).is_file():
            return (folder / name).read_bytes()
        time.sleep(0.05)
    raise AssertionError(f"{name} was not saved, but {list(folder.iterdir())}")


@browser.needed
def test_the_page_in_a_browser(runs, driver, tmp_path):
    path = tmp_path / "report.html"
    cli.run(["report", *(str(run.path) for run in runs), "--out", str(path)])
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)})
    resize(driver, 1440, 900)
    browser.requests(driver)
    driver.get(path.as_uri())

    # groups in order; two lines with the numbers of the files
    titles = [node.text for node in all_of(driver, "section > h2") if node.text]
    assert titles[:5] == ["Quality over sampling steps", "Loss", "Validation", "Self-evaluation", "Samples"]
    losses = [
        [run_folders.line(step, offset)["train/loss"] for step in range(1, n + 1)] for n, offset in ((40, 0), (60, 0.5))
    ]
    assert chart(driver, "train/loss", "chart.data.map((line) => Array.from(line.y))") == losses
    assert chart(driver, "train/loss", "chart.data.map((line) => line.name)") == ["first", "second"]
    assert "objective.tau_steps: 8 (first), 20 (second)" in all_of(driver, "#loss > .warning")[0].text
    assert len(all_of(driver, "[data-panel='train/loss'] h3 .mark")) == 1
    assert all_of(driver, "[data-panel='val_plain/loss'] h3 .mark") == []
    chart(driver, "cells loss", "0"), chart(driver, "cells cosine", "0")
    assert len(all_of(driver, "[data-panel^=cells] h3 .mark")) == 1
    assert all_of(driver, "#optimisation .zeros")[0].text == "Always 0: train/skipped."
    assert chart(driver, "val/loss", "chart.data.map((line) => line.line.dash)") == ["solid", "dot"] * 2

    # quality over sampling steps, with intervals, and over network evaluations
    fd = "evaluation/dino/fd"
    assert chart(driver, fd, "chart.data.map((line) => Array.from(line.x))") == [[1, 4], [1, 4]]
    assert chart(driver, fd, "chart.data.map((line) => Array.from(line.y))") == [[11, 3.5], [13, 5.5]]
    assert chart(driver, fd, "Array.from(chart.data[0].error_y.arrayminus)") == [0.5, 0.5]
    press(driver, f"[data-panel='{fd}'] .tools button")
    assert chart(driver, fd, "chart.data.map((line) => Array.from(line.x))") == [[1, 4], [2, 8]]

    # x axis, logarithmic y axis, smoothing
    press(driver, "[data-axis=samples]")
    assert chart(driver, "train/loss", "Array.from(chart.data[0].x).slice(0, 3)") == [8, 16, 24]
    press(driver, "[data-axis=hours]")
    assert chart(driver, "train/loss", "chart.data[1].x[59]") == pytest.approx(60 * 1.5 / 3600)
    press(driver, "[data-axis=step]")
    press(driver, "[data-panel='train/loss'] .tools button")
    assert chart(driver, "train/loss", "chart.layout.yaxis.type") == "log"
    slide(driver, "#smoothing", 0.5)
    (a, b), smooth = losses[0][:2], chart(driver, "train/loss", "Array.from(chart.data[1].y).slice(0, 2)")
    assert smooth == pytest.approx([a, (a / 4 + b / 2) / (3 / 4)])
    slide(driver, "#smoothing", 0)

    press(driver, "#log-x")
    assert chart(driver, "train/loss", "chart.layout.xaxis.type") == "log"
    press(driver, "#log-x")

    # a zoom applies to every chart over training
    chart(driver, "train/loss", "Plotly.relayout(chart, {'xaxis.range[0]': 5, 'xaxis.range[1]': 15}) && 0")
    until(driver, "!document.querySelector('#reset').hidden")
    assert chart(driver, "train/grad_norm", "chart.layout.xaxis.range") == [5, 15]
    press(driver, "#reset")
    assert chart(driver, "train/grad_norm", "chart.layout.xaxis.range[1] > 50")

    # time shares add up
    assert chart(driver, "time first", "chart.data.map((line) => line.y[0]).reduce((a, b) => a + b)") == pytest.approx(
        100
    )
    assert chart(driver, "time first", "chart.data.every((line) => line.stackgroup)")

    # maps: z[s][t] of the step of the slider, one colour scale
    slide(driver, "#maps input", 1)
    table = run_folders.cells(20)["loss"]
    z = [[table[t][s] for t in range(4)] for s in range(4)]
    assert chart(driver, "cells loss", "chart.data.map(({z}) => z)") == [z, z]
    assert chart(driver, "cells loss", "[chart.layout.coloraxis.cmin, chart.layout.coloraxis.cmax]") == [0.1, 3.9]

    # samples: prompts are text, the slider selects a sheet
    assert [node.text for node in all_of(driver, ".prompt h3")] == list(run_folders.PROMPTS)
    pixel = """(() => {
      const canvas = document.querySelectorAll("[data-run=second] canvas")[2];
      return String(canvas.getContext("2d").getImageData(23, 15, 1, 1).data.slice(0, 3));
    })()"""
    until(driver, f"{pixel} == '0,160,60'")
    slide(driver, "#samples input", 0)
    until(driver, f"{pixel} == '0,160,10'")
    press(driver, "[data-weights=live]")
    until(driver, f"{pixel} == '0,160,11'")
    assert all_of(driver, ".strip h4")[0].text == "first\nlive weights, step 10"

    # configs
    rows = [
        [cell.text for cell in row.find_elements("css selector", "td")]
        for row in all_of(driver, "#config-differences tr")
    ]
    assert ["trainer.lr", "0.001", "0.002"] in rows
    assert all_of(driver, ".command")[0].text == "selfe train configs/debug/selfe_smoke.yaml 1 'trainer.name=run first'"

    # files
    press(driver, "[data-panel='train/loss'] .tools button:nth-child(3)")
    lines = list(csv.DictReader(io.StringIO(saved(downloads, "train_loss.csv").decode())))
    assert [float(line["train/loss"]) for line in lines] == losses[0] + losses[1]
    assert lines[40] | {"train/loss": ""} == {
        "run": "second",
        "step": "1",
        "samples": "8",
        "elapsed": "1.5",
        "time": "1700000002",
        "epoch": "0.25",
        "train/loss": "",
    }
    press(driver, "[data-panel='train/loss'] .tools button:nth-child(2)")
    assert Image.open(io.BytesIO(saved(downloads, "train_loss.png"))).size == (2000, 1200)

    # a hidden run, and a phone
    press(driver, "#legend button")
    assert chart(driver, "train/loss", "chart.data.map((line) => line.name)") == ["second"]
    resize(driver, 390, 844)
    until(driver, "document.documentElement.clientWidth == 390")
    for panel in ("train/loss", "cells loss", "time second"):
        chart(driver, panel, "0")
    assert driver.execute_script("return document.documentElement.scrollWidth") == 390
    assert browser.console(driver) == []
    assert [url for url in browser.requests(driver) if not url.startswith(("data:", "blob:"))] == [path.as_uri()]


@browser.needed
def test_a_served_page_follows_the_run(served, driver):
    folder, running = served
    resize(driver, 1440, 900)
    browser.console(driver)
    driver.get(running.url)
    chart(driver, "train/loss", "Plotly.relayout(chart, {'xaxis.range[0]': 30, 'xaxis.range[1]': 50}) && 0")
    assert driver.execute_script("return document.querySelector('.badge').textContent") == "stopped"
    press(driver, "#config-all summary")

    # a new line appears, and the zoom stays
    with FolderLock(folder, "trainer.output_dir", lost=print):
        append(folder, "metrics.jsonl", run_folders.line(41) | {"train/new": 3})
        until(driver, "document.querySelector('.facts dd').textContent == '41 of 100'")
        assert chart(driver, "train/loss", "chart.data[0].y[40]") == run_folders.line(41)["train/loss"]
        assert chart(driver, "train/loss", "chart.layout.xaxis.range") == [30, 50]
        assert chart(driver, "train/new", "Array.from(chart.data[0].y)") == [3]
        facts = driver.execute_script(
            "return Object.fromEntries([...document.querySelectorAll('.facts div')].map((fact) => "
            "[...fact.children].map((node) => node.textContent)))"
        )
    assert (facts["Remaining"], facts["Memory"], facts["MFU"]) == ("1 min", "12.5 GiB", "35.0 %")
    assert facts["Last checkpoint"].startswith("step 40, ")

    # what is unfolded stays so, and the slider follows new sheets
    assert driver.execute_script("return document.querySelector('#config-all').open")
    run_folders.add_sheets(folder, 41)
    until(driver, "document.querySelector('#samples output').textContent == 'step 41'")
    assert browser.console(driver) == []

    with (folder / "metrics.jsonl").open("a") as file:
        file.write("not JSON\n")
    until(driver, "document.querySelector('#problem').textContent.includes('line 42 is not JSON')")
