"""Prompt sets, the files of official scorers, the script that runs them, and the record of their results."""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selfe import cli
from selfe.benchmarks import prompt_sets
from selfe.benchmarks.dpg import DPG
from selfe.benchmarks.prompt_sets import PROMPT_SETS, Prompt
from selfe.benchmarks.scorer import Sample
from selfe.errors import UserError
from selfe.evaluation.results import Evaluation
from selfe.inference import prompts
from selfe.inference.prompts import SamplingDefaults
from tests.helpers import sampling_job
from tests.helpers.images import make_image

GENEVAL = prompt_sets.opened(PROMPT_SETS["geneval"], None)[0]
GENEVAL2_LINE = {
    "prompt": "two red cats",
    "atom_count": 3,
    "vqa_list": [["How many cats?", "two"], ["Are they red?", "Yes"], ["Are there cats?", "Yes"]],
    "skills": ["count", "attribute", "object"],
}
# the interfaces of the official scorers, without their models: files in, files out
SCORERS = {
    "geneval": (
        "evaluation/evaluate_images.py",
        """
import json, pathlib, sys
folder, out, models = sys.argv[1], sys.argv[3], sys.argv[5]
assert pathlib.Path(models).is_dir()
lines = []
for prompt in sorted(pathlib.Path(folder).iterdir()):
    metadata = json.loads((prompt / "metadata.jsonl").read_text())
    for image in sorted((prompt / "samples").iterdir()):
        correct = image.name == "0000.png" or metadata["tag"] == "single_object"
        lines.append({"filename": str(image), "tag": metadata["tag"], "correct": correct})
pathlib.Path(out).write_text("".join(json.dumps(line) + "\\n" for line in lines))
""",
    ),
    "geneval2": (
        "evaluation.py",
        """
import json, pathlib, sys
data, images, method, out = sys.argv[2::2]
paths = json.loads(pathlib.Path(images).read_text())
lines = [json.loads(line) for line in pathlib.Path(data).read_text().splitlines()]
assert all(pathlib.Path(paths[line["prompt"]]).is_file() for line in lines)
pathlib.Path(out).write_text(json.dumps([[1.0, 0.25, 0.5] for _ in lines]))
""",
    ),
    "adm": (
        "evaluations/evaluator.py",
        """
import sys
print("computing reference batch activations...")
print("Inception Score: 215.8\\nFID: 3.94\\nsFID: 6.14\\nPrecision: 0.8265\\nRecall: 0.5309")
""",
    ),
}


def make_job(folder: Path, texts: list[str], num_samples: int = 2, num_steps: tuple[int, ...] = (1, 4)) -> Path:
    photos = sampling_job.captions()
    pairs = [(photos[i % len(photos)][0], text) for i, text in enumerate(texts)]
    sampling_job.make_job(folder, pairs, size=(32, 32), num_steps=num_steps, num_samples=num_samples)
    return folder


def clone(folder: Path, name: str) -> str:
    """A git repository with the script of a scorer; returns its commit."""
    file, text = SCORERS[name]
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(text)
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "scorer"]):
        subprocess.run([*git, *command], check=True)
    return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


def run_scorer(job: Path, name: str, scorer: Path, **variables: str) -> subprocess.CompletedProcess:
    given = {"SCORER": str(scorer), "PYTHON": sys.executable} | variables
    return subprocess.run(
        ["bash", str(job / name / "run.sh")], env=os.environ | given, capture_output=True, text=True, check=False
    )


def values(evaluation: Evaluation, cell: int) -> dict[str, float]:
    return {value.metric: value.value for value in evaluation.values if value.cell == cell}


# ---- prompts ----


def test_geneval_has_its_553_prompts_in_their_order():
    content = PROMPT_SETS["geneval"].path.read_bytes()
    assert hashlib.sha256(content).hexdigest() == "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
    texts = [prompt.text for prompt in GENEVAL]
    # as others print them with their numbers
    assert texts[:2] == ["a photo of a bench", "a photo of a cow"]
    assert texts[457] == "a photo of a pink oven and a green motorcycle"
    assert texts[530] == "a photo of a purple suitcase and an orange pizza"
    tasks = [prompt.category for prompt in GENEVAL]
    counts = {task: tasks.count(task) for task in dict.fromkeys(tasks)}
    assert counts == {
        "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100,
    }  # fmt: skip


def test_the_prompt_file_of_geneval_is_sampled_from_with_its_tasks(tmp_path, capsys):
    out = tmp_path / "geneval.jsonl"
    cli.run(["benchmark", "prompts", "geneval", "--out", str(out)])
    assert out.read_bytes() == PROMPT_SETS["geneval"].path.read_bytes()
    assert "licence: MIT" in capsys.readouterr().out
    requests = prompts.from_file(out, SamplingDefaults(), 16)
    assert [request.category for request in requests] == [prompt.category for prompt in GENEVAL]
    assert requests[5].extra == GENEVAL[5].facts


@pytest.mark.parametrize(
    ("name", "header", "row", "expected"),
    [
        (
            "parti",
            "Prompt\tCategory\tChallenge\tNote",
            '"bond" {}\tAbstract\tBasic\t',
            Prompt("00001", '"bond" 1', "Abstract"),
        ),
        (
            "dpg",
            "item_id,text,proposition_id",
            'item{0},"a cat, {0}",1\nitem{0},"a cat, {0}",2',
            Prompt("item1", "a cat, 1"),
        ),
        (
            "geneval2",
            "",
            json.dumps(GENEVAL2_LINE).replace("{", "{{").replace("}", "}}"),
            Prompt("00001", "two red cats", "3 atoms"),
        ),
    ],
    ids=["parti", "dpg", "geneval2"],
)
def test_files_of_the_authors_become_prompt_files(tmp_path, monkeypatch, name, header, row, expected):
    count = 20
    monkeypatch.setitem(PROMPT_SETS, name, replace(PROMPT_SETS[name], num_prompts=count))
    source, out = tmp_path / PROMPT_SETS[name].file, tmp_path / "prompts.jsonl"
    rows = [row.format(number) for number in range(count)]
    source.write_text("\n".join([header, *rows]).lstrip("\n"))
    read = PROMPT_SETS[name].read(source)[1]
    assert (read.id, read.text, read.category) == (expected.id, expected.text, expected.category)

    # a file beside the prompt file is not downloaded again
    cli.run(["benchmark", "prompts", name, "--out", str(out)])
    requests = prompts.from_file(out, SamplingDefaults(), 16)
    assert len(requests) == count
    assert (requests[1].prompt, requests[1].category) == (expected.text, expected.category)

    source.write_text("\n".join([header, *rows[:-1]]).lstrip("\n"))
    with pytest.raises(UserError, match=f"has {count - 1} prompts, but .* has {count}; download https://"):
        cli.run(["benchmark", "prompts", name, "--out", str(out)])


def test_what_cannot_be_downloaded_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"cannot be downloaded .* name the file with --source"):
        prompt_sets.download((tmp_path / "nowhere").as_uri(), tmp_path / "file")
    (tmp_path / "there").write_bytes(b"content")
    prompt_sets.download((tmp_path / "there").as_uri(), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"content"


# ---- scorers ----


def test_geneval_is_written_run_and_read(tmp_path, capsys):
    chosen = [GENEVAL[0], GENEVAL[100], GENEVAL[300]]
    job = make_job(tmp_path / "images", [prompt.text for prompt in chosen])
    commit = clone(tmp_path / "scorer", "geneval")
    cli.run(["benchmark", "layout", "geneval", str(job)])
    assert "550 prompts of GenEval have no images" in capsys.readouterr().out

    # the layout: a folder of five digits with the line of the prompt and its images
    (four_steps,) = (job / "geneval/images").glob("4_steps*")
    assert sorted(file.name for file in four_steps.iterdir()) == ["00000", "00100", "00300"]
    assert json.loads((four_steps / "00300/metadata.jsonl").read_text()) == GENEVAL[300].facts
    images = sorted((four_steps / "00300/samples").iterdir())
    assert [image.name for image in images] == ["0000.png", "0001.png"]
    lines = [json.loads(line) for line in (job / "metadata.jsonl").read_text().splitlines()]
    (same,) = [line for line in lines if (line["prompt"], line["sample"], line["num_steps"]) == (chosen[2].text, 1, 4)]
    assert images[1].read_bytes() == (job / same["file"]).read_bytes()

    done = run_scorer(job, "geneval", tmp_path / "scorer")
    assert "MODELS: set it to the folder of evaluation/download_models.sh" in done.stderr
    assert run_scorer(job, "geneval", tmp_path / "scorer", MODELS=str(tmp_path)).returncode == 0
    cli.run(["benchmark", "read", "geneval", str(job), "--table", str(tmp_path / "table.md")])
    evaluation = Evaluation.read(job / "geneval/evaluation.json")
    assert [cell["settings"]["num_steps"] for cell in evaluation.cells] == [1, 4]
    for cell in range(2):
        assert values(evaluation, cell) == pytest.approx(
            {"overall": 2 / 3, "correct": 4 / 6, "correct_prompts": 1, "correct/single_object": 1,
             "correct/two_object": 0.5, "correct/colors": 0.5}
        )  # fmt: skip
    record = evaluation.extractors["geneval"]
    assert (record["scorer"], record["version"]) == ("https://github.com/djghosh13/geneval", commit)
    sha256 = hashlib.sha256(PROMPT_SETS["geneval"].path.read_bytes()).hexdigest()
    assert record["prompt_set"] == {"name": "geneval", "sha256": sha256, "num_prompts": 553}
    assert evaluation.record(evaluation.values[0])["count"] == 6
    assert "overall" in (tmp_path / "table.md").read_text()


def test_results_of_other_images_are_removed_and_incomplete_ones_refused(tmp_path):
    job = make_job(tmp_path / "images", [GENEVAL[0].text], num_steps=(1,))
    clone(tmp_path / "scorer", "geneval")
    cli.run(["benchmark", "layout", "geneval", str(job)])
    with pytest.raises(UserError, match=r"jsonl: no such file; run .*run.sh"):
        cli.run(["benchmark", "read", "geneval", str(job)])
    run_scorer(job, "geneval", tmp_path / "scorer", MODELS=str(tmp_path))

    # another version of the scorer
    (tmp_path / "scorer/README").touch()
    subprocess.run(["git", "-C", str(tmp_path / "scorer"), "add", "."], check=True)
    done = run_scorer(job, "geneval", tmp_path / "scorer", MODELS=str(tmp_path))
    assert done.returncode == 2
    assert "-dirty; remove this folder to start again" in done.stderr

    (result,) = (job / "geneval/results").glob("*.jsonl")
    cli.run(["benchmark", "layout", "geneval", str(job)])
    assert result.is_file()
    text = result.read_text()
    result.write_text(text.splitlines()[0] + "\n")
    with pytest.raises(UserError, match="has 1 of 2 images; remove it and run the scorer again"):
        cli.run(["benchmark", "read", "geneval", str(job)])
    result.write_text(text)

    image = next(job.glob("*.png"))
    image.unlink()  # the layout has a link to it
    make_image(3, (32, 32)).save(image)
    cli.run(["benchmark", "layout", "geneval", str(job)])
    assert not result.exists()

    image.unlink()
    with pytest.raises(UserError, match=r"no such image, though metadata.jsonl lists it; run selfe infer again"):
        cli.run(["benchmark", "layout", "geneval", str(job)])

    other = make_job(tmp_path / "other", ["a photograph"])
    with pytest.raises(UserError, match="the prompt 'a photograph' is not one of the benchmark"):
        cli.run(["benchmark", "layout", "geneval", str(other)])


def test_geneval2_gets_one_image_of_each_prompt(tmp_path):
    source = tmp_path / "geneval2_data.jsonl"
    texts = [f"two red cats {number}" for number in range(800)]
    source.write_text("".join(json.dumps(GENEVAL2_LINE | {"prompt": text}) + "\n" for text in texts))
    job = make_job(tmp_path / "images", [texts[7], texts[3]], num_steps=(2,))
    clone(tmp_path / "scorer", "geneval2")
    with pytest.raises(UserError, match=r"GenEval 2: its licence .* name geneval2_data.jsonl with --source"):
        cli.run(["benchmark", "layout", "geneval2", str(job)])
    cli.run(["benchmark", "layout", "geneval2", str(job), "--source", str(source)])
    done = run_scorer(job, "geneval2", tmp_path / "scorer")
    assert done.returncode == 0, done.stderr
    cli.run(["benchmark", "read", "geneval2", str(job)])
    assert values(Evaluation.read(job / "geneval2/evaluation.json"), 0) == pytest.approx(
        {"soft_tifa_am": 175 / 3, "soft_tifa_gm": 50, "soft_tifa_am/count": 100, "soft_tifa_am/attribute": 25,
         "soft_tifa_am/object": 50, "soft_tifa_gm/3 atoms": 50}
    )  # fmt: skip


def test_adm_gets_one_array_and_its_reference_is_recorded(tmp_path):
    job = make_job(tmp_path / "images", ["a red bird", "a blue bird"], num_steps=(1,))
    (tmp_path / "reference.npz").write_bytes(b"reference")
    clone(tmp_path / "scorer", "adm")
    cli.run(["benchmark", "layout", "adm", str(job)])
    (array,) = (job / "adm/images").glob("*/samples.npz")
    content = np.load(array)["arr_0"]
    assert (content.shape, content.dtype) == ((4, 32, 32, 3), np.uint8)
    files = [json.loads(line)["file"] for line in (job / "metadata.jsonl").read_text().splitlines()]
    np.testing.assert_array_equal(content, [np.asarray(Image.open(job / file)) for file in files])

    done = run_scorer(job, "adm", tmp_path / "scorer", REFERENCE=str(tmp_path / "reference.npz"))
    assert done.returncode == 0, done.stderr
    (tmp_path / "other.npz").write_bytes(b"another")
    done = run_scorer(job, "adm", tmp_path / "scorer", REFERENCE=str(tmp_path / "other.npz"))
    assert done.returncode == 2
    assert "results: computed with the reference batch" in done.stderr
    cli.run(["benchmark", "read", "adm", str(job)])
    evaluation = Evaluation.read(job / "adm/evaluation.json")
    assert values(evaluation, 0) == {
        "inception_score": 215.8, "fid": 3.94, "sfid": 6.14, "precision": 0.8265, "recall": 0.5309,
    }  # fmt: skip
    record = evaluation.record(evaluation.values[-1])
    assert record["extractor"]["reference_sha256"] == hashlib.sha256(b"reference").hexdigest()


# ---- DPG ----


def dpg_samples(folder: Path, size: tuple[int, int] = (16, 16), count: int = 4) -> list[Sample]:
    folder.mkdir(exist_ok=True)
    samples = []
    for item in ("item1", "item2"):
        for number in range(count):
            path = folder / f"{item}_{number}.png"
            Image.new("RGB", size[::-1], (10 * number, 0, 0)).save(path)
            samples.append(Sample(path, Prompt(item, item), number, size))
    return samples


def test_dpg_gets_four_images_in_a_square(tmp_path):
    options = DPG().write(tmp_path / "out", dpg_samples(tmp_path / "in"))
    assert options == "--resolution 16 --pic-num 4"
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["item1.png", "item2.png"]
    grid = np.asarray(Image.open(tmp_path / "out/item2.png"))[..., 0]
    assert grid.shape == (32, 32)
    assert grid[::16, ::16].tolist() == [[0, 10], [20, 30]]

    assert DPG().write(tmp_path / "single", dpg_samples(tmp_path / "in", count=1)) == "--resolution 16 --pic-num 1"
    assert Image.open(tmp_path / "single/item1.png").size == (16, 16)
    with pytest.raises(UserError, match="DPG-Bench crops squares, the images are 16 x 32"):
        DPG().write(tmp_path / "wide", dpg_samples(tmp_path / "in", size=(16, 32)))
    with pytest.raises(UserError, match=r"item1 has 5 images; DPG-Bench needs .* at most 4"):
        DPG().write(tmp_path / "many", dpg_samples(tmp_path / "in", count=5))


def test_dpg_results_are_read_and_an_image_that_was_left_out_is_reported(tmp_path):
    prompts = [Prompt("item1", "a"), Prompt("item2", "b")]
    rows = ["images/c/item2.png, 1.0, 0.5, 0.75", "images/c/item1.png, 0.5, 0.5, 0.5"]
    summary = ["Model: c", "L1 category scores:", "\tentity: 80.5", "L2 category scores:", "\tentity - whole: 80.5",
               "Image path: images/c", "Save results to: results/c.partial.txt", "DPG-Bench score: 62.5"]  # fmt: skip
    path = tmp_path / "result.txt"
    path.write_text("\n".join([*rows, *summary]) + "\n")
    estimates = DPG().read(path, prompts, 4, 100)
    assert {name: estimate.value for name, estimate in estimates.items()} == {
        "dpg": 62.5, "dpg/entity": 80.5, "dpg_detail/entity - whole": 80.5,
    }  # fmt: skip
    assert estimates["dpg"].low < 62.5 < estimates["dpg"].high

    path.write_text("\n".join([rows[0], *summary]) + "\n")
    with pytest.raises(UserError, match="has 1 of 2 prompts, item1 is missing"):
        DPG().read(path, prompts, 4, 0)
    path.write_text("\n".join(rows) + "\n")
    with pytest.raises(UserError, match=f"states the score {math.nan}, but its rows have 62.5"):
        DPG().read(path, prompts, 4, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("prompts geneva --out a.jsonl", "geneva: no prompt set; choose one of geneval, geneval2, dpg, parti"),
        ("prompts geneval", "give the prompt file to write, --out FILE.jsonl"),
        ("prompts geneval --out a.txt", "give the prompt file to write, --out FILE.jsonl"),
        ("prompts dpg --out a.jsonl --source nowhere.csv", "nowhere.csv: no such file; download https://"),
        ("prompts dpg --out a.jsonl --source pyproject.toml", "pyproject.toml: not dpg_bench.csv of DPG-Bench"),
        ("layout parti JOB", "parti: no scorer that selfe benchmark supports; choose one of geneval"),
        ("layout geneval", "name the folder of a sampling job"),
        ("layout geneval nowhere", "nowhere/metadata.jsonl: no such file"),
        ("read geneval nowhere", "layout.json: no such file; run selfe benchmark layout geneval nowhere first"),
        ("read geneval nowhere --table a.csv", "--table: a.csv: the file must be .md"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        cli.run(["benchmark", *arguments.split()])
