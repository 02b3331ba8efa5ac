"""Evaluations in tables and in the report: values with intervals, curves over steps, warnings for unlike records."""

import json
import re
from dataclasses import replace

import pytest

from selfe import cli
from selfe.errors import UserError
from selfe.evaluation import results, tables
from selfe.evaluation.results import Evaluation, Value
from selfe.tools.report import comparability, page
from selfe.tools.report.run_folder import RunFolder
from tests.helpers.run_folders import add_evaluation, evaluation, make_run


def test_a_file_is_read_as_it_was_written(tmp_path):
    add_evaluation(tmp_path, evaluation())
    assert Evaluation.read(tmp_path / results.FILE) == evaluation()
    (tmp_path / results.FILE).write_text("{}")
    with pytest.raises(UserError, match="not an evaluation of this version; run selfe evaluate again"):
        Evaluation.read(tmp_path / results.FILE)


def test_tables_have_a_row_per_setting_with_intervals():
    lines = tables.markdown([evaluation()]).splitlines()
    assert lines[0] == "| guidance | steps | NFE | fd (dino) | clip_score (clip) |"
    assert lines[2] == "| 1 | 1 | 1 | 11 [10.5, 11.5] | 21.12 |"
    assert lines[5] == "| 3 | 4 | 8 | 5.5 [5, 6] | 24.12 |"
    assert lines[-1] == "50 images per row, 100 reference images ef"
    console = tables.plain([evaluation()]).splitlines()
    assert console[1].split() == ["1", "1", "1", "11", "21.12"]


def test_rows_that_differ_in_a_parameter_of_the_sampler_name_it():
    one = evaluation()
    cells = [cell | {"settings": cell["settings"] | {"eta": 0.5}} for cell in one.cells]
    lines = tables.markdown([one, replace(one, cells=cells)]).splitlines()
    assert lines[0] == "| guidance | sampler | steps | NFE | fd (dino) | clip_score (clip) |"
    assert lines[2].startswith("| 1 | renoise eta 1 | 1 |")
    assert lines[6].startswith("| 1 | renoise eta 0.5 | 1 |")


def test_latex_is_escaped():
    text = tables.latex([evaluation()])
    assert r"guidance & steps & NFE & fd (dino) & clip\_score (clip) \\" in text
    assert r"3 & 4 & 8 & 5.5 [5, 6] & 24.12 \\" in text
    assert text.startswith("% 50 images per row")


def test_numbers_with_different_records_have_a_warning():
    a, b = evaluation(), evaluation("runs/b/images", 1)
    assert results.differences([a, b]) == {}
    assert "model" in tables.markdown([a, b])

    other = evaluation("runs/b/images", images="gh", count=99)
    assert results.differences([a, other]) == {("reference",): [("dino", "fd")]}  # the CLIP score needs no reference
    warning = "measured with different reference images: fd (dino)."
    assert warning in tables.plain([a, other])

    # settings count for the metrics that they change
    other = replace(b, settings={"max_features": 100, "nearest_k": 3})
    assert results.differences([a, other]) == {}
    values = [Value(0, "dino", name, 0.5) for name in ("fd", "kid", "recall")]
    unlike = results.differences([replace(a, values=values), replace(other, values=values)])
    assert unlike == {("max_features",): [("dino", "kid")], ("max_features", "nearest_k"): [("dino", "recall")]}


def test_the_report_has_curves_over_steps_with_warnings(tmp_path):
    for name, count in (("first", 100), ("second", 99)):
        run = make_run(tmp_path / name, 1)
        add_evaluation(run / "images", evaluation(count=count))
    runs = [RunFolder(tmp_path / name, name) for name in ("first", "second")]
    data = json.loads(json.dumps(page.static(runs, 1)))

    curves = data["runs"][0]["evaluations"]
    assert [(curve["extractor"], curve["metric"], curve["label"]) for curve in curves] == [
        ("dino", "fd", "guidance 1, s ratio 0, renoise eta 1"),
        ("clip", "clip_score", "guidance 1, s ratio 0, renoise eta 1"),
        ("dino", "fd", "guidance 3, s ratio 0, renoise eta 1"),
        ("clip", "clip_score", "guidance 3, s ratio 0, renoise eta 1"),
    ]
    points = [(point["steps"], point["nfe"], point["value"], point["low"]) for point in curves[2]["points"]]
    assert points == [(1, 2, 13.0, 12.5), (4, 8, 5.5, 5.0)]

    (warning,) = [each for each in comparability.warnings(runs) if "reference" in each["text"]]
    assert re.search(warning["metrics"], "evaluation/dino/fd")
    assert not re.search(warning["metrics"], "train/loss")


def test_the_report_writes_a_table_of_all_jobs(tmp_path, capsys):
    for name in ("first", "second"):
        add_evaluation(make_run(tmp_path / name, 1) / "images", evaluation(f"runs/{name}/images"))
    table = tmp_path / "table.md"
    given = ["report", str(tmp_path / "first"), str(tmp_path / "second"), "--out", str(tmp_path / "report.html")]
    cli.run([*given, "--table", str(table)])
    lines = table.read_text().splitlines()
    assert lines[0].startswith("| model | guidance | steps | NFE | fd (dino) |")
    assert [line.split(" | ")[0] for line in lines[2:10]] == ["| runs/first/images"] * 4 + ["| runs/second/images"] * 4
    with pytest.raises(UserError, match=r"--table .*t.csv: the file must be .md"):
        cli.run([*given, "--table", str(tmp_path / "t.csv")])


def test_the_report_takes_the_folder_of_a_job_and_sees_new_evaluations(tmp_path):
    add_evaluation(tmp_path / "images", evaluation())
    run = RunFolder(tmp_path / "images", "images")
    assert [curve["metric"] for curve in run.describe()["evaluations"]][:2] == ["fd", "clip_score"]
    assert run.state()["state"] == "stopped"
    before = run.version
    run.refresh()
    assert run.version == before
    add_evaluation(tmp_path / "images", evaluation(shift=1))
    run.refresh()
    assert run.version == before + 1
    assert run.describe()["evaluations"][0]["points"][0]["value"] == 12
