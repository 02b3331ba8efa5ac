"""Tar shards: the same order, images and exactness as the manifest they were made from."""

import copy
import tarfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch

from selfe import cli
from selfe.data.manifest import ManifestData
from selfe.data.patterns import expand_braces
from selfe.data.shards import ShardData, Shards
from selfe.errors import BadSample, UserError
from tests.helpers.images import make_image, manifest

SIZES = [(32, 32), (24, 48), (48, 24)] * 7


def tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """As any other tool writes it."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, BytesIO(content))
    return path


def num_members(path: Path) -> int:
    with tarfile.open(path) as file:
        return len(file.getnames())


def jpeg(seed: int) -> bytes:
    file = BytesIO()
    make_image(seed, (32, 32)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def made(tmp_path) -> tuple[Path, Path]:
    """A manifest and the shards made of it."""
    (tmp_path / "images").mkdir()
    path = manifest(tmp_path / "images", SIZES)
    out = tmp_path / "shards"
    cli.run(["make-shards", str(path), "--base-dir", str(path.parent), "--out", str(out), "--samples", "8"])
    return path, out


def test_shards_give_the_same_batches_as_their_manifest(made):
    path, out = made
    options = {"pixels": 1024, "flip": True}
    one = ManifestData(str(path), str(path.parent), val_manifest=str(path), **options)
    other = ShardData(str(out / "train-*.tar"), val_manifest=str(out / "*.tar"), **options)
    for dataset in (other, copy.deepcopy(other)):
        for step, split in ((0, "train"), (3, "train"), (0, "val")):
            a, b = (data.batch(0, step, range(step * 12, step * 12 + 12), range(12), split) for data in (one, dataset))
            assert a.prompts == b.prompts
            assert all(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True))


def test_making_shards_goes_on_where_it_was_and_gives_the_same_bytes(made):
    path, out = made
    tars = sorted(out.glob("*.tar"))
    assert [num_members(path) for path in tars] == [16, 16, 10]
    before = [(t.read_bytes(), t.stat().st_mtime_ns) for t in tars]
    tars[1].unlink()
    cli.run(["make-shards", str(path), "--base-dir", str(path.parent), "--out", str(out), "--samples", "8"])
    after = [(t.read_bytes(), t.stat().st_mtime_ns) for t in tars]
    assert [content for content, _ in after] == [content for content, _ in before]
    assert [a == b for a, b in zip(after, before, strict=True)] == [True, False, True]


def test_shards_of_two_manifests_are_not_mixed(made):
    path, out = made
    command = ["make-shards", "--base-dir", str(path.parent), "--out", str(out), "--samples", "8"]
    changed = path.with_name("changed.tsv")
    changed.write_text(path.read_text().replace("drawing 0", "drawing X"))
    before = {tar.name: tar.read_bytes() for tar in out.glob("*.tar")}
    for arguments in ([*command, str(changed)], [*command[:-1], "4", str(path)]):
        with pytest.raises(UserError, match="its shards were written from another manifest, or with another"):
            cli.run(arguments)
    (out / "train.json").rename(out / "elsewhere.json")
    with pytest.raises(UserError, match="has shards that are not of this manifest"):
        cli.run([*command, str(path)])
    assert {tar.name: tar.read_bytes() for tar in out.glob("*.tar")} == before


def test_foreign_tars_are_read_whatever_the_names_and_extras(tmp_path, capsys):
    members = [("./a/0001.txt", b"one"), ("./a/0001.jpg", jpeg(1)), ("./a/0001.json", b"{}"), ("README", b"hello")]
    members += [("b.c/0002.JPEG", jpeg(2)), ("b.c/0002.txt", "zwei\n".encode("utf-8-sig"))]
    members += [(f"b.c/{'long' * 40}.png", jpeg(3)), (f"b.c/{'long' * 40}.txt", "trois é".encode())]
    tar(tmp_path / "x.tar", members)
    dataset = ShardData(str(tmp_path / "x.tar"), pixels=1024)
    source = dataset.sources["train"][0]
    assert [source.prompt(i) for i in range(len(source))] == ["one", "zwei", "trois é"]
    assert source.sizes(np.arange(3)).tolist() == [[32, 32]] * 3
    assert "2 members are not used: 1 x hidden file, or no suffix, 1 x .json beside .txt" in capsys.readouterr().out
    ShardData(str(tmp_path / "x.tar"), pixels=1024)
    assert capsys.readouterr().out == ""  # once, when it is indexed


A, B = [("a.jpg", jpeg(0)), ("a.txt", b"one")], [("b.jpg", jpeg(1)), ("b.txt", b"two")]
USED = {  # members of a tar file -> captions of its samples, and what is printed
    "dots in names": ([*A, ("photo.v2.png", b"x"), ("photo.v2.txt", b"x")], ["one"], "1 x suffix .v2.png, 1 x suffix"),
    "packed by macOS": (
        [*A, ("._a.jpg", b"x"), ("__MACOSX/a.jpg", b"x"), ("__MACOSX/._a.txt", b"x")],
        ["one"],
        "3 members are not used: 3 x metadata of macOS",
    ),
    "a caption in .json": ([A[0], ("a.json", b'{"caption": " red ", "width": 40}')], ["red"], ""),
    "a caption in .caption": ([A[0], ("a.caption", b"red\n")], ["red"], ""),
    "the text first": ([A[1], A[0], *B], ["one", "two"], ""),
    "a line break in a caption": ([A[0], ("a.txt", b"one\ntwo")], ["one\ntwo"], ""),
}


@pytest.mark.parametrize("members", USED.values(), ids=USED)
@pytest.mark.parametrize("strict", [True, False])
def test_members_that_are_not_used_are_counted(tmp_path, capsys, members, strict):
    members, captions, printed = members
    tar(tmp_path / "x.tar", members)
    source = Shards(tmp_path / "x.tar", 10**9, strict=strict)
    assert [source.prompt(i) for i in range(len(source))] == captions
    out = capsys.readouterr().out
    assert printed in out
    assert bool(printed) == bool(out)


@pytest.mark.parametrize("members", [[*A, *B, ("a.jpg", jpeg(2))], [A[0], B[0], A[1], B[1]]])
@pytest.mark.parametrize("strict", [True, False])
def test_a_key_that_comes_twice_names_both_members(tmp_path, members, strict):
    path = tar(tmp_path / "x.tar", members)
    with tarfile.open(path) as file:
        first, *_, second = (member for member in file if member.name.startswith("a."))
    message = (
        f"x.tar: the key a comes twice: a.jpg at byte {first.offset} and, behind other samples, {second.name} at byte"
    )
    with pytest.raises(UserError, match=f"{message} {second.offset}"):
        Shards(path, 10**9, strict=strict)


def test_two_images_of_a_key_are_refused_or_replaced(tmp_path):
    tar(tmp_path / "x.tar", [("a.png", jpeg(0)), ("a.jpg", jpeg(1)), ("a.txt", b"one"), *B])
    with pytest.raises(BadSample, match=r"x.tar: a: has the images a.png and a.jpg; keep one"):
        Shards(tmp_path / "x.tar", 10**9)
    dataset = ShardData(str(tmp_path / "x.tar"), pixels=1024, on_bad_image="replace")
    assert set(dataset.batch(0, 0, range(2), range(2), "train").prompts) == {"two"}


def test_a_tar_that_ends_between_two_members_is_cut_short(tmp_path):
    path = tar(tmp_path / "x.tar", [*A, *B])
    with tarfile.open(path) as file:
        third = file.getmembers()[2].offset
    path.write_bytes(path.read_bytes()[:third])
    with pytest.raises(UserError, match=r"x\.tar: not a complete, uncompressed tar file \(cut short"):
        Shards(path, 10**9)


def test_brace_patterns_name_files_that_must_exist(tmp_path):
    for number in (8, 9, 10):
        tar(tmp_path / f"part-{number:05d}.tar", [(f"{number}.jpg", jpeg(0)), (f"{number}.txt", str(number).encode())])
    source = Shards(tmp_path / "part-{00008..00010}.tar", 10**9)
    assert [source.prompt(i) for i in range(3)] == ["8", "9", "10"]
    assert expand_braces("{a,b}-{9..10}") == ["a-9", "a-10", "b-9", "b-10"]
    with pytest.raises(UserError, match=r"2 of 4 files are missing, the first is .*part-00011.tar"):
        Shards(tmp_path / "part-{00009..00012}.tar", 10**9)
    with pytest.raises(UserError, match="must count up"):
        Shards(tmp_path / "part-{5..3}.tar", 10**9)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"text": "x"}', 'its .json has no "caption" that is a text'),
        ("a.json", b'{"caption": null}', 'its .json has no "caption" that is a text'),
        ("a.json", b"[", 'its .json has no "caption" that is a text'),
        ("a.txt", b"a\x00b", r"control character U\+0000"),
    ],
)
def test_captions_that_are_none_are_one_line(tmp_path, name, content, message):
    tar(tmp_path / "x.tar", [A[0], (name, content)])
    with pytest.raises(BadSample, match=f"x.tar, image at byte 512: .*{message}"):
        Shards(tmp_path / "x.tar", 10**9).prompt(0)


def test_check_data_reads_shards(tmp_path, capsys):
    tar(tmp_path / "x-0.tar", [*A, *B, ("README", b"x")])
    tar(tmp_path / "x-1.tar", [("c.jpg", jpeg(0)), ("c.txt", b"one"), ("d.jpg", jpeg(3)), ("e.txt", b"x")])
    with pytest.raises(SystemExit) as ended:
        cli.run(["check-data", str(tmp_path / "x-{0..1}.tar"), "--workers", "0", "--min-side", "8"])
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert f"duplicate: sample 3: {tmp_path}/x-1.tar, c.jpg: same image and caption as sample 1" in printed
    assert f"incomplete: sample 4: {tmp_path}/x-1.tar: d: has no .txt" in printed
    assert f"incomplete: sample 5: {tmp_path}/x-1.tar: e: has no image" in printed
    assert "3 members are not used: 2 x incomplete sample, 1 x hidden file, or no suffix" in printed
    assert "2 valid samples, 3 with problems" in printed


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "no images; a sample is"),
        ([("a.jpg", jpeg(0))], "x.tar: a: has no .txt"),
        ([("a.txt", b"text")], "x.tar: a: has no image"),
        ([("a.jpg", jpeg(0)[:300]), ("a.txt", b"text")], "x.tar, image at byte 512: cannot be decoded"),
        ([("a.jpg", jpeg(0)), ("a.txt", b" ")], "x.tar, image at byte 512: empty text"),
        ([("a.jpg", jpeg(0)), ("a.txt", b"caf\xe9")], "x.tar, image at byte 512: the text is not UTF-8"),
    ],
)
def test_what_is_wrong_in_a_tar_is_one_line(tmp_path, members, message):
    tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=message) as error:
        ShardData(str(tmp_path / "x.tar"), pixels=1024).batch(0, 0, range(1), [0], "train")
    assert "\n" not in str(error.value)


def test_an_incomplete_sample_is_replaced_when_asked(tmp_path):
    tar(tmp_path / "x.tar", [("a.jpg", jpeg(0)), ("b.jpg", jpeg(1)), ("b.txt", b"good"), ("c.txt", b"no image")])
    dataset = ShardData(str(tmp_path / "x.tar"), pixels=1024, on_bad_image="replace")
    batch = dataset.batch(0, 0, range(3), range(3), "train")
    assert batch.prompts == ("good",) * 3
    assert len(batch.replaced) >= 2


def test_no_tar_or_not_a_tar_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no such tar file"):
        ShardData(str(tmp_path / "*.tar"))
    (tmp_path / "x.tar").write_bytes(jpeg(0))
    with pytest.raises(UserError, match="not a complete, uncompressed tar file"):
        ShardData(str(tmp_path / "x.tar"))


def test_a_tar_that_changes_is_indexed_again(tmp_path):
    tar(tmp_path / "x.tar", [("a.jpg", jpeg(0)), ("a.txt", b"one")])
    assert len(ShardData(str(tmp_path / "*.tar")).sources["train"][0]) == 1
    tar(tmp_path / "x.tar", [("a.jpg", jpeg(0)), ("a.txt", b"one"), ("b.jpg", jpeg(1)), ("b.txt", b"two")])
    tar(tmp_path / "y.tar", [("a.jpg", jpeg(2)), ("a.txt", b"three")])
    source = ShardData(str(tmp_path / "*.tar")).sources["train"][0]
    assert [source.prompt(i) for i in range(len(source))] == ["one", "two", "three"]
    tar(tmp_path / "y.tar", [("a.jpg", b"nothing"), ("a.txt", b"three")])
    with pytest.raises(BadSample, match=r"y\.tar"):
        ShardData(str(tmp_path / "*.tar"))


@pytest.mark.parametrize(("name", "message"), [("", "is a folder; .*make-manifest"), ("a.csv", "is not a tar file")])
def test_other_sources_given_as_shards_name_what_reads_them(tmp_path, name, message):
    (tmp_path / "a.csv").write_text("path,caption")
    with pytest.raises(UserError, match=message):
        ShardData(tmp_path / name)
