"""DPG-Bench (arXiv 2403.05135): one file per prompt with up to four images side by side, about which mPLUG is asked."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image

from selfe.benchmarks import scorer
from selfe.benchmarks.prompt_sets import Prompt
from selfe.benchmarks.scorer import Sample
from selfe.errors import UserError
from selfe.evaluation.statistics import Estimate
from selfe.io import image_decode

MOST = 4  # images of a prompt


class DPG:
    """`dpg_bench/compute_dpg_bench.py`."""

    title = "DPG-Bench"
    repository = "https://github.com/TencentQQGYLab/ELLA"
    prompt_set = "dpg"
    variables: ClassVar = {}
    suffix = ".txt"
    setup = ""
    command = (
        "$PYTHON -m accelerate.commands.launch --num_processes ${PROCESSES:-1} "
        '"$SCORER/dpg_bench/compute_dpg_bench.py" --image-root-path "images/$1" '
        '--csv "$SCORER/dpg_bench/dpg_bench.csv" --res-path "results/$1.partial.txt" $2'
    )

    def write(self, folder: Path, samples: Sequence[Sample]) -> str:
        """ITEM.png: images row by row, two in a row. See `Scorer`."""
        height, width = scorer.one_size(samples, self.title)
        if height != width:
            raise UserError(f"{samples[0].path}: DPG-Bench crops squares, the images are {height} x {width}")

        folder.mkdir(parents=True, exist_ok=True)
        counts = set()
        for prompt, group in groupby(samples, key=lambda sample: sample.prompt):
            images = [image_decode.read(sample.path, str(sample.path)) for sample in group]
            counts.add(len(images))
            if len(counts) > 1 or len(images) > MOST:
                raise UserError(
                    f"{samples[0].path.parent}: {prompt.id} has {len(images)} images; DPG-Bench needs the same number "
                    f"of each prompt, at most {MOST}; sample with num_samples={MOST}"
                )

            side = 1 if len(images) == 1 else 2
            grid = Image.new("RGB", (side * width, side * height))
            for place, image in enumerate(images):
                grid.paste(image, (place % 2 * width, place // 2 * height))
            grid.save(folder / f"{prompt.id}.png")
        return f"--resolution {width} --pic-num {counts.pop()}"

    def read(self, path: Path, prompts: Sequence[Prompt], count: int, replicates: int) -> dict[str, Estimate]:
        """Scores in percent: of all prompts, and as the scorer states them of its categories. See `Scorer`."""
        rows, categories, stated, section = {}, {}, math.nan, ""
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.endswith("category scores:"):
                section = line[:2]
            elif match := re.fullmatch(r"\t(.+): ([\d.eE+-]+)", line):
                prefix = "dpg" if section == "L1" else "dpg_detail"
                categories[f"{prefix}/{match[1]}"] = Estimate(float(match[2]))
            elif match := re.fullmatch(r"DPG-Bench score: ([\d.eE+-]+)", line):
                stated = float(match[1])
            elif match := re.fullmatch(r"(.+\.png), (?:[\d.eE+-]+, )+([\d.eE+-]+)", line):
                rows[Path(match[1]).stem] = float(match[2])

        if missing := [prompt.id for prompt in prompts if prompt.id not in rows]:
            # the scorer leaves out files on which it fails
            raise scorer.broken(path, f"has {len(rows)} of {len(prompts)} prompts, {missing[0]} is missing")
        values = 100 * torch.tensor([rows[prompt.id] for prompt in prompts], dtype=torch.float64)
        if not math.isclose(stated, values.mean().item(), rel_tol=1e-6):
            raise scorer.broken(path, f"states the score {stated}, but its rows have {values.mean().item()}")
        return {"dpg": scorer.bootstrap_of(list(rows), replicates).mean(values)} | categories
