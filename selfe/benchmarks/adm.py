"""The evaluator of ADM (openai/guided-diffusion), by which ImageNet models are compared: one array of all images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from selfe.benchmarks import scorer
from selfe.benchmarks.prompt_sets import Prompt
from selfe.benchmarks.scorer import Sample
from selfe.evaluation.statistics import Estimate
from selfe.io import image_encode

NAMES = {
    "Inception Score": "inception_score",
    "FID": "fid",
    "sFID": "sfid",
    "Precision": "precision",
    "Recall": "recall",
}


class ADM:
    """`evaluations/evaluator.py`, on 50,000 images in papers."""

    title = "the evaluator of ADM"
    repository = "https://github.com/openai/guided-diffusion"
    prompt_set = None
    variables: ClassVar = {"REFERENCE": "a reference batch, such as VIRTUAL_imagenet256_labeled.npz"}
    suffix = ".txt"
    setup = 'same reference.txt "$(sha256sum "$REFERENCE" | cut -d" " -f1)" "the reference batch"'
    command = (
        '$PYTHON "$SCORER/evaluations/evaluator.py" "$REFERENCE" "images/$1/samples.npz" > "results/$1.partial.txt"'
    )

    def write(self, folder: Path, samples: Sequence[Sample]) -> str:
        """samples.npz: `arr_0`, uint8 (N, height, width, 3). See `Scorer`."""
        scorer.one_size(samples, self.title)
        folder.mkdir(parents=True, exist_ok=True)
        image_encode.save_npz([sample.path for sample in samples], folder / "samples.npz")
        return ""

    def read(self, path: Path, prompts: Sequence[Prompt], count: int, replicates: int) -> dict[str, Estimate]:
        """The five numbers that the evaluator prints. See `Scorer`."""
        text = path.read_text(encoding="utf-8", errors="replace")
        values = {}
        for printed, name in NAMES.items():
            match = re.search(rf"^{printed}: ([\d.eE+-]+)\s*$", text, re.MULTILINE)
            if match is None:
                raise scorer.broken(path, f"has no line {printed}")
            values[name] = Estimate(float(match[1]))
        return values
