"""Manifests in every form, the images they name, and what happens when one is bad."""

import csv
import gzip
import io
import json
import os
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image

from selfe import cli, config, train
from selfe.data import manifest_formats
from selfe.data.captions import SPACES
from selfe.data.dataset import plan
from selfe.data.manifest import RECORD, Manifest, ManifestData
from selfe.errors import BadSample, UserError
from selfe.io import image_decode, text_files
from tests.helpers.images import make_image, manifest

SMOKE = Path(__file__).parents[2] / "configs/debug/selfe_smoke.yaml"


def opened(path: Path, text: bytes, strict: bool = True) -> Manifest:
    path.write_bytes(text)
    return Manifest(path, path.parent, image_decode.MAX_PIXELS, strict=strict)


@pytest.fixture
def folder(tmp_path) -> Path:
    for number, size in enumerate([(40, 60), (50, 50), (64, 32)]):
        make_image(number, size).save(tmp_path / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_every_form_of_text_reads_alike(folder, bom, end, last):
    lines = ["0.png\tein Vogel, 紅い鳥", "", "1.png\ta  bird ", "  ", "2.png\ta line with size\t32\t64", ""]
    text = bom + end.join(line.encode() for line in lines) + (end if last else b"")
    parsed = opened(folder / "a.tsv", text)
    assert [parsed.prompt(i) for i in range(len(parsed))] == ["ein Vogel, 紅い鳥", "a  bird", "a line with size"]
    assert [Path(parsed.name(i)).name for i in range(3)] == ["0.png", "1.png", "2.png"]
    assert parsed.sizes(np.arange(3)).tolist() == [[40, 60], [50, 50], [64, 32]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\r\n\r\n", "empty"),
        (b"0.png\tx\n1.png\t\r\n", "line 2: path or prompt is empty"),
        (b"0.png\tx\t12\tten\n", "line 1: width and height"),
        (b"0.png\tx\t0\t10\n", "line 1: width and height"),
        (b"\n0.png\tx\nnone.png\ty\n", "line 3: .*none.png: no such image"),
    ],
)
def test_mistakes_are_one_line(folder, text, message):
    def read() -> list[str]:
        parsed = opened(folder / "a.tsv", text)
        return [parsed.prompt(i) for i in range(len(parsed))]

    with pytest.raises(UserError, match=message) as error:
        read()
    assert "\n" not in str(error.value)
    assert not [path for path in folder.iterdir() if path.suffix in (".lock", ".partial")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.png\tx\n".encode("utf-16"), "a.tsv: the file is UTF-16; save it as UTF-8"),
        ("0.png\tx and more\n".encode("utf-16-le"), "a.tsv: the file is UTF-16; save it as UTF-8"),
        (gzip.compress(b"0.png\tx\n", mtime=0), "a.tsv: the file is compressed with gzip; run gunzip"),
        (b"PK\x03\x04 and more", "a.tsv: the file is a zip archive or a spreadsheet"),
        (b"0.png\tx\r1.png\ty\r", r"line 1: a carriage return alone .*selfe make-manifest"),
        (b"0.png\tx\ty\r1.png\ty\tz\n", r"line 1: a carriage return alone .*selfe make-manifest"),
        (b"0.png\tx\n0.png\ta\x00b\n", r"line 2: contains the control character U\+0000; remove it"),
        ("0.png\ta\u2028b\n".encode(), r"line 1: contains the control character U\+2028; remove it"),
        (
            b'0.png\tx\n1.png\t"first\nsecond"\n',
            "line 3: .*; the caption that begins in the line before",
        ),
        (
            b'0.png\t"a ""big"" dog"\n1.png\tx\n2.png\t"""y"" is a letter"\n',
            r"line 1: .*has the quotes of CSV files; convert the file with selfe make-manifest \(2 such lines\)",
        ),
        (b'"0.png"\t"a dog"\n', r"line 1: .*has the quotes of CSV files; .* \(1 such lines\)"),
    ],
)
def test_causes_are_named(folder, text, message):
    with pytest.raises(UserError, match=message) as error:
        opened(folder / "a.tsv", text)
    assert "\n" not in str(error.value)
    assert not list(folder.glob("a.tsv.*"))


def test_only_a_line_feed_ends_a_line_and_quotes_may_be_part_of_a_caption(folder, capsys):
    text = '0.png\ta\x85b\n1.png\t"Hello" on a wall\n2.png\t"a dog"\n'
    source = opened(folder / "a.tsv", text.encode())
    assert [source.prompt(i) for i in range(len(source))] == ["a\x85b", '"Hello" on a wall', '"a dog"']
    assert "a.tsv: 1 captions are enclosed in quotes, which stay part of them; " in capsys.readouterr().out
    Manifest(folder / "a.tsv", folder, image_decode.MAX_PIXELS)
    assert capsys.readouterr().out == ""  # once, when it is indexed


CSV = 'id,caption,file_name\n1,"a ""big"" dog,\r\non grass",0.png\n\n2, second ,1.png\n,,\n3,"third\nline",2.png\n'
ROWS = [("0.png", 'a "big" dog,\r\non grass'), ("1.png", " second "), ("2.png", "third\nline")]
JSON = "\n".join(json.dumps({"id": 7, "image": path, "text": text}) for path, text in ROWS)
TABLES = {"a.csv": CSV.encode(), "b.csv": b"\xef\xbb\xbf" + CSV.encode(), "a.jsonl": JSON.encode()}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_read_as_their_conversion_to_a_manifest(folder, capsys, name):
    direct = opened(folder / name, TABLES[name])
    assert f"{name}: images are those of 'file_name', captions" in capsys.readouterr().out or name == "a.jsonl"
    cli.run(["make-manifest", str(folder / name), "--out", str(folder / "m.tsv")])
    converted = Manifest(folder / "m.tsv", folder, image_decode.MAX_PIXELS)
    assert [direct.line(i) for i in range(len(direct))] == [converted.line(i) for i in range(len(converted))]
    assert [direct.prompt(i) for i in range(3)] == ['a "big" dog, on grass', "second", "third line"]
    assert direct.sizes(np.arange(3)).tolist() == [[40, 60], [50, 50], [64, 32]]
    assert direct.lengths(np.arange(3)).tolist() == [21, 6, 10]  # bytes of captions, not of records
    again = Manifest(folder / name, folder, image_decode.MAX_PIXELS)  # from the index
    assert [again.prompt(i) for i in (2, 0)] == ["third line", 'a "big" dog, on grass']
    cli.run(["check-data", str(folder / name), "--base-dir", str(folder), "--workers", "0", "--min-side", "32"])
    assert "3 valid lines, 0 with problems" in capsys.readouterr().out


CAPTIONS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufeff")).filter(
    lambda text: text.strip() and not text_files.CONTROL.search(SPACES.sub(" ", text.strip()))
)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@hypothesis.settings(max_examples=100, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(captions=st.lists(CAPTIONS, min_size=1, max_size=5))
def test_any_caption_is_read_back_from_the_position_of_its_record(tmp_path, suffix, captions):
    file = io.StringIO(newline="")
    if suffix == ".csv":
        csv.writer(file).writerows([("path", "caption"), *(("a.png", caption) for caption in captions)])
    else:
        file.writelines(json.dumps({"path": "a.png", "caption": caption}) + "\n" for caption in captions)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content := file.getvalue().encode())

    form = manifest_formats.detect(path)
    with path.open("rb") as opened_file:
        places = list(manifest_formats.records(opened_file, form))
    expected = [SPACES.sub(" ", caption.strip()) for caption in captions]
    assert [form.parse(record).prompt for _, _, record in places] == expected
    for offset, number, record in places:
        assert form.next_record(iter(content[offset:].splitlines(keepends=True))) == record
        assert number == 1 + content[:offset].count(b"\n")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", 'path,caption\n0.png,"one\ntwo"\n1.png,\n', "a.csv, line 4: path or prompt is empty"),
        ("a.csv", "path,caption\n0.png,a dog, brown\n", "a.csv, line 2: 3 fields, but the header has 2"),
        ("a.csv", 'path,caption\n0.png,"a" dog\n', "a.csv, line 2: .*expected after"),
        ("a.csv", 'path,caption\n0.png,"a dog\n', "a.csv, line 2: unexpected end of data"),
        ("a.csv", "path,caption\nnone.png,x\n", "a.csv, line 2: .*none.png: no such image"),
        ("a.csv", "0.png,a dog\n", "no column path or .*; set data.params.image_column to one of"),
        ("a.csv", "path,caption\r0.png,a dog\r", "a.csv, line 1: the header is not valid CSV"),
        ("a.csv", "path,caption\n", "a.csv: the manifest is empty"),
        ("a.jsonl", '{"image": "0.png", "text": "x"}\n{"image": "1.png"}', "a.jsonl, line 2: path or prompt is empty"),
        ("a.jsonl", '{"image": "0.png", "text": "x"}\n\n{"im', "a.jsonl, line 3: not a JSON object in one line"),
        ("a.jsonl", '{"image": "0.png", "text": {"a": "x"}}', "a.jsonl, line 1: the caption is not a text but dict"),
        ("a.jsonl", '{"image": {"bytes": ""}, "text": "x"}', "line 1: the image is not a path but dict"),
        ("a.jsonl", '["0.png"]', "a.jsonl, line 1: expected a JSON object in each line"),
        ("a.jsonl", '{"image": "0.png", "text": "\\ud800"}', r"line 1: contains the control character U\+D800"),
        ("a.parquet", "PAR1", "a.parquet: is not a text file; it is read by data.module=selfe.data.tables.TableData"),
        ("a.json", "[]", "a.json: a manifest is .tsv, .csv or .jsonl; save this file as one of them"),
        ("a.tar", "x", "tar shards are read by data.module=selfe.data.shards.ShardData"),
    ],
)
def test_mistakes_in_tables_are_one_line(folder, name, text, message):
    with pytest.raises(UserError, match=message) as error:
        opened(folder / name, text.encode())
    assert "\n" not in str(error.value)


def test_a_folder_is_not_a_manifest(folder):
    for read in (
        lambda: Manifest(folder, folder, image_decode.MAX_PIXELS),
        lambda: cli.run(["check-data", str(folder)]),
        lambda: cli.run(["make-shards", str(folder), "--out", str(folder / "shards")]),
    ):
        with pytest.raises(
            UserError, match=f"is a folder, not a manifest; write one with selfe make-manifest {folder}"
        ):
            read()


def test_several_bad_images_are_counted(folder):
    with pytest.raises(BadSample, match=r"line 1: .*a.png.*\(2 more; selfe check-data"):
        opened(folder / "a.tsv", b"a.png\tx\nb.png\tx\nc.png\tx\n")


def test_index_is_small_kept_and_made_again_when_the_file_changes(folder):
    first = opened(folder / "a.tsv", b"0.png\tx\n1.png\ty\n")
    (kept,) = folder.glob("*.index")
    assert kept.stat().st_size == 2 * RECORD.itemsize
    assert RECORD.itemsize <= 16
    assert len(first.records.map) == kept.stat().st_size
    (folder / "0.png").unlink()  # with an index nobody looks at images
    assert len(Manifest(folder / "a.tsv", folder, image_decode.MAX_PIXELS)) == 2
    assert [path.name for path in folder.glob("*.index")] == [kept.name]
    again = opened(folder / "a.tsv", b"2.png\tz\n1.png\ty\n2.png\tx\n")
    assert (len(again), again.prompt(0)) == (3, "z")
    assert len(list(folder.glob("a.tsv.*"))) == 1


def test_a_long_file_is_indexed_block_by_block(tmp_path, monkeypatch):
    lines = [f"{'d' * (i % 50)}/{i}.png\tdrawing {i}\t{i + 1}\t{2 * i + 1}" for i in range(3000)]
    monkeypatch.setattr("selfe.data.manifest.CHUNK", 1000)
    parsed = opened(tmp_path / "a.tsv", "\n".join(lines).encode())
    assert len(parsed) == 3000
    assert parsed.sizes(np.arange(3000)).tolist() == [[2 * i + 1, i + 1] for i in range(3000)]
    assert [parsed.prompt(i) for i in range(3000)] == [f"drawing {i}" for i in range(3000)]
    assert parsed.where(int(parsed.records[2999]["offset"])).endswith("line 3000")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_asks_for_index_dir(folder):
    (folder / "a.tsv").write_bytes(b"0.png\tx\n")
    folder.chmod(0o500)
    try:
        with pytest.raises(UserError, match="index_dir"):
            Manifest(folder / "a.tsv", folder, image_decode.MAX_PIXELS)
    finally:
        folder.chmod(0o700)


def test_index_dir_keeps_the_index_elsewhere(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "new"
    (folder / "a.tsv").write_bytes(b"0.png\tx\n")
    assert len(Manifest(folder / "a.tsv", folder, image_decode.MAX_PIXELS, elsewhere)) == 1
    assert not list(folder.glob("*.index"))
    assert len(list(elsewhere.glob("*.index"))) == 1
    with pytest.raises(UserError, match="index_dir"):
        Manifest(folder / "a.tsv", folder, image_decode.MAX_PIXELS, folder / "0.png")


def test_an_interrupted_look_at_sizes_goes_on(folder, monkeypatch):
    looked = []
    real = image_decode.size

    def size(path: Path, *rest) -> tuple[int, int]:
        looked.append(path.name)
        if path.name == "1.png" and looked.count("1.png") == 1:
            raise KeyboardInterrupt
        return real(path, *rest)

    monkeypatch.setattr(image_decode, "size", size)
    text = b"0.png\tx\n1.png\ty\n2.png\tz\n"
    with pytest.raises(KeyboardInterrupt):
        opened(folder / "a.tsv", text)
    os_facts = (folder / "a.tsv").stat()
    parsed = Manifest(folder / "a.tsv", folder, image_decode.MAX_PIXELS)
    assert (folder / "a.tsv").stat().st_mtime_ns == os_facts.st_mtime_ns
    assert parsed.sizes(np.arange(3)).tolist() == [[40, 60], [50, 50], [64, 32]]
    assert looked.count("0.png") == 1


def damaged(tmp_path: Path, **options: object) -> tuple[ManifestData, Path]:
    """Twelve images in two buckets, of which number 3 is cut short and number 8 is missing."""
    path = manifest(tmp_path, [(32, 32), (24, 48)] * 6, columns=True)
    broken = tmp_path / "train_0003.jpg"
    broken.write_bytes(broken.read_bytes()[:-400])
    (tmp_path / "train_0008.jpg").unlink()
    return ManifestData(str(path), str(tmp_path), pixels=1024, **options), path


def test_a_bad_image_stops_training_by_default(tmp_path):
    dataset, path = damaged(tmp_path)
    with pytest.raises(BadSample, match=rf"{path}, line (4|9): .*train_000(3|8).jpg"):
        dataset.batch(0, 0, range(12), range(12), "train")


def test_a_bad_image_is_replaced_by_the_next_of_its_bucket(tmp_path):
    dataset, path = damaged(tmp_path, on_bad_image="replace")
    rows = plan(dataset, 0, 0, range(12), "train")
    batch = dataset.batch(0, 0, range(12), range(12), "train")
    places = {row.place: row for row in (*rows, *plan(dataset, 0, 1, range(12, 24), "train"))}
    for position, row in enumerate(rows):
        expected = row.index
        if expected in (3, 8):
            after = (places[place] for place in range(row.place + 1, 24))
            expected = next(r.index for r in after if r.shape == row.shape and r.index not in (3, 8))
        assert batch.names[position].endswith(f"train_{expected:04d}.jpg")
        assert batch.prompts[position] == f"drawing {expected}"
        assert batch.images[position].shape[1:] == row.shape
    assert {f"{path}, line 4", f"{path}, line 9"} == {problem.partition(": ")[0] for problem in batch.replaced}
    halves = [dataset.batch(0, 0, range(12), positions, "train") for positions in (range(6), range(6, 12))]
    assert halves[0].names + halves[1].names == batch.names


def test_replacements_are_counted_and_listed(tmp_path, monkeypatch):
    _, path = damaged(tmp_path)
    monkeypatch.setenv("SELFE_SKIP_PRETRAINED", "1")
    data = f"{{train_manifest: '{path}', base_dir: '{tmp_path}', pixels: 1024, on_bad_image: replace}}"
    overrides = ["max_steps=3", "checkpoint_every=9", "log_every=3", "total_batch_size=4", f"output_dir={tmp_path}/run"]
    train.main([str(SMOKE), f"data.params={data}", *(f"trainer.{override}" for override in overrides)])
    (line,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    listed = (tmp_path / "run" / "quarantine.txt").read_text().splitlines()
    assert line["train/replaced"] == len(listed) == 2  # an epoch is 12 images, of which 2 are bad
    assert sorted(problem.partition(": ")[0] for problem in listed) == [f"{path}, line 4", f"{path}, line 9"]


def test_a_bucket_without_a_good_image_is_one_line(tmp_path):
    path = manifest(tmp_path, [(32, 32)], columns=True)
    (tmp_path / "train_0000.jpg").write_bytes(b"nothing")
    dataset = ManifestData(str(path), str(tmp_path), pixels=1024, on_bad_image="replace")
    with pytest.raises(UserError, match="no readable image of shape"):
        dataset.batch(0, 0, range(1), [0], "train")


def test_flips_are_a_coin_per_sample_and_not_for_validation(tmp_path):
    path = str(manifest(tmp_path, [(32, 32)] * 8))
    plain = ManifestData(path, str(tmp_path), pixels=1024, val_manifest=path)
    flipping = ManifestData(path, str(tmp_path), pixels=1024, val_manifest=path, flip=True)
    a, b = (dataset.batch(0, 0, range(8), range(8), "train").images for dataset in (plain, flipping))
    flipped = [not torch.equal(x, y) for x, y in zip(a, b, strict=True)]
    assert 0 < sum(flipped) < 8
    assert all(torch.equal(x.flip(-1) if flip else x, y) for x, y, flip in zip(a, b, flipped, strict=True))
    a, b = (dataset.batch(0, 0, range(8), range(8), "val") for dataset in (plain, flipping))
    assert all(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True))
    assert list(a.prompts) == [f"drawing {i}" for i in range(8)]


def test_lists_and_phases_come_from_yaml(tmp_path):
    manifest(tmp_path, [(32, 32)] * 4, "a.tsv"), manifest(tmp_path, [(32, 32)] * 4, "b.tsv")
    text = """
    data:
      module: selfe.data.manifest.ManifestData
      params:
        train_manifest: [{manifest: a.tsv, weight: 2}, {manifest: b.tsv}]
        base_dir: FOLDER
        pixels: 1024
        phases: [{step: 5, pixels: [1024, 4096], shares: [1, 1]}]
    """.replace("FOLDER", str(tmp_path)).replace("manifest: ", f"manifest: {tmp_path}/")
    text = text.replace(f"train_manifest: {tmp_path}/", "train_manifest: ")
    path = tmp_path / "config.yaml"
    path.write_text(text)
    settings = config.load(path)
    config.save(settings, path)
    dataset = config.build(config.load(path), "data")
    assert dataset.weights == (2, 1)
    assert [phase.step for phase in dataset.phases] == [0, 5]
    assert json.dumps(config.plain(config.load(path))) == json.dumps(config.plain(settings))
    path.write_text(text.replace("weight", "wait"))
    with pytest.raises(UserError, match=r"train_manifest\[0\].wait: unknown key; .*weight"):
        config.load(path)


def test_sizes_are_those_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    make_image(0, (30, 60)).save(tmp_path / "0.jpg", exif=exif)
    parsed = opened(tmp_path / "a.tsv", b"0.jpg\tx\n")
    assert parsed.sizes(np.array([0])).tolist() == [[60, 30]]
    assert parsed.image(0, None).size == (30, 60)
