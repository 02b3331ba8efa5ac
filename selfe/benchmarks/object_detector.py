"""GenEval without mmdet: its rules with a detector of Hugging Face. The numbers are not those of GenEval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    AutoModelForUniversalSegmentation,
    AutoModelForZeroShotObjectDetection,
    AutoTokenizer,
)

from selfe.benchmarks import geneval_rules, prompt_sets
from selfe.benchmarks.geneval_rules import COLOURS, COUNTING, Detection
from selfe.benchmarks.prompt_sets import PROMPT_SETS
from selfe.device import to_device
from selfe.encoders.hf_folder import sha256
from selfe.encoders.pretrained_tokenizer import plain_errors
from selfe.errors import UserError
from selfe.evaluation.hf_extractor import HFExtractor, read_model
from selfe.io import image_encode
from selfe.io.model_folder import find_model, model_name
from selfe.io.safetensors_files import read_json, shards
from selfe.types import check_range

KEY = "evaluation.extractors.NAME.params.model"
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
OPEN = ("owlvit", "owlv2")  # model types that detect what a text names
QUERY = "a photo of a {name}"  # as they were trained
QUERY_LENGTH = 16  # tokens
GREY = 153  # of pixels outside of an object's mask
# names of classes in detectors for COCO -> those of GenEval
OTHER_NAMES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "hair dryer": "hair drier",
}


class ObjectDetector:
    """An extractor whose score `correct` is whether an image shows the objects of its prompt, one of GenEval.

    The detector names the classes of COCO: RT-DETR, DETR, YOLOS, or Mask2Former and its kind, whose masks then cut out
    the objects before CLIP names their colours, as in GenEval. Or it is OWL-ViT or OWLv2, which are asked for the names
    of the classes, and need a `max_overlap` because they detect an object several times. The features are the numbers
    of objects of each class. Images are detected one by one, so that the batch does not matter.
    """

    has_texts = False
    scores_only = True  # numbers of objects are no features for distances, and real images have other captions

    def __init__(
        self,
        model: str,
        clip: str,
        cache_dir: Path | None = None,
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        most_objects: int = 16,
        max_overlap: float = 1.0,
    ):
        """
        Args:
            model: folder of a detector (absolute, or starting with `.` or `~`), or a name of the Hub below `cache_dir`.
            clip: the same, of a CLIP model, which names colours.
            cache_dir: the folder of all pretrained models, SELFE_CACHE_DIR.
            threshold: score above which an object counts; that of GenEval suits its Mask2Former.
            counting_threshold: the same for prompts of the task counting.
            most_objects: objects of a class that are looked at, the most confident ones.
            max_overlap: intersection over union above which two objects of a class are one; 1: none are.
        """
        shares = {"threshold": threshold, "counting_threshold": counting_threshold, "max_overlap": max_overlap}
        for name, value in shares.items():
            check_range(name, value, 0, 1)
        check_range("most_objects", most_objects, 1, 1000)
        self.folder = find_model(model, cache_dir, KEY, f"download {model} from the Hub to it")
        self.model, self.most_objects, self.max_overlap = model, most_objects, max_overlap
        self.thresholds = {"threshold": threshold, "counting_threshold": counting_threshold}
        self.advice = f"download all files of {model} again"
        self.clip = HFExtractor(clip, cache_dir)
        if not self.clip.has_texts:
            raise UserError(f"{self.clip.folder}: has no text encoder; params.clip has to be a CLIP model")

        described = read_json(self.folder / "config.json", self.advice)
        self.has_masks = str(described.get("architectures", [""])[0]).endswith("ForUniversalSegmentation")
        self.is_open = described.get("model_type") in OPEN
        prompts, self.prompt_file = prompt_sets.opened(PROMPT_SETS["geneval"], None)
        self.prompts = {prompt.text: prompt.facts for prompt in prompts}
        wanted = {each["class"] for facts in self.prompts.values() for each in facts["include"]}
        self.names = sorted(wanted)
        labels = dict(enumerate(self.names)) if self.is_open else described.get("id2label", {})
        self.classes = {int(label): OTHER_NAMES.get(name, name) for label, name in labels.items()}
        if missing := sorted(wanted - set(self.classes.values())):
            raise UserError(
                f"{self.folder}/config.json: id2label has no {missing[0]}, a class of GenEval; use a detector for COCO"
            )

    def record(self) -> dict[str, Any]:
        """See `Extractor`."""
        return self.thresholds | {
            "scorer": "GenEval's rules, not its detector",
            "model": model_name(self.model),
            "weights": [sha256(file) for file in shards(self.folder, self.advice)],
            "clip": self.clip.record(),
            "most_objects": self.most_objects,
            "max_overlap": self.max_overlap,
            "prompts": prompt_sets.sha256(self.prompt_file),
        }

    def load(self, device: torch.device) -> None:
        """Read both models. Raises UserError if a file is missing or does not fit."""
        auto = AutoModelForUniversalSegmentation if self.has_masks else AutoModelForObjectDetection
        if self.is_open:
            auto = AutoModelForZeroShotObjectDetection
        self.net = read_model(auto, self.folder, self.advice).to(device)
        with plain_errors(self.folder, self.advice):
            # the Pillow backend, which is always there: the other one resizes differently
            options = {"local_files_only": True, "trust_remote_code": False}
            self.processor = AutoImageProcessor.from_pretrained(self.folder, backend="pil", **options)
            tokenizer = AutoTokenizer.from_pretrained(self.folder, **options) if self.is_open else None
        self.queries: dict[str, Tensor] = {}
        if tokenizer is not None:
            texts = [QUERY.format(name=name) for name in self.names]
            padded = {"padding": "max_length", "max_length": QUERY_LENGTH, "truncation": True}
            tokens = tokenizer(texts, return_tensors="pt", **padded)
            self.queries = {name: to_device(tokens[name], device) for name in ("input_ids", "attention_mask")}
        self.clip.load(device)
        self.device = device
        self.colours: dict[str, Tensor] = {}

    def __call__(self, images: Sequence[Tensor], captions: Sequence[str]) -> dict[str, Tensor]:
        """See `Extractor`. Raises UserError for a caption that is no prompt of GenEval."""
        counts, correct = [], []
        for image, caption in zip(images, captions, strict=True):
            if caption not in self.prompts:
                raise UserError(
                    f"{caption[:60]!r} is not a prompt of GenEval; sample those of selfe benchmark prompts geneval"
                )
            prompt = self.prompts[caption]
            name = "counting_threshold" if prompt["tag"] == COUNTING else "threshold"
            detections = self.detect(image)
            objects = geneval_rules.kept(detections, self.thresholds[name], self.most_objects, self.max_overlap)

            def colours_of(name: str, ones: Sequence[Detection], image: Tensor = image) -> list[str]:
                return self.name_colours(image, name, ones)

            correct.append(float(geneval_rules.is_correct(prompt, objects, colours_of)))
            counts.append([float(len(objects.get(name, ()))) for name in self.names])
        return {"features": torch.tensor(counts), "correct": torch.tensor(correct)}

    def detect(self, image: Tensor) -> dict[str, list[Detection]]:
        """All objects of an image (3, H, W) in [-1, 1], by class."""
        inputs = self.processor(images=[image_encode.to_image(image)], return_tensors="pt")
        on_device = {name: to_device(values, self.device) for name, values in inputs.items()}
        outputs = self.net(**on_device, **self.queries)
        lowest, size = min(self.thresholds.values()), tuple(image.shape[1:])
        read = self.with_masks if self.has_masks else self.with_boxes
        detections: dict[str, list[Detection]] = {}
        for label, detection in read(outputs, lowest, size):
            if label in self.classes:
                detections.setdefault(self.classes[label], []).append(detection)
        return detections

    def with_boxes(self, outputs: Any, lowest: float, size: tuple[int, int]) -> list[tuple[int, Detection]]:
        (result,) = self.processor.post_process_object_detection(outputs, threshold=lowest, target_sizes=[size])
        rows = zip(result["labels"].tolist(), result["scores"].tolist(), result["boxes"].tolist(), strict=True)
        return [(label, Detection(score, tuple(box))) for label, score, box in rows]

    def with_masks(self, outputs: Any, lowest: float, size: tuple[int, int]) -> list[tuple[int, Detection]]:
        (result,) = self.processor.post_process_instance_segmentation(
            outputs, threshold=lowest, target_sizes=[size], return_binary_maps=True
        )
        detections = []
        for segment, plane in zip(result["segments_info"], result["segmentation"], strict=False):
            mask = plane.bool().cpu()
            rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
            box = tuple(float(edge) for edge in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
            detections.append((segment["label_id"], Detection(segment["score"], box, mask)))
        return detections

    # ---- colours ----

    def name_colours(self, image: Tensor, name: str, ones: Sequence[Detection]) -> list[str]:
        """The colour of each object of a class, by CLIP on its part of the image."""
        embeddings = self.clip([cut_out(image, one) for one in ones], [""] * len(ones))["aligned"]
        similarities = F.normalize(embeddings, dim=1) @ self.colour_texts(name).T
        return [COLOURS[number] for number in similarities.argmax(dim=1).tolist()]

    def colour_texts(self, name: str) -> Tensor:
        """(colours, e): the mean embedding of several captions of each colour."""
        if name not in self.colours:
            texts = [template.format(colour=colour, name=name) for colour in COLOURS for template in TEMPLATES]
            embeddings = F.normalize(self.clip.texts(texts), dim=1).unflatten(0, (len(COLOURS), len(TEMPLATES)))
            self.colours[name] = F.normalize(embeddings.mean(dim=1), dim=1)
        return self.colours[name]


def cut_out(image: Tensor, detection: Detection) -> Tensor:
    """The box of an object (3, h, w), grey outside of its mask, of an image (3, H, W) in [-1, 1]."""
    if detection.mask is not None:
        grey = torch.full_like(image, GREY / 127.5 - 1)
        image = torch.where(to_device(detection.mask, image.device), image, grey)
    height, width = image.shape[1:]
    left, top, right, bottom = (round(edge) for edge in detection.box)
    left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
    return image[:, top : max(bottom, top + 1), left : max(right, left + 1)]
