"""GenEval 2 (arXiv 2512.16853): a vision-language model answers questions about one image of each prompt."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch

from selfe.benchmarks import scorer
from selfe.benchmarks.prompt_sets import Prompt
from selfe.benchmarks.scorer import Sample
from selfe.evaluation.statistics import Estimate
from selfe.io import image_encode


class GenEval2:
    """`evaluation.py`: Soft-TIFA, the probabilities of the right answers."""

    title = "GenEval 2"
    repository = "https://github.com/facebookresearch/GenEval2"
    prompt_set = "geneval2"
    variables: ClassVar = {}
    suffix = ".json"
    setup = ""
    command = (
        '$PYTHON "$SCORER/evaluation.py" --benchmark_data "images/$1/geneval2_data.jsonl" '
        '--image_filepath_data "images/$1/images.json" --method soft_tifa_gm --output_file "results/$1.partial.json"'
    )

    def write(self, folder: Path, samples: Sequence[Sample]) -> str:
        """The file of the first image of each prompt, and the benchmark's lines of these prompts. See `Scorer`."""
        first = [sample for sample in samples if sample.number == 0]
        # by the text of the benchmark, which may have spaces around it
        images = {sample.prompt.facts["prompt"]: str(sample.path.absolute()) for sample in first}
        data = "".join(json.dumps(sample.prompt.facts, ensure_ascii=False) + "\n" for sample in first)
        image_encode.write(folder / "images.json", json.dumps(images, ensure_ascii=False, indent=1).encode())
        image_encode.write(folder / "geneval2_data.jsonl", data.encode())
        return ""

    def read(self, path: Path, prompts: Sequence[Prompt], count: int, replicates: int) -> dict[str, Estimate]:
        """Soft-TIFA in percent: arithmetic means, also by skill, geometric means, also by atomicity. See `Scorer`."""
        try:
            scores = [[float(score) for score in row] for row in json.loads(path.read_text(encoding="utf-8"))]
        except (ValueError, TypeError) as error:
            raise scorer.broken(path, f"not a result of GenEval 2 ({error})") from error
        if len(scores) != len(prompts):
            raise scorer.broken(path, f"has {len(scores)} of {len(prompts)} prompts")

        by_skill: dict[str, list[tuple[str, float]]] = {}
        by_atoms: dict[int, list[tuple[str, float]]] = {}
        means, geometric = [], []
        for prompt, row in zip(prompts, scores, strict=True):
            skills = prompt.facts["skills"]
            if len(row) != len(skills):
                raise scorer.broken(path, f"has {len(row)} of {len(skills)} answers on prompt {prompt.id}")
            for skill, score in zip(skills, row, strict=True):
                by_skill.setdefault(skill, []).append((prompt.id, score))
            means.append((prompt.id, sum(row) / len(row)))
            geometric.append((prompt.id, geometric_mean(row)))
            by_atoms.setdefault(int(prompt.facts["atom_count"]), []).append(geometric[-1])

        def percent(pairs: Sequence[tuple[str, float]]) -> Estimate:
            values = 100 * torch.tensor([value for _, value in pairs], dtype=torch.float64)
            return scorer.bootstrap_of([group for group, _ in pairs], replicates).mean(values)

        return {
            "soft_tifa_gm": percent(geometric),
            "soft_tifa_am": percent(means),
            **{f"soft_tifa_am/{skill}": percent(pairs) for skill, pairs in sorted(by_skill.items())},
            **{f"soft_tifa_gm/{atoms} atoms": percent(pairs) for atoms, pairs in sorted(by_atoms.items())},
        }


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values)) if min(values) > 0 else 0.0
