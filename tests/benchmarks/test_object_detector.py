"""GenEval's rules on detections that are known, and detectors of Hugging Face as an extractor."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    OwlViTConfig,
    OwlViTForObjectDetection,
    YolosConfig,
    YolosForObjectDetection,
)

from selfe import evaluate
from selfe.benchmarks import geneval_rules, object_detector, prompt_sets
from selfe.benchmarks.geneval_rules import COLOURS, Detection, is_correct, kept, positions
from selfe.benchmarks.object_detector import ObjectDetector, cut_out
from selfe.benchmarks.prompt_sets import PROMPT_SETS
from selfe.errors import UserError
from tests.helpers import sampling_job
from tests.helpers.encoder_files import write_clip

CPU = torch.device("cpu")
PROMPTS = prompt_sets.opened(PROMPT_SETS["geneval"], None)[0]
CLASSES = sorted({each["class"] for prompt in PROMPTS for each in prompt.facts["include"]})
# as detectors call them
NAMES = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard", "couch": "sofa"}
PROCESSOR = {"size": {"shortest_edge": 64, "longest_edge": 96}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}


def box(left: float, top: float, size: float = 10, score: float = 0.95) -> Detection:
    return Detection(score, (left, top, left + size, top + size))


# ---- rules ----


@pytest.mark.parametrize(
    ("left", "top", "expected"),
    [
        (-30, 0, {"left of"}),
        (30, 0, {"right of"}),
        (0, -30, {"above"}),
        (0, 30, {"below"}),
        (30, 30, {"right of", "below"}),
        (30, 8, {"right of"}),
        (2, 0, set()),  # not farther than a tenth of both sizes
        (2.5, 0, set()),  # farther, but by less than half of the distance
        (5, 0, {"right of"}),
    ],
)
def test_positions_need_distance(left, top, expected):
    assert positions(box(left, top), box(0, 0)) == expected


def task(name: str) -> dict:
    return next(prompt.facts for prompt in PROMPTS if prompt.category == name)


def no_colours(name: str, ones: list) -> list:
    raise AssertionError("this prompt names no colour")


def test_objects_are_counted_at_their_thresholds():
    counted = {"include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]}
    for count, correct in ((1, False), (2, True), (3, False)):
        assert is_correct(counted, {"cat": [box(i, 0) for i in range(count)]}, no_colours) is correct

    detections = {
        "cat": [box(0, 0, score=0.3), box(1, 0, score=0.5), box(2, 0, score=0.9)],
        "dog": [box(0, 0, score=0)],
    }
    assert kept(detections, 0.3, 16) == {"cat": [detections["cat"][2], detections["cat"][1]]}
    assert kept(detections, 0.3, 1) == {"cat": [detections["cat"][2]]}
    assert kept(detections, 0.9, 16) == {}


def test_an_object_that_is_detected_twice_can_count_once():
    first, shifted, other = box(0, 0, score=0.9), box(2, 0, score=0.8), box(30, 0, score=0.7)
    assert geneval_rules.overlap(first, shifted) == pytest.approx(8 / 12)
    assert geneval_rules.overlap(first, other) == 0
    detections = {"cat": [other, shifted, first]}
    assert kept(detections, 0.3, 16) == {"cat": [first, shifted, other]}
    assert kept(detections, 0.3, 16, max_overlap=0.6) == {"cat": [first, other]}
    assert kept(detections, 0.3, 16, max_overlap=0.7) == {"cat": [first, shifted, other]}


def test_each_task_is_judged_by_its_rule():
    one, two = task("single_object"), task("two_object")
    name, (first, second) = one["include"][0]["class"], [each["class"] for each in two["include"]]
    assert is_correct(one, {name: [box(0, 0)], "other": [box(0, 0)]}, no_colours)
    assert not is_correct(one, {"other": [box(0, 0)]}, no_colours)
    assert is_correct(two, {first: [box(0, 0)], second: [box(0, 0)]}, no_colours)
    assert not is_correct(two, {first: [box(0, 0)]}, no_colours)

    # the second object of the prompt is the first of `include`, to which the position refers
    placed = task("position")
    target, moved = (each["class"] for each in placed["include"])
    position = placed["include"][1]["position"][0]
    places = {"left of": (-30, 0), "right of": (30, 0), "above": (0, -30), "below": (0, 30)}
    for name, place in places.items():
        objects = {target: [box(0, 0)], moved: [box(*place), box(*places[position], score=0.5)]}
        assert is_correct(placed, objects, no_colours) == (name == position)  # the less confident one does not count

    coloured = task("color_attr")
    wanted = {each["class"]: each["color"] for each in coloured["include"]}
    objects = {name: [box(0, 0)] for name in wanted}
    assert is_correct(coloured, objects, lambda name, ones: [wanted[name]])
    swapped = dict(zip(wanted, reversed(wanted.values()), strict=True))
    assert not is_correct(coloured, objects, lambda name, ones: [swapped[name]])


# ---- colours ----


def test_objects_are_cut_out_by_their_boxes_and_masks():
    image = torch.arange(2 * 3 * 4.0).view(1, 6, 4).expand(3, 6, 4) / 24
    part = cut_out(image, Detection(1, (0.6, 1.4, 3.2, 9)))
    torch.testing.assert_close(part, image[:, 1:6, 1:3])
    mask = torch.zeros(6, 4, dtype=torch.bool)
    mask[2, 2] = True
    part = cut_out(image, Detection(1, (2, 2, 4, 4), mask))
    grey = 153 / 127.5 - 1
    torch.testing.assert_close(part[0], torch.tensor([[image[0, 2, 2], grey], [grey, grey]]))
    assert cut_out(image, Detection(1, (9, 9, 9, 9))).shape == (3, 1, 1)


class StubCLIP:
    """Red and blue images, and texts with these words."""

    def __init__(self):
        self.texts_seen = []

    def __call__(self, images, captions):
        means = torch.stack([image.mean(dim=(1, 2)) for image in images])
        return {"aligned": F.one_hot(means.argmax(dim=1) // 2, 2).float()}

    def texts(self, texts):
        self.texts_seen += texts
        return torch.tensor([[float("red" in text), float("blue" in text)] for text in texts]) + 1e-3


def test_colours_are_those_of_the_parts_of_an_image(tiny):
    detector = ObjectDetector(str(tiny / "yolos"), str(tiny / "clip"))
    detector.clip, detector.colours = StubCLIP(), {}
    image = -torch.ones(3, 8, 8)
    image[0, :, :4] = 1  # left: red
    image[2, :, 4:] = 1  # right: blue
    ones = [Detection(1, (0, 0, 4, 8)), Detection(1, (4, 0, 8, 8))]
    assert detector.name_colours(image, "cat", ones) == ["red", "blue"]
    texts = detector.clip.texts_seen
    assert texts[:3] == ["a photo of a red cat", "a photo of a red-colored cat", "a photo of a red object"]
    assert len(texts) == 3 * len(COLOURS)
    detector.name_colours(image, "cat", ones)
    assert len(detector.clip.texts_seen) == 3 * len(COLOURS)  # encoded once


# ---- models ----


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Random YOLOS with the classes of COCO and CLIP, and the configuration of Mask2Former."""
    folder = tmp_path_factory.mktemp("models")
    labels = {number: NAMES.get(name, name) for number, name in enumerate(["N/A", *CLASSES])}
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    yolos = YolosConfig(image_size=[64, 64], patch_size=16, num_detection_tokens=5, id2label=labels, **size)
    mask2former = {"architectures": ["Mask2FormerForUniversalSegmentation"], "id2label": labels}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        YolosForObjectDetection(yolos).save_pretrained(folder / "yolos")
        write_clip(folder / "clip")
        write_clip(folder / "owlvit")  # for its tokenizer
        own = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        owlvit = OwlViTConfig(
            text_config=own | {"vocab_size": 2000, "max_position_embeddings": 16},
            vision_config=own | {"image_size": 64, "patch_size": 16},
            projection_dim=16,
        )
        OwlViTForObjectDetection(owlvit).save_pretrained(folder / "owlvit")
    processors = {
        "yolos": PROCESSOR | {"image_processor_type": "YolosImageProcessor"},
        "mask2former": PROCESSOR | {"image_processor_type": "Mask2FormerImageProcessor", "size_divisor": 32},
        "owlvit": PROCESSOR
        | {
            "image_processor_type": "OwlViTImageProcessor",
            "size": {"height": 64, "width": 64},
            "crop_size": {"height": 64, "width": 64},
        },
        "clip": PROCESSOR | {"crop_size": {"height": 224, "width": 224}},
    }
    # the model itself needs scipy
    (folder / "mask2former").mkdir()
    (folder / "mask2former/config.json").write_text(json.dumps(mask2former | {"model_type": "mask2former"}))
    for name, processor in processors.items():
        (folder / name / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def with_processor(tiny: Path, name: str) -> ObjectDetector:
    """A detector without its weights."""
    detector = ObjectDetector(f"{tiny}/{name}", str(tiny / "clip"))
    detector.processor = AutoImageProcessor.from_pretrained(tiny / name, backend="pil")
    return detector


def logits(labels: list[int]) -> torch.Tensor:
    """(1, queries, classes and none): certain of these labels."""
    return 50 * F.one_hot(torch.tensor([labels]), len(CLASSES) + 2).float()


def test_outputs_of_a_detector_become_boxes_in_pixels(tiny):
    detector = with_processor(tiny, "yolos")
    outputs = SimpleNamespace(logits=logits([3, 81]), pred_boxes=torch.tensor([[[0.5, 0.25, 0.5, 0.5], [0.5] * 4]]))
    ((label, one),) = detector.with_boxes(outputs, 0.3, (32, 48))  # the other query is none
    assert label == 3
    assert one.box == pytest.approx((12, 0, 36, 16))
    assert one.score == pytest.approx(1)


def test_outputs_of_a_segmentation_become_masks_with_their_boxes(tiny):
    detector = with_processor(tiny, "mask2former")
    assert detector.has_masks
    masks = torch.full((1, 2, 8, 8), -20.0)
    masks[0, 0, :4, 4:] = 20  # top right
    outputs = SimpleNamespace(class_queries_logits=logits([5, 81]), masks_queries_logits=masks)
    ((label, one),) = detector.with_masks(outputs, 0.3, (32, 48))
    assert (label, one.mask.shape) == (5, (32, 48))
    assert one.score == pytest.approx(1, abs=0.05)
    assert one.box == pytest.approx((24, 0, 48, 16), abs=2)  # masks are enlarged smoothly
    assert one.mask[:14, 26:].all()
    assert not one.mask[18:].any()
    assert (
        detector.with_masks(
            SimpleNamespace(**vars(outputs) | {"class_queries_logits": logits([81, 81])}), 0.3, (32, 48)
        )
        == []
    )


def test_a_detector_is_loaded_and_names_classes_as_geneval_does(tiny):
    detector = ObjectDetector(str(tiny / "yolos"), str(tiny / "clip"), threshold=0.0, counting_threshold=0.0)
    detector.load(CPU)
    detections = detector.detect(torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1)
    assert sum(map(len, detections.values())) == 5
    assert set(detections) <= {"N/A", *CLASSES}
    assert not detector.net.training


def test_owl_is_asked_for_the_classes(tiny, monkeypatch):
    detector = ObjectDetector(str(tiny / "owlvit"), str(tiny / "clip"), threshold=0.0, counting_threshold=0.0)
    detector.load(CPU)
    assert detector.queries["input_ids"].shape == (80, 16)
    image = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    detections = detector.detect(image)
    assert sum(map(len, detections.values())) == 16  # one for each patch
    assert set(detections) <= set(CLASSES)

    # the label of a patch is the most similar query
    net = detector.net
    monkeypatch.setattr(type(net), "forward", lambda self, **inputs: SimpleNamespace(
        logits=F.one_hot(torch.full((1, 16), 7), 80).float() * 9, pred_boxes=torch.full((1, 16, 4), 0.25)
    ))  # fmt: skip
    detections = detector.detect(image)
    assert list(detections) == [CLASSES[7]]
    assert detections[CLASSES[7]][0].box == pytest.approx((6, 4, 18, 12))


def test_a_job_is_scored_with_its_tasks_in_any_batch(tiny, tmp_path, monkeypatch):
    chosen = [PROMPTS[0], PROMPTS[1], PROMPTS[90], PROMPTS[91]]
    photos = sampling_job.captions()
    pairs = [(photos[i][0], prompt.text) for i, prompt in enumerate(chosen)]
    job = tmp_path / "images"
    sampling_job.make_job(job, pairs, size=(32, 32), num_steps=(1,), num_samples=2)
    tasks = {prompt.text: prompt.category for prompt in chosen}
    lines = [json.loads(line) for line in (job / "metadata.jsonl").read_text().splitlines()]
    (job / "metadata.jsonl").write_text(
        "".join(json.dumps(line | {"category": tasks[line["prompt"]]}) + "\n" for line in lines)
    )

    # what the detector sees: the first image of each prompt shows all objects, the second one of them
    def detect(self: ObjectDetector, image: torch.Tensor) -> dict:
        prompt = next(shown)
        names = [each["class"] for each in self.prompts[prompt["prompt"]]["include"]]
        return {name: [box(0, 0)] for name in (names if prompt["sample"] == 0 else names[:1])}

    monkeypatch.setattr(ObjectDetector, "detect", detect)
    params = {"model": str(tiny / "yolos"), "clip": str(tiny / "clip")}
    extractors = {"geneval": {"module": "selfe.benchmarks.object_detector.ObjectDetector", "params": params}}
    for batch in (8, 3):
        shown = iter(lines)
        given = {
            "extractors": extractors,
            "metrics": ["scores", "category_mean"],
            "batch_size": batch,
            "bootstrap": 10,
            "feature_dir": str(tmp_path / f"features_{batch}"),
        }
        evaluate.main([str(job), "-", f"evaluation={json.dumps(given)}"])
        evaluation = json.loads((job / "evaluation.json").read_text())
        assert {value["metric"]: value["value"] for value in evaluation["values"]} == {
            "correct": 0.75, "correct/single_object": 1, "correct/two_object": 0.5, "correct/category_mean": 0.75,
        }  # fmt: skip
    record = evaluation["extractors"]["geneval"]
    assert record["scorer"] == "GenEval's rules, not its detector"
    assert record["prompts"] == prompt_sets.sha256(PROMPT_SETS["geneval"].path)


def test_features_are_the_numbers_of_objects(tiny, monkeypatch):
    detector = ObjectDetector(str(tiny / "yolos"), str(tiny / "clip"))
    prompt = next(prompt for prompt in PROMPTS if prompt.category == "counting")
    name, count = prompt.facts["include"][0]["class"], prompt.facts["include"][0]["count"]
    # the threshold of counting leaves out the last one
    objects = {name: [*(box(i, 0) for i in range(count)), box(9, 9, score=0.5)]}
    monkeypatch.setattr(ObjectDetector, "detect", lambda self, image: objects)
    output = detector([torch.zeros(3, 8, 8)], [prompt.text])
    assert output["correct"].tolist() == [1.0]
    assert output["features"].sum() == output["features"][0, CLASSES.index(name)] == count


def test_mistakes_are_one_line(tiny, tmp_path):
    with pytest.raises(UserError, match=r"has no text encoder; params.clip has to be a CLIP model"):
        ObjectDetector(str(tiny / "yolos"), str(tiny / "mask2former"))
    with pytest.raises(UserError, match="id2label has no airplane, a class of GenEval; use a detector for COCO"):
        ObjectDetector(str(tiny / "clip"), str(tiny / "clip"))
    with pytest.raises(UserError, match="nowhere: no such folder"):
        ObjectDetector(str(tmp_path / "nowhere"), str(tiny / "clip"))
    with pytest.raises(ValueError, match="threshold must be between 0 and 1, got 2"):
        ObjectDetector(str(tiny / "yolos"), str(tiny / "clip"), threshold=2)
    detector = ObjectDetector(str(tiny / "yolos"), str(tiny / "clip"))
    with pytest.raises(UserError, match="'a photograph' is not a prompt of GenEval; sample those of selfe benchmark"):
        detector([torch.zeros(3, 8, 8)], ["a photograph"])


def test_names_of_coco_are_those_of_geneval():
    assert set(object_detector.OTHER_NAMES.values()) <= set(CLASSES)
    assert len(CLASSES) == 80
    assert tuple(dict.fromkeys(COLOURS)) == geneval_rules.COLOURS
