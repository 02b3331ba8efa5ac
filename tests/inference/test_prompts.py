"""Prompt files: what is read, and one clear line for each of many that cannot be."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from selfe.errors import UserError
from selfe.inference import job
from selfe.inference.prompts import SamplingDefaults, foreign_syntax, from_file, from_list
from selfe.samplers.euler import Euler
from selfe.samplers.renoise import Renoise
from tests.helpers import samplers

DEFAULTS = SamplingDefaults(num_steps=(1, 4), height=256, width=256)


def read(folder: Path, name: str, content: str | bytes) -> list:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return from_file(path, DEFAULTS, 16)


def line(**keys) -> str:
    return json.dumps({"prompt": "a cat"} | keys)


def test_text(tmp_path):
    found = read(tmp_path, "p.txt", "\ufeff a cat \r\n\r\n{not json}\n🐦 Vögel, 鳥\n<img src=x onerror=alert(1)>")
    assert [request.prompt for request in found] == [
        "a cat",
        "{not json}",
        "🐦 Vögel, 鳥",
        "<img src=x onerror=alert(1)>",
    ]
    assert [request.where.rpartition("line ")[2] for request in found] == ["1", "3", "4", "5"]
    assert all(request.settings is not None and request.settings == DEFAULTS for request in found)


def test_jsonl(tmp_path):
    keys = {"seed": 3, "aspect": "16:9", "num_steps": 8, "cfg_scale": [1, 3.5], "s_ratio": 0.5, "num_samples": 4}
    (full, plain) = read(tmp_path, "p.jsonl", line(sampler="euler", negative_prompt="blurry", **keys) + "\n" + line())
    settings = full.settings
    assert (settings.seed, settings.num_steps, settings.num_samples) == (3, (8,), 4)
    assert (settings.cfg_scale, settings.s_ratio, settings.negative_prompt) == ((1.0, 3.5), (0.5,), "blurry")
    assert (settings.height, settings.width) == (192, 336)
    assert isinstance(settings.sampler, Euler)
    assert plain.settings == DEFAULTS
    (other,) = read(tmp_path, "p.jsonl", line(eta=0.25))
    assert (type(other.settings.sampler), other.settings.sampler.eta) == (type(DEFAULTS.sampler), 0.25)


def test_samplers_of_the_config_by_name(tmp_path):
    own = replace(
        DEFAULTS, sampler=samplers.Named("a, b"), samplers={"fine": Renoise(eta=0.25), "mid": samplers.Midpoint()}
    )
    path = tmp_path / "p.jsonl"

    def sampler(**keys):
        path.write_text(line(**keys))
        return from_file(path, own, 16)[0].settings.sampler

    assert sampler() is sampler(sampler="tests.helpers.samplers.Named") is own.sampler
    assert sampler(sampler="mid") is sampler(sampler="tests.helpers.samplers.Midpoint") is own.samplers["mid"]
    assert sampler(sampler="fine").eta == sampler(sampler="renoise").eta == 0.25
    assert (sampler(sampler="fine", eta=0.5).eta, type(sampler(sampler="euler"))) == (0.5, Euler)

    # a prompt file does not import classes that the config does not name
    with pytest.raises(
        UserError, match=r"no sampler 'tests.helpers.samplers.Forward'; valid: .*Named, fine, mid, renoise, euler, heun"
    ):
        sampler(sampler="tests.helpers.samplers.Forward")
    with pytest.raises(UserError, match=r"samplers.Named does not take eta 1.0"):
        sampler(eta=1)


def test_tsv(tmp_path):
    table = "path\tprompt\tseed\tnum_steps\taspect\nx.jpg\ta cat\t\t[1, 2]\t2:1\nx.jpg\t12\t7\t3\t\n"
    first, second = read(tmp_path, "p.TSV", table)
    assert (first.prompt, first.settings.seed, first.settings.num_steps) == ("a cat", 0, (1, 2))
    assert (first.settings.height, first.settings.width) == (176, 368)
    assert (second.prompt, second.settings.seed, second.settings.num_steps) == ("12", 7, (3,))


def test_geneval(tmp_path):
    said = {"tag": "counting", "include": [{"class": "cup", "count": 3}], "exclude": [], "prompt": "three cups"}
    (request,) = read(tmp_path, "evaluation_metadata.jsonl", json.dumps(said))
    assert (request.prompt, request.extra, request.settings) == ("three cups", said, DEFAULTS)
    assert request.category == "counting"


def test_a_category_does_not_change_the_images(tmp_path):
    table = "prompt\tcategory\na cat\tanimals\na cup\t\n"
    requests = read(tmp_path, "p.tsv", table)
    assert [request.category for request in requests] == ["animals", ""]
    assert all(request.settings == DEFAULTS for request in requests)

    without = read(tmp_path, "p.txt", "a cat\na cup")
    with_category, plain = (job.plan(some, ("ema",), "flat", ".png") for some in (requests, without))
    assert [(spec.file, spec.record()) for spec in with_category] == [(spec.file, spec.record()) for spec in plain]
    assert [spec.category for spec in with_category] == ["animals", "animals", "", ""]
    with pytest.raises(UserError, match=r"line 1: category: contains the control character U\+0009"):
        read(tmp_path, "p.jsonl", line(category="a\tb"))


def test_only_a_line_feed_ends_a_line(tmp_path):
    said = "a\x85cat\x0b\u2003"  # str.splitlines() would cut at U+0085 and at the vertical tab
    requests = read(tmp_path, "p.jsonl", json.dumps({"prompt": "a\x85cat"}, ensure_ascii=False) + "\r\n" + line())
    assert [request.prompt for request in requests] == ["a\x85cat", json.loads(line())["prompt"]]
    with pytest.raises(UserError, match=r"line 1: .*U\+000B"):
        read(tmp_path, "p.txt", said + "x\n")
    with pytest.raises(UserError, match=r"line 1: .*U\+000D"):
        read(tmp_path, "p.txt", "a cat\ra dog\r")


def test_a_list():
    assert [request.prompt for request in from_list(["a", " b"], DEFAULTS, 16)] == ["a", "b"]


MALFORMED = {
    "nothing": ("p.txt", "", "is empty"),
    "blank lines": ("p.txt", " \n\t\n\r\n", "is empty"),
    "a byte order mark alone": ("p.txt", "\ufeff", "is empty"),
    "UTF-16": ("p.txt", "a cat".encode("utf-16"), "UTF-16"),
    "UTF-16, big end first": ("p.jsonl", b"\xfe\xff" + line().encode("utf-16-be"), "UTF-16"),
    "Latin-1": ("p.txt", "a cat\nV\xf6gel".encode("latin-1"), "line 2: not UTF-8 at byte 1"),
    "half a character": ("p.txt", "🐦".encode()[:3], "line 1: not UTF-8"),
    "an image": ("p.txt", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "line 1: not UTF-8"),
    "zeros": ("p.txt", b"a\0cat", r"U\+0000"),
    "an escape sequence": ("p.txt", "a \x1b[31mcat", r"U\+001B"),
    "a table named .txt": ("p.txt", "x.jpg\ta cat", r"U\+0009 \(for a table"),
    "a line separator": ("p.txt", "a\u2028cat", r"U\+2028"),
    "1 MB in a line of text": ("p.txt", "a" * 2**20, "1048576 characters"),
    "1 MB in a line of JSON": ("p.jsonl", line(prompt="a" * 2**20), "1048604 characters|1048576 characters"),
    "1 MB that is no JSON": ("p.jsonl", "[" * 2**20, "line 1: not JSON"),
    "1 MB of an unknown key": ("p.jsonl", line(**{"k" * 2**20: 1}), r"kkk ... \w+, category, num_steps"),
    "1 MB of a number": ("p.jsonl", '{"prompt": "a", "seed": ' + "9" * 2**20 + "}", "line 1: not JSON"),
    "gzip": ("p.txt", b"\x1f\x8b\x08 and more", "compressed with gzip"),
    "a table with the quotes of CSV": ("p.tsv", 'prompt\n"a ""big"" dog"\n', "line 2: .*has the quotes of CSV files"),
    "another suffix": ("p.csv", "a cat", "a prompt file is .txt"),
    "no JSON": ("p.jsonl", line() + "\na cat", "line 2: not JSON"),
    "half a line": ("p.jsonl", line()[:-1], "line 1: not JSON"),
    "a list": ("p.jsonl", '["a cat"]', "expected an object"),
    "a number": ("p.jsonl", "3", "expected an object"),
    "a key twice": ("p.jsonl", '{"prompt": "a", "prompt": "b"}', "occurs twice"),
    "no prompt": ("p.jsonl", '{"seed": 1}', "prompt: missing"),
    "an empty prompt": ("p.jsonl", line(prompt="  "), "prompt: must not be empty"),
    "a prompt that is a number": ("p.jsonl", line(prompt=3), "prompt: expected str"),
    "a prompt of two lines": ("p.jsonl", line(prompt="a\nb"), r"U\+000A"),
    "half of a surrogate pair": ("p.jsonl", '{"prompt": "\\ud83d"}', r"U\+D83D"),
    "an unknown key": ("p.jsonl", line(num_step=3), "did you mean num_steps"),
    "a word for a number": ("p.jsonl", line(seed="one"), "seed: expected int"),
    "a truth for a number": ("p.jsonl", line(num_samples=True), "num_samples: expected int"),
    "a fraction of steps": ("p.jsonl", line(num_steps=2.5), r"num_steps\[0\]: expected int"),
    "negative steps": ("p.jsonl", line(num_steps=[4, -1]), "num_steps: -1 is not between 1 and"),
    "no steps": ("p.jsonl", line(num_steps=0), "num_steps: 0 is not between 1 and"),
    "a million steps": ("p.jsonl", line(num_steps=10**6), "num_steps: 1000000 is not between 1 and"),
    "an empty sweep": ("p.jsonl", line(num_steps=[]), "num_steps: the list is empty"),
    "a sweep with a value twice": ("p.jsonl", line(cfg_scale=[3, 3]), "repeats a value"),
    "a negative seed": ("p.jsonl", line(seed=-1), "seed: -1 is not between"),
    "no samples": ("p.jsonl", line(num_samples=0), "num_samples: 0 is not between"),
    "not a number": ("p.jsonl", '{"prompt": "a", "cfg_scale": NaN}', "NaN is not a number"),
    "infinite guidance": ("p.jsonl", '{"prompt": "a", "cfg_scale": 1e999}', "cfg_scale: inf is not between"),
    "an s ratio above 1": ("p.jsonl", line(s_ratio=1.5), "s_ratio: 1.5 is not between 0 and 1"),
    "a size between patches": ("p.jsonl", line(height=250), "height: 250 is not a multiple of 16"),
    "a negative size": ("p.jsonl", line(height=-16), "height -16"),
    "an absurd size": ("p.jsonl", line(height=160000, width=160000), "at most 16777216 pixels"),
    "an aspect that is none": ("p.jsonl", line(aspect="wide"), "expected width:height"),
    "an absurd aspect": ("p.jsonl", line(aspect="1000:1"), "is not between 1:16 and 16:1"),
    "aspect and size": ("p.jsonl", line(aspect="1:1", height=256), "either aspect, or"),
    "an unknown sampler": ("p.jsonl", line(sampler="eulr"), "no sampler 'eulr'; valid: renoise, euler"),
    "a sampler from elsewhere": ("p.jsonl", line(sampler="os.system"), "no sampler 'os.system'"),
    "a sampler of an ODE": (
        "p.jsonl",
        line(sampler="heun", s_ratio=0.5),
        "the sampler Heun is valid for 1 only; set 1",
    ),
    "an interval": ("p.jsonl", line(guidance_interval=[0.5, 0.1]), r"guidance_interval: \[0.5, 0.1\] is no interval"),
    "eta for a sampler without": ("p.jsonl", line(sampler="euler", eta=1), "euler does not take eta"),
    "eta out of range": ("p.jsonl", line(eta=2), "eta must be between"),
    "a negative prompt without end": ("p.jsonl", line(negative_prompt="a" * 5000), "negative_prompt: 5000 characters"),
    "columns without a prompt": ("p.tsv", "path\tcaption\nx.jpg\ta cat", "line 1: the first line must name"),
    "a column twice": ("p.tsv", "prompt\tprompt\na\tb", "each once"),
    "a manifest without a first line": ("p.tsv", "x.jpg\ta cat", "the first line must name the columns"),
    "too few cells": ("p.tsv", "prompt\tseed\na cat\t1\na dog", "line 3: 1 cells, but the first line names 2"),
    "a cell of the wrong type": ("p.tsv", "prompt\tseed\na cat\tone", "line 2: seed: expected int"),
    "columns and nothing else": ("p.tsv", "prompt\tseed\n", "is empty"),
    "GenEval without a prompt": ("p.jsonl", '{"tag": "x", "include": []}', "prompt: missing"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(name, tmp_path):
    file, content, words = MALFORMED[name]
    with pytest.raises(UserError, match=words) as caught:
        read(tmp_path, file, content)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / file))
    assert len(message.splitlines()) == 1
    assert len(message) < 700


def test_all_bad_lines_are_counted(tmp_path):
    with pytest.raises(UserError, match=r"line 2: .* \(and 2 more invalid lines\)"):
        read(tmp_path, "p.jsonl", "\n".join([line(), "x", line(seed=-1), line(), "y"]))


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="no such prompt file"):
        from_file(tmp_path / "p.txt", DEFAULTS, 16)
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match="no such prompt file"):
        from_file(tmp_path / "folder.txt", DEFAULTS, 16)


def test_syntax_of_other_programs_is_pointed_out(tmp_path):
    """Comments and options are part of the prompt here; each kind is named once, with its first line."""
    path = tmp_path / "p.txt"
    path.write_text("a cat\n# comment\na cat --n low quality --w 512 --s 28\na dog --w 512\n#1 fan -- a poster\n")
    requests = from_file(path, SamplingDefaults(), 16)
    assert [request.prompt for request in requests][1] == "# comment"
    comment, option = foreign_syntax(requests)
    assert comment.startswith(f"{path}, line 2: '# comment' looks like a comment, but is used as a prompt")
    assert option.startswith(f"{path}, line 3 and 1 more: 'a cat --n low quality --w 512 --s 28' looks like an option")
    assert list(foreign_syntax(requests[:1] + requests[4:])) == []
