"""The emoji of debug_data/emoji, and the script that builds them."""

from __future__ import annotations

import base64
import hashlib
import json
import runpy
import tarfile
from collections import Counter
from io import BytesIO
from pathlib import Path

import pytest
import torch

from selfe.data.shards import ShardData
from selfe.errors import UserError

ROOT = Path(__file__).parents[2]
DATA = ROOT / "debug_data/emoji"
TRAINED = {"noto": 1483, "twemoji": 1706, "fluent flat": 1398, "openmoji": 1711}
HELD_OUT_PAIRS = {"noto": 162, "twemoji": 194, "fluent flat": 165, "openmoji": 189}
HELD_OUT_CONCEPTS = {"noto": 33, "twemoji": 40, "fluent flat": 31, "openmoji": 40}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """A folder with the unpacked shards."""
    folder = tmp_path_factory.mktemp("emoji")
    with tarfile.open(DATA / "shards.tar.xz") as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture
def script() -> dict:
    return runpy.run_path(str(ROOT / "scripts/studies/emoji/build.py"))


def concepts() -> list[dict]:
    return [json.loads(line) for line in (DATA / "index.jsonl").read_text("utf-8").splitlines()]


def samples(tar: Path) -> dict[str, dict]:
    """The .json member of each sample, by name."""
    with tarfile.open(tar) as members:
        return {
            member.name.removesuffix(".json"): json.load(members.extractfile(member))
            for member in members
            if member.name.endswith(".json")
        }


def test_every_split_has_its_number_of_images_in_each_style():
    counts = Counter((split, style) for concept in concepts() for style, split in concept["splits"].items())
    expected = {"train": TRAINED, "held_out_pairs": HELD_OUT_PAIRS, "held_out_concepts": HELD_OUT_CONCEPTS}
    assert counts == {(split, style): n for split, styles in expected.items() for style, n in styles.items()}


def test_the_prompts_of_fine_tuning_are_all_new_emoji_and_as_many_old_ones():
    lines = (ROOT / "configs/emoji/new_and_old.jsonl").read_text("utf-8").splitlines()
    asked = [(line["category"], line["prompt"]) for line in map(json.loads, lines)]
    splits = {
        f"{concept['label']}, {style}": split for concept in concepts() for style, split in concept["splits"].items()
    }
    assert {splits[prompt] for category, prompt in asked if category == "new"} == {"held_out_concepts"}
    assert {splits[prompt] for category, prompt in asked if category == "old"} == {"train"}
    assert Counter(category for category, _ in asked) == {"new": 144, "old": 144}
    assert len(set(asked)) == len(asked)


def test_held_out_pairs_are_trained_in_another_style_and_held_out_concepts_in_none():
    for concept in concepts():
        splits = set(concept["splits"].values())
        assert splits == {"held_out_concepts"} or "held_out_concepts" not in splits
        assert "held_out_pairs" not in splits or "train" in splits


def test_shards_hold_the_samples_of_the_index_with_its_captions(shards):
    expected = {}
    for concept in concepts():
        for style, split in concept["splits"].items():
            dashed = style.replace(" ", "-")
            shard = f"train-{dashed}" if split == "train" else split
            captions = [f"{concept['label']}, {style}", concept["label"]]
            if concept["tags"]:
                captions.append(", ".join([*concept["tags"], style]))
            expected[shard, f"{concept['hexcode']}_{dashed}"] = {"caption": captions[0], "captions": captions}
    stored = {(tar.stem, name): sample for tar in shards.glob("*.tar") for name, sample in samples(tar).items()}
    assert stored == expected


def test_no_held_out_image_is_trained(shards):
    images = {"train": set(), "held_out": set()}
    for path in shards.glob("*.tar"):
        with tarfile.open(path) as tar:
            contents = {tar.extractfile(member).read() for member in tar if member.name.endswith(".webp")}
        images["train" if path.stem.startswith("train") else "held_out"] |= contents
    assert len(images["train"]) > 6000
    assert not images["train"] & images["held_out"]


def test_shard_data_reads_a_batch(shards):
    train, val = str(shards / "train-*.tar"), str(shards / "held_out_pairs.tar")
    data = ShardData(train, val_manifest=val, pixels=64 * 64)
    trained = {f"{c['label']}, {style}" for c in concepts() for style, split in c["splits"].items() if split == "train"}
    batch = data.batch(0, 0, range(16), range(16), "train")
    assert {image.shape for image in batch.images} == {torch.Size([3, 64, 64])}
    assert set(batch.prompts) <= trained
    assert len(data.batch(0, 0, range(4), range(4), "val").images) == 4


# ---- the script ----


def tarball(script: dict, folder: Path, name: str, files: dict[str, object]):
    """Write an npm tarball of JSON files, return its `Package`."""
    package = script["Package"](name, "1.0.0", "")
    content = BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for file, value in files.items():
            script["add"](tar, f"package/{file}", json.dumps(value).encode())
    (folder / package.tarball).write_bytes(content.getvalue())
    digest = base64.b64encode(hashlib.sha512(content.getvalue()).digest()).decode()
    return script["Package"](name, "1.0.0", digest)


def test_build_writes_the_same_bytes_twice(tmp_path, script):
    pytest.importorskip("resvg_py", reason="resvg-py is not installed")
    entries = [
        {"hexcode": "1F534", "label": "red circle", "tags": ["geometric", "red"]},
        {"hexcode": "2B1B", "label": "black bar"},
        {"hexcode": "1F3FB", "label": "in no set"},
    ]
    icons = {
        "red": {"body": '<path fill="#f00" d="M0 0h32v32H0z"/>'},
        "black": {"body": '<path d="M0 0h32v16H0z"/>', "height": 16},  # centred, with white above and below
    }
    characters = {"1f534": "red", "2b1b-fe0f": "black"}
    labels = tarball(script, tmp_path, "labels", {"en/data.json": entries})
    files = {"icons.json": {"icons": icons, "width": 32, "height": 32}, "chars.json": characters}
    styles = {"flat": tarball(script, tmp_path, "@sets/flat", files)}

    for out in ("one", "two"):
        counts = script["build"](tmp_path, tmp_path / out, labels, styles)
        assert counts == {("train", "flat"): 2}
        script["archive"](tmp_path / out, tmp_path / out / "shards.tar.xz")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()

    data = ShardData(str(tmp_path / "one/train-*.tar"), pixels=64 * 64)
    batch = data.batch(0, 0, range(2), range(2), "train")
    images = dict(zip(batch.prompts, batch.images, strict=True))
    assert images["red circle, flat"][:, 32, 32].tolist() == [255, 0, 0]
    assert images["black bar, flat"][0, [0, 15, 16, 47, 48, 63], 32].tolist() == [255, 255, 0, 0, 255, 255]
    assert samples(tmp_path / "one/train-flat.tar")["1F534_flat"]["captions"] == [
        "red circle, flat",
        "red circle",
        "geometric, red, flat",
    ]


def test_a_tarball_of_another_version_is_refused(tmp_path, script):
    package = tarball(script, tmp_path, "labels", {"en/data.json": []})
    (tmp_path / package.tarball).write_bytes(b"another")
    with pytest.raises(UserError, match=r"labels-1\.0\.0\.tgz: is not labels 1\.0\.0 \(its SHA-512 differs\)"):
        script["build"](tmp_path, tmp_path / "out", package, {})
