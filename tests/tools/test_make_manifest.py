"""Tables of other tools become manifests; what cannot is counted and named."""

import gzip
import json
from pathlib import Path

import pytest

from selfe import cli
from selfe.types import UserError


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
    assert "2 lines; line breaks and tabs became spaces in 1 captions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"id,words\n1,a\n", "no column path or file_name .*; pass --image with one of 'id', 'words'"),
        ("t.csv", b"path,words\n1,a\n", "no column caption or .*; pass --caption with one of 'path', 'words'"),
        ("t.xlsx", b"x", "unknown suffix"),
        ("t.csv", b"path,caption\na.png,caf\xe9\n", "pass --encoding"),
        ("t.csv", b'path,caption\na.png,"a" b\n', "after row 0: .*expected after"),
        ("t.jsonl", b"{\n", "after row 0: "),
    ],
)
def test_tables_that_cannot_be_read_are_one_line(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as raised:
        convert(tmp_path, name, content)
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "out").iterdir())


def test_rows_without_a_caption_are_left_out_and_counted(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        convert(tmp_path, "t.csv", b"path,caption\na.png,\nb.png,good\nc.png\nd.png,a\x00b\n")
    assert ended.value.code == 1
    assert (tmp_path / "out" / "m.tsv").read_text() == "b.png\tgood\n"
    printed = capsys.readouterr().out
    assert "empty caption: row 2: " in printed
    assert "2 rows left out: empty caption" in printed
    assert "1 rows left out: control character" in printed
