"""Evaluation during training: it changes nothing, equals `selfe evaluate`, and keeps the best checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from selfe import config, evaluate, infer
from selfe.checkpoint import verify
from selfe.checkpoint.manager import CheckpointManager, RetentionPolicy
from selfe.distributed.collectives import World
from selfe.errors import UserError
from selfe.evaluation.results import Evaluation
from selfe.tools.report.run_folder import RunFolder
from selfe.training.evaluation import Evaluator
from tests.helpers.sampling_job import PHOTOS
from tests.helpers.train_processes import QUICK, Run, files, finish, lines

# 9 images of 9 prompts in batches of 2, so that two ranks share 5 batches
SETTINGS = {
    "every": 2,
    "num_images": 9,
    "num_steps": [1, 2],
    "batch_size": 2,
    "size": [32, 32],
    "cfg_scale": 2,
    "nearest_k": 2,
    "retrieval_k": [1],
    "reference": str(PHOTOS / "manifest.tsv"),
    "base_dir": str(PHOTOS),
    "extractors": {"thumbs": {"module": "tests.helpers.extractors.Thumbnails"}},
    "keep_best": "eval/thumbs/fd/steps_2",
}
EVALUATED = (f"trainer.evaluate={json.dumps(SETTINGS)}", "trainer.checkpoints.keep_last=1")
HALF, LAST = Path("checkpoints/step_00000002"), Path("checkpoints/step_00000004")
EXTRACTOR = "trainer.evaluate.extractors.thumbs.params"
RECORD = Path("evaluations/step_00000002.json")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """Four steps without evaluation."""
    folder = tmp_path_factory.mktemp("plain")
    finish(folder, 1, "trainer.stop_step=4")
    return folder


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """Four steps with two evaluations."""
    folder = tmp_path_factory.mktemp("evaluated")
    finish(folder, 1, *EVALUATED, "trainer.stop_step=4")
    return folder


def copy_half(plain: Path, folder: Path) -> None:
    """The run without evaluation as it was after two steps."""
    shutil.copytree(plain / HALF, folder / HALF)
    kept = [line for line in (plain / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= 2]
    (folder / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    (folder / "config.yaml").write_text((plain / "config.yaml").read_text().replace(str(plain), str(folder)))


def evaluated(folder: Path) -> dict[int, dict[str, float]]:
    """The logged values of every evaluation."""
    return {
        line["step"]: {name: value for name, value in line.items() if name.startswith("eval/")}
        for line in lines(folder)
        if any(name.startswith("eval/") for name in line)
    }


def test_training_is_bitwise_the_same_with_and_without_evaluation(plain, straight):
    assert files(straight / LAST) == files(plain / LAST)
    trained = [line for line in lines(straight) if "train/loss" in line]
    assert trained == lines(plain)


def test_values_are_logged_and_recorded_and_their_time_is_counted(straight):
    values = evaluated(straight)
    assert list(values) == [2, 4]
    assert {name.split("/")[2] for name in values[2]} == {
        "fd", "kid", "cmmd", "precision", "recall", "density", "coverage", "clip_score", "retrieval@1", "bright",
    }  # fmt: skip
    assert values[2]["eval/thumbs/fd/steps_1"] != values[4]["eval/thumbs/fd/steps_1"]

    recorded = Evaluation.read(straight / RECORD)
    assert [cell["settings"]["num_steps"] for cell in recorded.cells] == [1, 2]
    assert {cell["count"] for cell in recorded.cells} == {9}
    assert recorded.reference["resized"] == "resized to cover 32 x 32 (Lanczos), centre crop"
    assert {value.value for value in recorded.values} == set(values[2].values())
    assert not (straight / "evaluations/generated").exists()

    logged = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    (after,) = [line for line in logged if line["step"] == 3]
    assert 0 < after["time/evaluation"] < 1


def test_the_report_shows_the_newest_evaluation_as_a_curve(straight):
    curves = RunFolder(straight, "run").quality()
    (curve,) = [curve for curve in curves if curve["metric"] == "fd"]
    assert curve["label"] == "step 4, guidance 2, s ratio 0, renoise eta 1"
    values = evaluated(straight)[4]
    assert {point["steps"]: point["value"] for point in curve["points"]} == {
        count: values[f"eval/thumbs/fd/steps_{count}"] for count in (1, 2)
    }


def test_two_ranks_make_up_for_a_missing_evaluation_and_give_the_same_values(plain, straight, tmp_path):
    """Of the same weights: as if the run had been killed in the evaluation after its second step."""
    copy_half(plain, tmp_path)
    finish(tmp_path, 2, *EVALUATED, "trainer.stop_step=2")
    assert evaluated(tmp_path) == {2: pytest.approx(evaluated(straight)[2], rel=1e-6, abs=1e-6)}
    one, two = (Evaluation.read(folder / RECORD) for folder in (straight, tmp_path))
    assert [cell["images"] for cell in one.cells] == [cell["images"] for cell in two.cells]
    assert "nothing to do" in finish(tmp_path, 1, *EVALUATED, "trainer.stop_step=2")


def test_two_ranks_killed_in_an_evaluation_resume_as_if_they_had_not_been(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(whole, 2, *EVALUATED, "trainer.stop_step=4")

    # 18 calls are those before training, of the reference
    run = Run(killed, 2, *EVALUATED, "trainer.stop_step=4", f"{EXTRACTOR}={json.dumps({'fail_after': 20})}")
    run.processes[0].join(120)
    run.end()
    assert run.processes[0].exitcode == 1
    assert not (killed / RECORD).exists()

    finish(killed, 2, *EVALUATED, "trainer.stop_step=4")
    assert lines(killed) == lines(whole)
    assert evaluated(killed).keys() == {2, 4}
    assert files(killed / LAST) == files(whole / LAST)
    best = [json.loads((folder / "checkpoints/best/best.json").read_text()) for folder in (killed, whole)]
    assert best[0] == best[1]


def test_the_best_checkpoint_is_kept_and_can_be_used(straight):
    values = {step: values["eval/thumbs/fd/steps_2"] for step, values in evaluated(straight).items()}
    step = min(values, key=values.get)
    best = straight / "checkpoints/best"
    record = json.loads((best / "best.json").read_text())
    assert (record["step"], record["value"]) == (step, values[step])
    assert verify.find(best) == best
    assert verify.read_step(best) == step
    assert verify.damage(best) is None
    assert verify.find(best.parent) == straight / LAST


def test_a_better_checkpoint_replaces_the_best_and_retention_leaves_it(tmp_path, alone):
    manager = CheckpointManager(tmp_path, RetentionPolicy(keep_last=1, keep_best=0), alone)
    for step in (1, 2, 3):
        manager.begin(step, {"weights": torch.full((2,), float(step))})
        manager.wait()
        if step < 3:
            assert manager.keep_best(step, {"value": 1.0 / step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "step_00000003"]
    assert manager.best() == {"value": 0.5}
    assert verify.damage(tmp_path / "best") is None
    assert verify.read_step(tmp_path / "best") == 2
    assert not manager.keep_best(9, {})


def test_it_equals_selfe_evaluate_of_the_checkpoint(straight, tmp_path, monkeypatch):
    monkeypatch.setenv("SELFE_SKIP_PRETRAINED", "1")
    last = Evaluation.read(straight / "evaluations/step_00000004.json")
    captions = [line.split("\t")[1] for line in (PHOTOS / "manifest.tsv").read_text().splitlines()]
    chosen = [captions[i * len(captions) // 9] for i in range(9)]
    defaults = {"num_steps": [1, 2], "height": 32, "width": 32, "cfg_scale": 2.0}
    sampled = {
        "ckpt_dir": str(straight / "checkpoints"),
        "output_dir": str(tmp_path),
        "prompts": chosen,
        "batch_size": 2,
    }
    sampled |= {"defaults": defaults, "gallery": False}
    infer.main([str(QUICK), f"inferencer={json.dumps(sampled)}", "inferencer.precision=fp32"])

    names = ("reference", "base_dir", "extractors", "nearest_k", "retrieval_k")
    settings = {name: SETTINGS[name] for name in names} | {"bootstrap": 0, "batch_size": 2}
    evaluate.main([str(tmp_path), "-", f"evaluation={json.dumps(settings)}"])
    job = Evaluation.read(tmp_path / "evaluation.json")
    assert job.cells == last.cells
    assert job.extractors == last.extractors
    assert [value[:3] for value in job.values] == [value[:3] for value in last.values]
    assert [value.value for value in job.values] == pytest.approx([value.value for value in last.values], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ["fid"]}, "trainer.evaluate: metrics: no metric 'fid'; valid: fd,"),
        ({"extractors": {}}, "trainer.evaluate: extractors: none is given"),
        (
            {"reference": None, "metrics": ["fd"]},
            "evaluate.metrics: fd compares with real images; set trainer.evaluate",
        ),
        ({"reference": None}, "evaluate.prompt_file: missing; without a reference"),
        ({"reference": str(PHOTOS)}, "evaluate.prompt_file: missing; the images of .* have no captions"),
        ({"reference": "nowhere.tsv"}, "trainer.evaluate.reference: nowhere.tsv: no such file"),
        ({"prompt_file": "nowhere.txt"}, "evaluate.prompt_file: nowhere.txt: no such file"),
        ({"num_images": 40}, "num_images: 40 images, 1 of a prompt, need 40 prompts, but .* has 33; ask for fewer"),
        ({"num_images": 9, "num_samples": 2}, "num_images: 9 is not a multiple of num_samples, 2"),
        ({"metrics": ["diversity"]}, "diversity compares images of one prompt; set num_samples"),
        (
            {"metrics": ["map_diversity"], "num_samples": 3},
            "map_diversity needs an extractor that returns feature maps",
        ),
        ({"nearest_k": 9}, "nearest_k: 9 neighbours need more than 9 images in each set, got 9 generated images"),
        ({"metrics": ["retrieval"], "extractors": {"colours": {"module": "examples.colours.Colours"}}}, "text encoder"),
        ({"size": [30, 32]}, "height: 30 is not a multiple of 8"),
        ({"num_steps": []}, "num_steps: the list is empty"),
        ({"every": 3}, "evaluate.every: 3 is not a multiple of checkpoint_every, 2; keep_best needs a checkpoint"),
        (
            {"keep_best": "eval/thumbs/fid/steps_2"},
            "keep_best: 'eval/thumbs/fid/steps_2' is no value to choose by; did you mean",
        ),
        (
            {"extractors": {"bad": {"module": "tests.helpers.extractors.NoFeatures"}}},
            "extractors.bad: returns no `feat",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_mistakes_are_refused_before_the_first_step(changes, message, tmp_path, alone, monkeypatch):
    monkeypatch.setenv("SELFE_SKIP_PRETRAINED", "1")
    with pytest.raises(UserError, match=message):
        prepare(SETTINGS | changes, tmp_path, alone)


def test_scores_of_an_extractor_are_evaluated_beside_distances_of_another(tmp_path, alone, monkeypatch):
    """With its own prompts, which are not the captions of the reference."""
    monkeypatch.setenv("SELFE_SKIP_PRETRAINED", "1")
    lines = [{"prompt": f"prompt {number}", "category": "ab"[number % 2]} for number in range(9)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    judge = {"module": "tests.helpers.extractors.Judge", "params": {"captions": [line["prompt"] for line in lines]}}
    changes = {"prompt_file": str(file), "extractors": SETTINGS["extractors"] | {"judge": judge}, "num_steps": [1]}
    changes |= {"metrics": ["fd", "scores", "category_mean"], "keep_best": "eval/judge/judged/category_mean/steps_1"}
    evaluator = prepare(SETTINGS | changes, tmp_path, alone)
    names = ["bright", "bright/a", "bright/b", "bright/category_mean"]
    scores = [name.replace("bright", "judged") for name in names]
    wanted = [*(f"thumbs/{name}" for name in ("fd", *names)), *(f"judge/{name}" for name in scores)]
    assert evaluator.keys == [f"eval/{name}/steps_1" for name in wanted]


def prepare(evaluated: dict, folder: Path, world: World) -> Evaluator:
    """What a run does with its evaluation before the first step."""
    settings = config.load(QUICK, [f"trainer.evaluate={json.dumps(evaluated)}"])
    with torch.device("meta"):
        system = config.build(settings, "system")
    evaluator = Evaluator(config.build(settings, "trainer").evaluate, system, folder, world)
    system.load_encoders(world.device)
    evaluator.prepare()
    return evaluator
