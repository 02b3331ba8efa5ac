"""Parquet and Arrow files: the same order and images as those of a manifest, and every mistake in one line."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from selfe import cli
from selfe.data.captions import Captions
from selfe.data.dataset import BucketedDataset
from selfe.data.manifest import ManifestData
from selfe.data.tables import TableData
from selfe.errors import BadSample, UserError
from tests.helpers.images import make_image
from tests.helpers.train_processes import finish, lines

IMAGES, ROWS = 14, 3  # in all, and in a row group or a batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images, a manifest of them, and the same as a Parquet file, as Arrow streams and as a saved data set."""
    folder = tmp_path_factory.mktemp("tables")
    lines = []
    for number in range(IMAGES):
        make_image(number, (32 + number % 3, 48)).save(folder / f"{number}.png")
        lines.append(json.dumps({"path": f"{number}.png", "captions": [f"long {number}", f"{number}"]}) + "\n")
    (folder / "all.jsonl").write_text("".join(lines))
    (folder / "saved").mkdir()

    halves = [table(folder, range(0, 8)), table(folder, range(8, IMAGES))]
    for number, half in enumerate(halves):
        pyarrow.parquet.write_table(half, folder / f"p-{number}.parquet", row_group_size=ROWS)
        for path in (folder / f"a-{number}.arrow", folder / "saved" / f"data-{number}.arrow"):
            write_stream(path, half)
    state = {"_data_files": [{"filename": "data-0.arrow"}, {"filename": "data-1.arrow"}]}
    (folder / "saved" / "state.json").write_text(json.dumps(state))
    return folder


def table(folder: Path, numbers: range) -> pyarrow.Table:
    images = [{"bytes": (folder / f"{number}.png").read_bytes(), "path": None} for number in numbers]
    captions = [[f"long {number}", f"{number}"] for number in numbers]
    return pyarrow.table({"id": list(numbers), "image": images, "captions": captions})


def write_stream(path: Path, content: pyarrow.Table, **options) -> None:
    with pyarrow.ipc.new_stream(str(path), content.schema, **options) as stream:
        stream.write_table(content, max_chunksize=ROWS)


def opened(folder: Path, name: str, **params) -> TableData:
    return TableData(folder / name, folder, cache_dir=folder / "cache", **{"pixels": 1024} | params)


def same_batches(a: BucketedDataset, b: BucketedDataset) -> None:
    for step in range(4):
        samples = range(8 * step, 8 * step + 8)
        assert a.costs(0, step, samples, "train") == b.costs(0, step, samples, "train")
        of_a, of_b = (data.batch(0, step, samples, range(8), "train") for data in (a, b))
        assert of_a.prompts == of_b.prompts
        assert all(x.equal(y) for x, y in zip(of_a.images, of_b.images, strict=True))


@pytest.mark.parametrize("name", ["p-*.parquet", "a-{0..1}.arrow", "saved"])
def test_tables_give_the_batches_of_a_manifest(folder, name):
    params = {"caption_weights": (1, 1), "flip": True}
    same_batches(opened(folder, name, **params), ManifestData(folder / "all.jsonl", folder, pixels=1024, **params))
    source = opened(folder, name).sources["train"][0]
    assert len(source) == IMAGES
    assert source.captions(3) == Captions(("long 3", "3"))
    assert source.name(9) == f"{source.files[1]}, row 2"
    assert source.sizes(np.arange(3)).tolist() == [[32, 48], [33, 48], [34, 48]]


def test_a_run_from_tables_on_two_processes_is_that_of_a_manifest_also_when_resumed(folder, tmp_path):
    common = {"base_dir": folder, "val_manifest": "null", "pixels": 1024, "cache_dir": tmp_path / "cache"}
    changes = [f"data.params.{key}={value}" for key, value in common.items()]
    manifest, table = (f"data.params.train_manifest={folder}/{name}" for name in ("all.jsonl", "p-{0..1}.parquet"))
    finish(tmp_path / "manifest", 2, *changes, manifest, "trainer.stop_step=3")
    for stop in (2, 3):
        kind = "data.module=selfe.data.tables.TableData"
        finish(tmp_path / "table", 2, kind, *changes, table, f"trainer.stop_step={stop}")
    assert lines(tmp_path / "table") == lines(tmp_path / "manifest")
    assert len(lines(tmp_path / "table")) == 3


def test_images_of_tables_may_be_paths_and_columns_may_be_chosen(folder):
    columns = {"file": [f"{number}.png" for number in range(4)], "text": list("abcd"), "short": list("efgh")}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "paths.parquet")
    source = opened(folder, "paths.parquet").sources["train"][0]
    assert [source.prompt(i) for i in range(4)] == list("abcd")
    assert source.location(2) == (folder / "2.png", 0, None)
    with Image.open(folder / "2.png") as image:
        assert source.image(2, None).tobytes() == image.tobytes()
    chosen = opened(folder, "paths.parquet", image_column="file", caption_column="short").sources["train"][0]
    assert [chosen.prompt(i) for i in range(4)] == list("efgh")
    with pytest.raises(UserError, match=r"no column words; set data.params.caption_column to one of 'file', 'text'"):
        opened(folder, "paths.parquet", caption_column="words")


@pytest.mark.parametrize("workers", [0, 1])
def test_check_data_reads_tables(folder, tmp_path, capsys, workers):
    good, bad = ({"bytes": content, "path": None} for content in ((folder / "0.png").read_bytes(), b"no image"))
    table = pyarrow.table({"image": [good, bad, None, good], "text": [["a", "b"], ["c"], ["d"], ["e"]]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    options = ["--workers", str(workers), "--min-side", "8", "--cache-dir", str(tmp_path / "cache")]
    with pytest.raises(SystemExit) as ended:
        cli.run(["check-data", str(tmp_path / "x.parquet"), *options])
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert f"undecodable: sample 2: {tmp_path}/x.parquet, row 2: cannot be decoded" in printed
    assert f"empty path: sample 3: {tmp_path}/x.parquet, row 3: there is no image" in printed
    assert "2 valid samples, 2 with problems" in printed
    assert ["2", "1", "50.0%"] in [line.split()[:3] for line in printed.splitlines()] or "captions per image" in printed
    with pytest.raises(
        UserError, match="--write-clean: writes a manifest; it cannot be used with tar shards and tables"
    ):
        cli.run(["check-data", str(folder / "saved"), "--write-clean", str(tmp_path / "m.tsv")])


def test_a_file_that_changed_since_it_was_indexed_is_one_line(folder, tmp_path):
    write_stream(tmp_path / "a.arrow", table(folder, range(4)))
    source = opened(tmp_path, "a.arrow").sources["train"][0]
    source.image(1, None)
    write_stream(tmp_path / "a.arrow", table(folder, range(4, 8)))
    with pytest.raises(UserError, match=r"a.arrow, row 2: differs from the index; it has changed or is damaged: run"):
        source.image(1, None)
    again = opened(tmp_path, "a.arrow").sources["train"][0]
    assert again.prompt(1) == "long 5"


def test_bad_rows_stop_or_are_replaced(folder, tmp_path):
    good = {"bytes": (folder / "0.png").read_bytes(), "path": None}
    images = [good, {"bytes": b"no image", "path": None}, None, good]
    pyarrow.parquet.write_table(
        pyarrow.table({"image": images, "text": ["a", "b", "c", "  "]}), tmp_path / "bad.parquet"
    )
    with pytest.raises(BadSample, match=rf"^{tmp_path}/bad.parquet, row 2: cannot be decoded"):
        opened(tmp_path, "bad.parquet")
    data = opened(tmp_path, "bad.parquet", on_bad_image="replace")
    assert len(data.sources["train"][0]) == 4
    batch = data.batch(0, 0, range(4), range(4), "train")
    assert set(batch.prompts) == {"a"}
    assert {"row 3: there is no image" in text for text in batch.replaced} == {False, True}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none-*.parquet", "no such table; set data.params.train_manifest to a pattern such as"),
        ("{a-0.arrow,p-0.parquet}", r"has .arrow and .parquet files; a pattern names either"),
        ("", "is not a saved data set; give a pattern such as"),
        ("cut.parquet", r"cut.parquet: .*; write or download the file again"),
        ("packed.arrow", "packed.arrow: is compressed; save the data set without compression"),
        ("numbers.parquet", "numbers.parquet: images are neither bytes nor paths but int64; set data.params.image_col"),
        (
            "splits",
            "splits: has several splits; set data.params.train_manifest to .*splits/train, .*splits/test",
        ),
        ("empty.parquet", "empty.parquet: no images"),
    ],
)
def test_tables_that_cannot_be_read_are_one_line(folder, name, message):
    (folder / "cut.parquet").write_bytes((folder / "p-0.parquet").read_bytes()[:-40])
    options = pyarrow.ipc.IpcWriteOptions(compression="lz4")
    write_stream(folder / "packed.arrow", table(folder, range(8)), options=options)
    for path, images in {"numbers": [1], "empty": pyarrow.array([], pyarrow.binary())}.items():
        pyarrow.parquet.write_table(
            pyarrow.table({"image": images, "text": ["a"] * len(images)}), folder / f"{path}.parquet"
        )
    (folder / "splits").mkdir(exist_ok=True)
    (folder / "splits" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match=message) as error:
        opened(folder, name)
    assert "\n" not in str(error.value)
    assert not list(folder.glob("*.partial"))
