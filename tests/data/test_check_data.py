"""The checker: every problem at once, by kind and line, and a clean manifest that then has none."""

from pathlib import Path

import pytest

from selfe import cli
from selfe.data.manifest import ManifestData
from tests.helpers.images import make_image


@pytest.fixture
def folder(tmp_path) -> Path:
    """Nine lines, each wrong in its own way, between three good ones."""
    for number, size in enumerate([(80, 100), (90, 90), (100, 80)]):
        make_image(number, size).save(tmp_path / f"{number}.png")
    make_image(3, (20, 90)).save(tmp_path / "small.png")
    complete = (tmp_path / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(complete[: len(complete) // 2])
    (tmp_path / "text.png").write_bytes(b"not an image")
    make_image(5, (500, 500)).save(tmp_path / "huge.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "1.png").read_bytes())
    lines = ["0.png\tfirst", "no tab", "1.png\t", "none.png\tx", "cut.png\tx", "text.png\tx", "", "1.png\tsecond"]
    lines += ["small.png\tx", "huge.png\tx", "copy.png\tsecond", "1.png\tother words", "2.png\tthird\t10\t10"]
    (tmp_path / "a.tsv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n2.png\tcaf\xe9\n")
    return tmp_path


EXPECTED = {
    2: "no tab",
    3: "empty caption",
    4: "missing",
    5: "truncated",
    6: "undecodable",
    9: "too small",
    10: "too large",
    11: "duplicate",
    13: "wrong size",
    14: "invalid UTF-8",
}


@pytest.mark.parametrize("workers", [0, 2])
def test_all_problems_are_told_at_once_and_the_clean_manifest_has_none(folder, capsys, workers):
    clean = folder / "clean.tsv"
    command = [str(folder / "a.tsv"), "--base-dir", str(folder), "--workers", str(workers)]
    command += ["--write-clean", str(clean), "--max-pixels", "200000", "--pixels", "4096", "65536"]
    with pytest.raises(SystemExit) as ended:
        cli.run(["check-data", *command])
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    problems = [line for line in printed.splitlines() if ": line " in line]
    assert len(problems) == len(EXPECTED)
    for (number, kind), line in zip(EXPECTED.items(), problems, strict=True):
        assert line.startswith(f"{kind}: line {number}: "), line
        assert f"       1 {kind}" in printed
    assert "3 valid lines, 10 with problems" in printed
    assert clean.read_text().splitlines() == [
        "0.png\tfirst\t100\t80",
        "1.png\tsecond\t90\t90",
        "1.png\tother words\t90\t90",
    ]
    cli.run(["check-data", str(clean), "--base-dir", str(folder), "--workers", "0"])
    assert "3 valid lines, 0 with problems" in capsys.readouterr().out
    dataset = ManifestData(str(clean), str(folder), pixels=4096)
    assert len(dataset.batch(0, 0, range(3), range(3), "train").images) == 3


def test_tells_sizes_ratios_lengths_and_buckets(folder, capsys):
    (folder / "good.tsv").write_text('0.png\tfirst words\n1.png\tsecond\n2.png\t"third"\n')
    options = ["--base-dir", str(folder), "--workers", "0", "--pixels", "4096", "65536"]
    cli.run(["check-data", str(folder / "good.tsv"), *options])
    printed = capsys.readouterr().out
    assert [line.split()[:4] for line in printed.splitlines() if line.startswith("         64 x 64")] == [
        ["64", "x", "64", "3"]
    ]
    assert "0 of 3 images have fewer than 4096 pixels" in printed
    assert "3 of 3 images have fewer than 65536 pixels" in printed
    assert "estimated" in printed
    assert "1 captions are enclosed in quotes, which stay part of them" in printed


def test_a_manifest_of_nothing_good_is_not_fine(tmp_path):
    (tmp_path / "a.tsv").write_text("\n\n")
    with pytest.raises(SystemExit) as ended:
        cli.run(["check-data", str(tmp_path / "a.tsv"), "--workers", "0"])
    assert ended.value.code == 1
