"""Several captions of an image: read from every format, chosen by seed and sample, kept by every conversion."""

import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from selfe import cli
from selfe.data.captions import CaptionPhase, Captions
from selfe.data.dataset import BucketedDataset
from selfe.data.loader import MicroBatches, raise_if_error
from selfe.data.manifest import Manifest, ManifestData
from selfe.data.shards import ShardData, Shards
from selfe.distributed.collectives import World
from selfe.errors import BadSample, UserError
from selfe.io import image_decode
from selfe.tools import precompute
from tests.helpers.images import make_image
from tests.helpers.train_processes import copy_until, finish, lines

EMOJI = Path(__file__).parents[2] / "debug_data/emoji/shards.tar.xz"
IMAGES = 12
ALL = [Captions((f"short {i}", f"a long caption {i}", f"tags {i}")) for i in range(IMAGES)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Small images and a manifest of each format with the same captions."""
    folder = tmp_path_factory.mktemp("captions")
    for number in range(IMAGES):
        make_image(number, (32, 32)).save(folder / f"{number}.png")

    rows = [[f"{i}.png", *captions.texts] for i, captions in enumerate(ALL)]
    header = ["path", "caption", "caption_2", "caption_3"]
    (folder / "all.tsv").write_text("".join("\t".join(row) + "\n" for row in [header, *rows]))
    (folder / "first.tsv").write_text("".join("\t".join(row[:2]) + "\n" for row in rows))
    records = [json.dumps({"path": row[0], "captions": row[1:]}) + "\n" for row in rows]
    (folder / "all.jsonl").write_text("".join(records))
    return folder


def opened(path: Path, text: str) -> Manifest:
    path.write_text(text)
    return Manifest(path, path.parent, image_decode.MAX_PIXELS)


def data(folder: Path, name: str = "all.jsonl", **params) -> ManifestData:
    return ManifestData(folder / name, folder, pixels=1024, **params)


def prompts(data: BucketedDataset, start: int, stop: int, split: str = "train", seed: int = 0) -> list[tuple[str, str]]:
    """(image, caption) of the samples of some steps of 4."""
    pairs = []
    for step in range(start, stop):
        batch = data.batch(seed, step, range(4 * step, 4 * step + 4), range(4), split)
        pairs += zip(batch.names, batch.prompts, strict=True)
    return pairs


# ---- formats ----


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.tsv", "path\tcaption\tcaption_2\n0.png\ta\tb\n1.png\tc\n2.png\t\td\n", ["a|b", "c", "|d"]),
        ("a.tsv", "path\tcaption\twidth\theight\tcaption_2\n0.png\ta\t32\t32\tb\n", ["a|b"]),
        ("a.tsv", "0.png\tpath\n1.png\tcaption\n", ["path", "caption"]),
        ("a.jsonl", '{"path": "0.png", "captions": ["a", "", "c\\nd"]}', ["a||c d"]),
        ("a.jsonl", '{"path": "0.png", "text": ["a", "b"]}', ["a|b"]),
        ("a.jsonl", '{"path": "0.png", "text": "b", "captions": ["a", "b"]}', ["b|a"]),
        ("a.jsonl", '{"path": "0.png", "text": "b"}\n{"path": "1.png", "text": "c", "captions": ["a"]}', ["b", "c|a"]),
        ("a.csv", "path,caption,caption_2\n0.png,a,b\n1.png,c\n", ["a|b", "c"]),
        ("a.csv", 'path,captions\n0.png,"[""a"", ""b""]"\n1.png,"[""c""]"\n', ["a|b", "c"]),
        ("a.csv", 'path,caption,captions\n0.png,x,"[""a""]"\n1.png,y,\n', ["x|a", "y"]),
    ],
)
def test_every_format_holds_several_captions(folder, name, text, expected):
    source = opened(folder / name, text)
    captions = [source.captions(i) for i in range(len(source))]
    assert ["|".join(of_image.texts) for of_image in captions] == expected
    assert all(of_image.weights == () for of_image in captions)
    means = [sum(map(len, filter(None, of_image.texts))) // sum(map(bool, of_image.texts)) for of_image in captions]
    if source.in_table:
        assert source.lengths(np.arange(len(source))).tolist() == means


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "path\tcaption\tcaption_3\n0.png\ta\tb\n", "line 1: the columns of a header are path, caption, cap"),
        ("a.tsv", "path\tcaption\twidth\n0.png\ta\t1\n", "line 1: .*and width with height"),
        ("a.tsv", "path\tcaption\tcaption_2\n0.png\ta\tb\tc\n", "line 2: expected 1 to 2 tabs as in the header; found"),
        ("a.tsv", "path\tcaption\tcaption_2\n0.png\t\t\n", "line 2: path or prompt is empty"),
        ("a.jsonl", '{"path": "0.png", "captions": ["", null]}', "line 1: path or prompt is empty"),
        ("a.jsonl", '{"path": "0.png", "captions": ["a", 3]}', "line 1: the caption is not a text but int '3'"),
        ("a.jsonl", '{"path": "0.png", "captions": {"a": 3}}', "line 1: captions is not a list of texts but dict"),
        (
            "a.jsonl",
            '{"path": "0.png", "captions": ["a", "b"], "caption_weights": [1]}',
            r"line 1: caption_weights must be 2 numbers from 0 to 1000000, one for each caption .*, got \[1\]",
        ),
        ("a.jsonl", '{"path": "0.png", "captions": ["a"], "caption_weights": [NaN]}', "must be 1 numbers"),
        ("a.jsonl", '{"path": "0.png", "captions": ["a"], "caption_weights": [0]}', "must be 1 numbers"),
        (
            "a.jsonl",
            '{"path": "0.png", "text": "x", "captions": ["a"], "caption_weights": [1]}',
            "caption_weights is for captions, which do not have the caption 'x'; add it to them",
        ),
        ("a.csv", "path,captions\n0.png,a red bird\n", r'line 2: not a list in JSON, such as \["one", "two"\]: .a red'),
        ("a.jsonl", json.dumps({"path": "0.png", "captions": ["a"] * 1001}), "line 1: 1001 captions; .* at most 1000"),
    ],
)
def test_captions_that_cannot_be_used_are_one_line(folder, name, text, message):
    with pytest.raises(UserError, match=message) as error:
        opened(folder / name, text)
    assert "\n" not in str(error.value)


def test_the_emoji_shards_have_three_captions_and_train_on_the_first(tmp_path):
    with tarfile.open(EMOJI, "r:xz") as archive:
        archive.extract("held_out_concepts.tar", tmp_path, filter="data")
    source = Shards(tmp_path / "held_out_concepts.tar", image_decode.MAX_PIXELS)
    assert len(source) == 144
    for i in range(len(source)):
        record = json.loads(source.bytes_of(i, "prompt"))
        assert source.captions(i) == Captions(tuple(record["captions"]))
        assert source.prompt(i) == record["caption"] == record["captions"][0]
    by_default, in_turns = (
        ShardData(tmp_path / "held_out_concepts.tar", pixels=1024, caption_weights=weights)
        for weights in ((), (1, 1, 1))
    )
    assert [text for _, text in prompts(by_default, 0, 36)] == [
        next(source.prompt(i) for i in range(144) if source.name(i) == name) for name, _ in prompts(by_default, 0, 36)
    ]
    positions = {source.name(i): source.captions(i).texts.index for i in range(144)}
    assert {positions[name](text) for name, text in prompts(in_turns, 0, 36)} == {0, 1, 2}


# ---- choice ----


def test_by_default_the_first_caption_is_used_as_if_it_were_alone(folder):
    expected = prompts(data(folder, "first.tsv"), 0, 9)
    for name in ("all.tsv", "all.jsonl"):
        assert prompts(data(folder, name), 0, 9) == expected
        assert prompts(data(folder, name, caption_weights=(1,)), 0, 9) == expected
        assert prompts(data(folder, name, caption_weights=(3, 0)), 0, 9) == expected


def test_the_choice_depends_on_seed_and_sample_only(folder):
    varied = data(folder, caption_weights=(1, 1, 2))
    straight = prompts(varied, 0, 9)
    assert straight != prompts(varied, 0, 9, seed=1)
    assert straight == prompts(data(folder, "all.tsv", caption_weights=(1, 1, 2)), 0, 3) + prompts(varied, 3, 9)
    assert sorted(name for name, _ in straight) == sorted(3 * [str(folder / f"{i}.png") for i in range(IMAGES)])

    # three epochs use an image with other captions, and every rank and micro-batch sees those of one process
    texts = Counter(straight)
    assert max(texts.values()) <= 3
    assert len(texts) > IMAGES
    by_ranks = []
    for world in (1, 2):
        for rank in range(world):
            of_rank = World(rank, world, torch.device("cpu"))
            part = MicroBatches(varied, 0, lambda step: range(4 * step, 4 * step + 4), 2, 1, of_rank, "train")
            for step in range(9):
                for place in range(2 // world):
                    batch = raise_if_error(part[step, place])
                    by_ranks += zip(batch.names, batch.prompts, strict=True)
        assert Counter(by_ranks) == texts
        by_ranks.clear()


def test_the_shares_of_captions_are_those_of_their_weights(folder):
    draws = [text.split()[0] for _, text in prompts(data(folder, caption_weights=(1, 1, 2)), 0, 200)]
    counts = Counter(draws)  # 800 samples; 4 standard deviations are 49 or 57
    assert abs(counts["short"] - 200) < 49
    assert abs(counts["a"] - 200) < 49
    assert abs(counts["tags"] - 400) < 57


def test_weights_of_a_file_count_unless_the_config_has_some(folder):
    record = {"path": "0.png", "captions": ["a", "b"], "caption_weights": [0, 1]}
    (folder / "own.jsonl").write_text(json.dumps(record) + "\n")
    assert {text for _, text in prompts(data(folder, "own.jsonl"), 0, 4)} == {"b"}
    assert {text for _, text in prompts(data(folder, "own.jsonl", caption_weights=(1, 0)), 0, 4)} == {"a"}


@pytest.mark.parametrize(
    ("captions", "weights", "shares"),
    [
        (Captions(("a", "b")), (), (1, 0)),
        (Captions(("", "b")), (), (0, 1)),
        (Captions(("a", "b")), (1, 3, 4), (0.25, 0.75)),
        (Captions(("a", "", "c")), (1, 5, 1), (0.5, 0, 0.5)),
        (Captions(("a", "b")), (0, 0, 1), (1, 0)),
        (Captions(("a", "b"), (1.0, 1.0)), (), (0.5, 0.5)),
        (Captions(("a", "b"), (1.0, 1.0)), (0, 2), (0, 1)),
    ],
)
def test_missing_captions_have_no_share(captions, weights, shares):
    assert captions.shares(weights) == shares
    for uniform in (0.0, 0.3, np.nextafter(1, 0)):
        assert shares[captions.texts.index(captions.choose(weights, uniform))] > 0


def test_weights_change_at_the_step_of_a_phase(folder):
    phases = (CaptionPhase(2, (0, 1)), CaptionPhase(4, ()))
    phased = data(folder, caption_weights=(0, 0, 1), caption_phases=phases)
    kinds = [{text.split()[0] for _, text in prompts(phased, step, step + 1)} for step in range(6)]
    assert kinds == [{"tags"}, {"tags"}, {"a"}, {"a"}, {"short"}, {"short"}]
    with pytest.raises(ValueError, match=r"caption_phases must be in the order of their steps, got \[4, 2\]"):
        data(folder, caption_phases=phases[::-1])
    for weights, message in {(0.0, 0): "at least one must be above 0", (-1,): "must be between 0 and 1e"}.items():
        with pytest.raises(ValueError, match=message):
            data(folder, caption_weights=weights)


def test_validation_uses_the_first_caption(folder):
    validated = data(folder, val_manifest=folder / "all.tsv", caption_weights=(0, 1))
    assert [text for _, text in prompts(validated, 0, 3, "val")] == [captions.first for captions in ALL]


def test_a_run_on_two_processes_resumes_bitwise_in_a_phase_of_captions(folder, tmp_path):
    params = [f"train_manifest={folder}/all.jsonl", f"val_manifest={folder}/all.jsonl", f"base_dir={folder}"]
    params += ["pixels=1024", "caption_weights=[1,1]", "caption_phases=[{step: 1, weights: [0, 1, 1]}]"]
    changes = [f"data.params.{param}" for param in params]
    finish(tmp_path / "straight", 2, *changes, "trainer.stop_step=3")
    copy_until(Path("checkpoints/step_00000002"), tmp_path / "straight", tmp_path / "resumed")
    finish(tmp_path / "resumed", 2, *changes, "trainer.stop_step=3")
    assert lines(tmp_path / "resumed") == lines(tmp_path / "straight")
    assert [line["step"] for line in lines(tmp_path / "straight")] == [1, 2, 3]


# ---- tools ----


def test_each_distinct_caption_is_cached_once(folder):
    (folder / "repeated.jsonl").write_text(
        '{"path": "0.png", "captions": ["a", "b", "a"]}\n{"path": "1.png", "captions": ["", "c", "b"]}\n'
    )
    captions = precompute.Captions(data(folder, "repeated.jsonl"), ["c", "sample"])
    assert [captions[i] for i in range(len(captions))] == ["a", "b", "c", "", "sample"]


def test_conversions_keep_all_captions(folder, tmp_path):
    expected = [(f"{i}.png", captions.texts) for i, captions in enumerate(ALL)]

    def read(path: Path) -> list[tuple[str, tuple[str, ...]]]:
        source = Manifest(path, folder, image_decode.MAX_PIXELS)
        return [(source.line(i).path, source.line(i).captions.texts) for i in range(len(source))]

    for source, out in (("all.jsonl", "m.tsv"), ("all.tsv", "n.tsv"), ("all.jsonl", "m.jsonl")):
        cli.run(["make-manifest", str(folder / source), "--out", str(tmp_path / out)])
        assert read(tmp_path / out) == expected
    checked = ["check-data", str(folder / "all.jsonl"), "--base-dir", str(folder), "--workers", "0", "--min-side", "8"]
    cli.run([*checked, "--write-clean", str(tmp_path / "clean.tsv")])
    assert read(tmp_path / "clean.tsv") == expected
    assert (
        (tmp_path / "clean.tsv").read_text().startswith("path\tcaption\twidth\theight\tcaption_2\tcaption_3\n0.png\t")
    )

    cli.run(["make-shards", str(tmp_path / "m.tsv"), "--base-dir", str(folder), "--out", str(tmp_path / "a")])
    cli.run(["make-manifest", str(folder / "all.jsonl"), "--base-dir", str(folder), "--shards", str(tmp_path / "b")])
    for shards in (tmp_path / "a", tmp_path / "b"):
        source = Shards(shards / "train-*.tar", image_decode.MAX_PIXELS)
        assert [source.captions(i) for i in range(len(source))] == ALL


def test_caption_weights_are_kept_or_refused(folder, tmp_path):
    record = {"path": "0.png", "captions": ["a", "b"], "caption_weights": [1, 3]}
    (tmp_path / "own.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=r"m.tsv: TSV has no column for the caption weights of 0.png; use .*m.jsonl"):
        cli.run(["make-manifest", str(tmp_path / "own.jsonl"), "--out", str(tmp_path / "m.tsv")])
    assert not list(tmp_path.glob("m.tsv*"))

    cli.run(["make-manifest", str(tmp_path / "own.jsonl"), "--out", str(tmp_path / "m.jsonl")])
    cli.run(["make-shards", str(tmp_path / "m.jsonl"), "--base-dir", str(folder), "--out", str(tmp_path / "s")])
    for source in (
        Manifest(tmp_path / "m.jsonl", folder, image_decode.MAX_PIXELS),
        Shards(tmp_path / "s" / "train-*.tar", image_decode.MAX_PIXELS),
    ):
        assert source.captions(0) == Captions(("a", "b"), (1.0, 3.0))


def test_check_data_shows_number_length_and_use_of_captions(folder, capsys):
    (folder / "some.jsonl").write_text(
        '{"path": "0.png", "captions": ["one", "a caption of 25 letters .."]}\n'
        '{"path": "1.png", "captions": ["three"]}\n'
    )
    command = ["check-data", str(folder / "some.jsonl"), "--base-dir", str(folder), "--workers", "0", "--min-side", "8"]
    cli.run([*command, "--caption-weights", "1", "3"])
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["1", "2", "62.5%", "1", "2", "2"] in printed  # tokens are bytes / 4 + 1
    assert ["2", "1", "37.5%", "7", "7", "7"] in printed
    after = printed[printed.index(["captions", "per", "image"]) :]
    assert [row[:2] for row in after[1:3]] == [["1", "1"], ["2", "1"]]
    cli.run(command)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["1", "2", "100.0%", "1", "2", "2"] in printed
    with pytest.raises(UserError, match="--caption-weights: weights: at least one must be above 0"):
        cli.run([*command, "--caption-weights", "0"])


def test_captions_of_shards_that_are_none_are_one_line(tmp_path):
    record = {"caption": "a", "captions": ["b"], "caption_weights": [1]}
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        for name, content in {"a.png": (tmp_path / "a.png"), "a.json": json.dumps(record)}.items():
            path = tmp_path / name
            path.write_text(content) if isinstance(content, str) else make_image(0, (32, 32)).save(path)
            file.add(path, name)
    with pytest.raises(BadSample, match=r"x.tar, image at byte 1536: caption_weights is for captions, .* write the sh"):
        Shards(tmp_path / "x.tar", image_decode.MAX_PIXELS).captions(0)
