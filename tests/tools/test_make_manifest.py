"""Images with captions of other tools become manifests or shards; what cannot is counted and named."""

import gzip
import io
import json
import sys
from pathlib import Path

import pytest

from selfe import cli
from selfe.data.manifest import ManifestData
from selfe.data.shards import ShardData
from selfe.errors import UserError
from tests.helpers.images import make_image


def convert(folder: Path, name: str, content: bytes, *options: str) -> str:
    (folder / name).write_bytes(content)
    cli.run(["make-manifest", str(folder / name), "--out", str(folder / "out" / "m.tsv"), *options])
    return (folder / "out" / "m.tsv").read_bytes().decode()


EXPECTED = 'a.png\ta "big" dog, on grass\nb.png\tfirst second\n'
CSV = 'id,caption,file_name\n1,"a ""big"" dog, on grass",a.png\n\n2,"first\nsecond",b.png\n'
ROWS = [{"file_name": "a.png", "text": 'a "big" dog, on grass'}, {"file_name": "b.png", "text": "first\nsecond"}]


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("t.csv", CSV.encode(), ()),
        ("t.csv", CSV.replace("\n", "\r\n").encode("utf-8-sig"), ()),
        ("t.csv", CSV.replace("\n", "\r").encode(), ()),
        ("t.csv", CSV.encode("utf-16"), ()),
        ("t.csv.gz", gzip.compress(CSV.encode(), mtime=0), ()),
        ("t.dat", CSV.encode(), ("--delimiter", ",")),
        ("t.csv", CSV.replace("caption", "words").encode(), ("--caption", "words")),
        ("t.tsv", b'a.png\t"a ""big"" dog, on grass"\nb.png\t"first\nsecond"\n', ("--no-header",)),
        ("t.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS).encode(), ()),
    ],
)
def test_tables_of_other_tools_are_read(tmp_path, capsys, name, content, options):
    assert convert(tmp_path, name, content, *options) == EXPECTED
    printed = capsys.readouterr().out
    assert "m.tsv: 2 lines" in printed
    assert "line breaks and tabs became spaces in 1 captions" in printed


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "t.csv",
            b"id,words\n1,a\n",
            "no column path or .*; pass --no-header .*, or --image with one of 'id', 'words'",
        ),
        ("t.csv", b"path,words\n1,a\n", "no column caption or .*; pass --caption with one of 'path', 'words'"),
        ("t.xlsx", b"x", "unknown suffix"),
        ("t.csv", b"path,caption\na.png,caf\xe9\n", "pass --encoding"),
        ("t.csv", b'path,caption\na.png,"a" b\n', "after row 0: .*expected after"),
        ("t.json", b"[]", "one JSON object per line"),
    ],
)
def test_tables_that_cannot_be_read_are_one_line(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as raised:
        convert(tmp_path, name, content)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def fails(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.run(["make-manifest", *map(str, arguments)])
    return ended.value.code


def test_rows_that_cannot_be_used_are_left_out_and_counted(tmp_path, capsys):
    rows = ["path,caption", "a.png,", "b.png,good", "c.png", "d.png,a\x00b", "e.png,one, two"]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    assert fails(tmp_path / "t.csv", "--out", tmp_path / "m.tsv") == 1
    assert (tmp_path / "m.tsv").read_text() == "b.png\tgood\n"
    printed = capsys.readouterr().out
    assert "2 left out: empty caption" in printed
    assert f"{tmp_path}/t.csv, row 2: path or prompt is empty" in printed
    assert "1 left out: control character" in printed
    assert "1 left out: too many columns" in printed
    assert "row 6: 3 fields, but the header has 2; enclose captions with delimiters in quotes" in printed


def test_json_values_that_are_no_texts_are_left_out(tmp_path, capsys):
    rows = ['{"image": "a.png", "text": {"a": "one"}}', "{", '{"image": 3, "text": "x"}', '{"image": "b.png"}']
    (tmp_path / "t.jsonl").write_text("\n".join([*rows, '{"text": "good", "image": "c.png"}']))
    assert fails(tmp_path / "t.jsonl", "--out", tmp_path / "m.tsv") == 1
    assert (tmp_path / "m.tsv").read_text() == "c.png\tgood\n"
    printed = capsys.readouterr().out
    assert "row 1: the caption is not a text but dict" in printed
    assert "row 2: not a JSON object" in printed
    assert "row 3: the image is neither a path nor bytes but int" in printed
    assert "1 left out: empty caption" in printed


def test_nothing_is_written_when_nothing_can_be_used(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("path,caption\na.png,\n")
    assert fails(tmp_path / "t.csv", "--out", tmp_path / "m.tsv") == 1
    assert not (tmp_path / "m.tsv").exists()
    assert "nothing to write" in capsys.readouterr().out


@pytest.fixture
def folder(tmp_path) -> Path:
    """Images with captions of every kind, and files that are not used."""
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    for number, name in enumerate(["b.png", "a.png", "both.png", "alone.png", "bad.png", "sub/c.png", "sub/d.png"]):
        make_image(number, (64, 64)).save(root / name)
    (root / "a.txt").write_text("first\nsecond\n")
    (root / "b.caption").write_text("third")
    (root / "both.txt").write_text("by the .txt")
    (root / "both.caption").write_text("not used")
    (root / "bad.txt").write_bytes(b"caf\xe9")
    (root / "orphan.txt").write_text("no image")
    (root / "notes.md").write_text("")
    (root / ".hidden").write_text("")
    rows = [{"file_name": "d.png", "text": "listed"}, {"file_name": "d.png", "text": "listed again"}]
    rows.append({"file_name": "missing.png", "text": "x"})
    (root / "sub" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "sub" / "c.txt").write_text("not listed")
    return root


FOLDER = (
    "a.png\tfirst second\nb.png\tthird\nboth.png\tby the .txt\n"
    "sub/c.png\tnot listed\nsub/d.png\tlisted\nsub/d.png\tlisted again\n"
)


def test_a_folder_with_captions_beside_the_images_and_metadata(folder, tmp_path, capsys):
    assert fails(folder, "--out", tmp_path / "m.tsv") == 1
    assert (tmp_path / "m.tsv").read_text() == FOLDER
    printed = capsys.readouterr().out
    for kind, name in {
        "no caption": "alone.png: there is no .txt or .caption beside it",
        "invalid UTF-8": "bad.txt: not UTF-8 at byte 3",
        "missing image": "missing.png",
        "caption without image": "orphan.txt",
    }.items():
        assert f"1 left out: {kind}" in printed
        assert name in printed
    assert "not used: 1 x .caption of an image that has another caption, 1 x .md, 1 x hidden file" in printed
    assert f"selfe check-data {tmp_path}/m.tsv --base-dir {folder}" in printed


def test_a_folder_becomes_shards_with_the_same_images(folder, tmp_path, capsys):
    (folder / "b.png").write_bytes(b"not an image")
    assert fails(folder, "--shards", tmp_path / "shards", "--samples", 2) == 1
    assert "5 samples in 3 tar files" in (printed := capsys.readouterr().out)
    assert f"{folder}/b.png: cannot be decoded" in printed

    (tmp_path / "m.tsv").write_text(FOLDER.replace("b.png\tthird\n", ""))
    lines = ManifestData(tmp_path / "m.tsv", folder, pixels=1024)
    shards = ShardData(tmp_path / "shards" / "train-*.tar", pixels=1024)
    batches = [data.batch(0, 0, range(5), range(5), "train") for data in (lines, shards)]
    assert batches[0].prompts == batches[1].prompts
    assert all(a.equal(b) for a, b in zip(batches[0].images, batches[1].images, strict=True))

    with pytest.raises(UserError, match="already exists"):
        cli.run(["make-manifest", str(folder), "--shards", str(tmp_path / "shards")])
    assert [path.name for path in tmp_path.glob("shards*")] == ["shards"]


def test_a_manifest_is_not_written_under_the_name_of_another_format(folder, tmp_path):
    for command in (["make-manifest", str(folder), "--out"], ["check-data", str(tmp_path / "m.tsv"), "--write-clean"]):
        (tmp_path / "m.tsv").write_text("a.png\tx\n")
        with pytest.raises(UserError, match=r"a TSV file is written, and would be read as .csv; use .*out.tsv"):
            cli.run([*command, str(tmp_path / "out.csv")])


def test_sources_that_are_none_are_one_line(folder, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-0.parquet").write_bytes(b"PAR1")
    (tmp_path / "t.csv").write_text("path,caption\na.png,x\n")
    for sources, message in {
        (tmp_path / "none",): "no such file or folder",
        (folder, tmp_path / "t.csv"): "give a folder alone",
        (tmp_path / "data",): "has no images but parquet files; give these instead, such as .*/data/train-",
    }.items():
        with pytest.raises(UserError, match=message):
            cli.run(["make-manifest", *map(str, sources), "--out", str(tmp_path / "m.tsv")])


def png(seed: int) -> bytes:
    file = io.BytesIO()
    make_image(seed, (64, 64)).save(file, "png")
    return file.getvalue()


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"reading it needs pyarrow, which is not installed; run ./scripts"):
        cli.run(["make-manifest", str(tmp_path / "t.parquet"), "--out", str(tmp_path / "m.tsv")])


def test_parquet_with_paths_and_with_images(tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for name, images in {
        "paths": ["a.png", "b.png", None],
        "bytes": [png(0), png(1), None],
        "structs": [{"bytes": png(0), "path": "a.png"}, {"bytes": png(1), "path": None}, None],
    }.items():
        table = pyarrow.table({"image": images, "text": ["one", "two\nlines", "three"], "id": [1, 2, 3]})
        parquet.write_table(table, tmp_path / f"{name}.parquet")

    assert fails(tmp_path / "paths.parquet", "--out", tmp_path / "m.tsv") == 1
    assert (tmp_path / "m.tsv").read_text() == "a.png\tone\nb.png\ttwo lines\n"
    printed = capsys.readouterr().out
    assert "paths.parquet, row 3: there is no image" in printed
    assert "images from 'image', captions from 'text'; not used: 'id'" in printed

    with pytest.raises(UserError, match="row 1: stores the image itself, not a path; write tar shards with --shards"):
        cli.run(["make-manifest", str(tmp_path / "bytes.parquet"), "--out", str(tmp_path / "m.tsv")])
    for name in ("bytes", "structs"):
        assert fails(tmp_path / f"{name}.parquet", "--shards", tmp_path / name) == 1
        data = ShardData(tmp_path / name / "train-*.tar", pixels=1024)
        assert sorted(data.batch(0, 0, range(2), range(2), "train").prompts) == ["one", "two lines"]

    (tmp_path / "cut.parquet").write_bytes((tmp_path / "bytes.parquet").read_bytes()[:-40])
    with pytest.raises(UserError, match=r"cut\.parquet: .*; write or download the file again"):
        cli.run(["make-manifest", str(tmp_path / "cut.parquet"), "--out", str(tmp_path / "m.tsv")])


def test_data_sets_in_the_layout_of_save_to_disk(tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")

    def save(folder: Path) -> None:
        folder.mkdir(parents=True)
        for number, text in enumerate(["one", "two"]):
            table = pyarrow.table({"image": [{"bytes": png(number), "path": None}], "text": [text]})
            with pyarrow.ipc.new_stream(str(folder / f"data-{number}.arrow"), table.schema) as stream:
                stream.write_table(table)
        state = {"_data_files": [{"filename": "data-0.arrow"}, {"filename": "data-1.arrow"}]}
        (folder / "state.json").write_text(json.dumps(state))

    save(tmp_path / "plain"), save(tmp_path / "splits" / "train")
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')

    cli.run(["make-manifest", str(tmp_path / "plain"), "--shards", str(tmp_path / "a")])
    with pytest.raises(UserError, match="has several splits; pass --split with one of 'train', 'test'"):
        cli.run(["make-manifest", str(tmp_path / "splits"), "--shards", str(tmp_path / "b")])
    cli.run(["make-manifest", str(tmp_path / "splits"), "--shards", str(tmp_path / "b"), "--split", "train"])
    assert (tmp_path / "a" / "train-000000.tar").read_bytes() == (tmp_path / "b" / "train-000000.tar").read_bytes()
    assert "2 samples in 1 tar files" in capsys.readouterr().out
