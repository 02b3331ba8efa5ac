"""Evaluation of a job's folder: the same on any processes, in any batch and resumed; records of its numbers."""

import json
import os
from multiprocessing import get_context
from pathlib import Path
from tempfile import mkdtemp

import pytest

from selfe import evaluate
from selfe.errors import UserError
from selfe.evaluation import features
from tests.helpers import sampling_job

REFERENCE = sampling_job.PHOTOS / "manifest.tsv"


@pytest.fixture(scope="module")
def made_job(tmp_path_factory) -> Path:
    """66 images for each of three step counts: two samples of every caption."""
    folder = tmp_path_factory.mktemp("job") / "images"
    sampling_job.make_job(folder, sampling_job.captions(), size=(32, 48), num_steps=(1, 4, 32), num_samples=2)
    return folder


@pytest.fixture
def job(made_job, tmp_path, monkeypatch) -> Path:
    """A folder with links to the images of the job."""
    monkeypatch.setattr(features, "CHUNK", 16)
    folder = tmp_path / "images"
    folder.mkdir()
    for file in made_job.iterdir():
        (folder / file.name).hardlink_to(file)
    return folder


def arguments(job: Path, *overrides: str, **params) -> list[str]:
    part = {"module": "tests.helpers.extractors.Thumbnails", "params": params}
    values = {"extractors": {"thumbnails": part}, "reference": str(REFERENCE), "bootstrap": 20}
    values["base_dir"] = str(REFERENCE.parent)
    return [str(job), "-", *(f"evaluation.{key}={json.dumps(value)}" for key, value in values.items()), *overrides]


def result(job: Path) -> dict:
    return json.loads((job / "evaluation.json").read_text())


def numbers(evaluation: dict) -> dict[tuple, float]:
    """Values and bounds by cell and metric."""
    return {
        (value["cell"], value["metric"], bound): value[bound]
        for value in evaluation["values"]
        for bound in ("value", "low", "high")
    }


def on_processes(size: int, given: list[str]) -> list[int]:
    """Exit codes of `python -m selfe.evaluate GIVEN` on some processes."""
    store = str(Path(mkdtemp()) / "store")
    context = get_context("forkserver")
    processes = [context.Process(target=work, args=(rank, size, store, given)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def work(rank: int, size: int, store: str, given: list[str]) -> None:
    features.CHUNK = 16
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"SELFE_STORE": store, "TORCHELASTIC_RESTART_COUNT": "0", "GLOO_SOCKET_IFNAME": "lo"}
    evaluate.main(given)
    os._exit(0)  # not by the interpreter: gloo's threads may still free tensors, and it would abort


def test_quality_falls_with_blur_and_every_number_has_a_record(job, capsys):
    evaluate.main(arguments(job))
    evaluation = result(job)
    assert [cell["settings"]["num_steps"] for cell in evaluation["cells"]] == [1, 4, 32]
    assert {cell["count"] for cell in evaluation["cells"]} == {66}
    assert evaluation["reference"]["count"] == 33
    assert evaluation["reference"]["resized"] == "resized to cover 32 x 48 (Lanczos), centre crop"
    assert evaluation["extractors"] == {"thumbnails": {"seed": 0, "width": 12}}
    assert evaluation["cells"][0]["settings"]["fingerprint"] == "0123456789abema"

    values = numbers(evaluation)
    for metric in ("fd", "kid", "cmmd"):
        assert values[0, metric, "value"] > values[1, metric, "value"] > values[2, metric, "value"]
        assert values[0, metric, "low"] < values[0, metric, "value"] < values[0, metric, "high"]
    assert {name for _, name, _ in values} == {
        "fd", "kid", "cmmd", "precision", "recall", "density", "coverage", "clip_score", "retrieval@1", "retrieval@5",
        "diversity", "bright",
    }  # fmt: skip
    assert "steps  NFE" in capsys.readouterr().out


def test_two_processes_and_other_batches_give_the_same_numbers(job, tmp_path):
    evaluate.main(arguments(job))
    one = result(job)
    for size, batch in ((2, 64), (1, 7)):
        folder = tmp_path / f"features_{size}_{batch}"
        given = arguments(job, f"evaluation.batch_size={batch}", f"evaluation.feature_dir={folder}")
        assert on_processes(size, given) == [0] * size
        other = result(job)
        same_batches = batch == 64
        assert numbers(other) == (numbers(one) if same_batches else pytest.approx(numbers(one), rel=1e-6, abs=1e-6))
        assert {**other, "values": []} == {**one, "values": []}


def test_a_killed_evaluation_resumes_without_computing_features_again(job):
    assert on_processes(1, arguments(job, fail_after=5)) == [1]
    computed = {file.name: file.stat().st_mtime_ns for file in (job / "features").iterdir()}
    assert len(computed) == 5
    assert not (job / "evaluation.json").exists()

    evaluate.main(arguments(job))
    resumed = result(job)
    after = {file.name: file.stat().st_mtime_ns for file in (job / "features").iterdir()}
    assert computed.items() <= after.items()
    for file in (job / "features").iterdir():
        file.unlink()
    evaluate.main(arguments(job))
    assert result(job) == resumed


def test_real_images_can_be_those_of_a_config(job):
    mini = sampling_job.PHOTOS.parents[1] / "configs/mini/base.yaml"
    given = [f"evaluation.reference={mini}", "evaluation.metrics=[fd]"]
    with pytest.raises(UserError, match=r"reference_images: missing; set how many images of .*base.yaml are taken"):
        evaluate.main(arguments(job, *given))
    evaluate.main(arguments(job, *given, "evaluation.reference_images=40"))
    first = result(job)
    assert first["reference"]["count"] == 40
    assert first["reference"]["resized"] == "unchanged"
    evaluate.main(arguments(job, *given, "evaluation.reference_images=40", "evaluation.reference_split=train"))
    assert result(job)["reference"]["images"] != first["reference"]["images"]


@pytest.mark.parametrize("order", [("judge", "thumbnails"), ("thumbnails", "judge")])
def test_an_extractor_of_scores_does_not_see_the_reference(job, tmp_path, order):
    reference = tmp_path / "manifest.tsv"
    text = REFERENCE.read_text()
    reference.write_text(text.replace("\t", "\tanother "))  # captions that the judge does not know
    known = [caption for _, caption in sampling_job.captions()]
    parts = {
        "judge": {"module": "tests.helpers.extractors.Judge", "params": {"captions": known}},
        "thumbnails": {"module": "tests.helpers.extractors.Thumbnails"},
    }

    def settings(*names: str, **changes) -> list[str]:
        extractors = {name: parts[name] for name in names}
        given = {"extractors": extractors, "reference": str(reference), "base_dir": str(REFERENCE.parent)}
        return [str(job), "-", f"evaluation={json.dumps(given | {'bootstrap': 0} | changes)}"]

    evaluate.main(settings(*order))
    evaluation = result(job)
    assert list(evaluation["extractors"]) == list(order)
    assert {value["metric"] for value in evaluation["values"] if value["extractor"] == "judge"} == {"judged"}
    assert "fd" in {value["metric"] for value in evaluation["values"] if value["extractor"] == "thumbnails"}
    assert evaluation["reference"]["count"] == 33

    evaluate.main(settings("judge"))
    assert result(job)["reference"] is None
    with pytest.raises(UserError, match="fd needs an extractor that has more than scores"):
        evaluate.main(settings("judge", metrics=["fd"]))


def test_a_replaced_image_gets_new_features(job):
    evaluate.main(arguments(job, "evaluation.metrics=[fd]"))
    before = result(job)
    name = json.loads((job / "metadata.jsonl").read_text().splitlines()[0])["file"]
    other = json.loads((job / "metadata.jsonl").read_text().splitlines()[4])["file"]
    (job / name).unlink()
    (job / name).write_bytes((job / other).read_bytes())
    evaluate.main(arguments(job, "evaluation.metrics=[fd]"))
    after = result(job)
    assert [a["images"] == b["images"] for a, b in zip(before["cells"], after["cells"], strict=True)] == [
        False, True, True,
    ]  # fmt: skip
    assert numbers(before) != numbers(after)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.metrics=[fid]", "no metric 'fid'; valid: fd,"),
        ("evaluation.reference=nowhere.tsv", "nowhere.tsv: no such file"),
        ("evaluation.reference=model.pt", "give a folder of images, a manifest"),
        ("evaluation.reference=configs/debug/selfe_smoke.yaml evaluation.reference_images=1000", "has 33 validation"),
        ("evaluation.extractors=null", "extractors: expected"),
        ("evaluation.nearest_k=50", "50 neighbours need more than 50 images in each set, got 66 generated and 33"),
        ("evaluation.table=[a.csv]", "a.csv: the file must be .md"),
    ],
)
def test_mistakes_are_one_line(job, override, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        evaluate.main(arguments(job, *override.split()))


def test_a_folder_that_is_no_job_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"metadata.jsonl: no such file; give the folder of a finished sampling job"):
        evaluate.main(arguments(tmp_path))
