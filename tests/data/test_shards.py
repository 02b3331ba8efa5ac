"""Tar shards: the same order, pictures and exactness as the manifest they were made from."""

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
from selfe.data.shards import ShardData
from selfe.types import BadSample, UserError
from tests.helpers.images import manifest, picture

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
    picture(seed, (32, 32)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def made(tmp_path) -> tuple[Path, Path]:
    """A manifest and the shards made of it."""
    (tmp_path / "pictures").mkdir()
    path = manifest(tmp_path / "pictures", SIZES)
    out = tmp_path / "shards"
    cli.run(["make-shards", str(path), "--base-dir", str(path.parent), "--out", str(out), "--samples", "8"])
    return path, out


def test_shards_give_the_same_batches_as_their_manifest(made):
    path, out = made
    options = {"pixels": 1024, "flip": True}
    one = ManifestData(str(path), str(path.parent), val_manifest=str(path), **options)
    other = ShardData(str(out / "train-*.tar"), val_manifest=str(out / "*.tar"), **options)
    for feed in (other, copy.deepcopy(other)):
        for step, split in ((0, "train"), (3, "train"), (0, "val")):
            a, b = (data.batch(0, step, range(step * 12, step * 12 + 12), range(12), split) for data in (one, feed))
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


def test_foreign_tars_are_read_whatever_the_order_names_and_extras(tmp_path):
    members = [("./a/0001.txt", b"one"), ("./a/0001.jpg", jpeg(1)), ("./a/0001.json", b"{}"), ("README", b"hello")]
    members += [("b.c/0002.JPEG", jpeg(2)), (f"b.c/{'long' * 40}.png", jpeg(3))]
    members += [("b.c/0002.txt", "zwei\n".encode("utf-8-sig")), (f"b.c/{'long' * 40}.txt", "trois é".encode())]
    tar(tmp_path / "x.tar", members)
    feed = ShardData(str(tmp_path / "x.tar"), pixels=1024)
    source = feed.sources["train"][0]
    assert [source.prompt(i) for i in range(len(source))] == ["one", "zwei", "trois é"]
    assert source.sizes(np.arange(3)).tolist() == [[32, 32]] * 3


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([], "no images; a sample is"),
        ([("a.jpg", jpeg(0))], "x.tar: a: has no .txt"),
        ([("a.txt", b"text")], "x.tar: a: has no image"),
        ([("a.jpg", jpeg(0)[:300]), ("a.txt", b"text")], "x.tar, image at byte 512: cannot be decoded"),
        ([("a.jpg", jpeg(0)), ("a.txt", b" ")], "x.tar, image at byte 512: empty text"),
        ([("a.jpg", jpeg(0)), ("a.txt", b"caf\xe9")], "x.tar, image at byte 512: the text is not UTF-8"),
    ],
)
def test_what_is_wrong_in_a_tar_is_one_line(tmp_path, members, said):
    tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=said) as error:
        ShardData(str(tmp_path / "x.tar"), pixels=1024).batch(0, 0, range(1), [0], "train")
    assert "\n" not in str(error.value)


def test_an_incomplete_sample_is_replaced_when_asked(tmp_path):
    tar(tmp_path / "x.tar", [("a.jpg", jpeg(0)), ("b.jpg", jpeg(1)), ("b.txt", b"good"), ("c.txt", b"no picture")])
    feed = ShardData(str(tmp_path / "x.tar"), pixels=1024, on_bad_image="replace")
    batch = feed.batch(0, 0, range(3), range(3), "train")
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
