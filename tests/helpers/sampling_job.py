"""The folder of a sampling job without sampling: blurred photographs (the fewer steps, the more) with metadata."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageFilter, ImageOps

from selfe.inference import job
from selfe.inference.prompts import Request, SamplingDefaults
from selfe.io import image_encode
from selfe.protocols import Sampler

PHOTOS = Path(__file__).parents[2] / "debug_data/t2i_smoke"


def captions() -> list[tuple[Path, str]]:
    lines = (PHOTOS / "manifest.tsv").read_text().splitlines()
    return [(PHOTOS / file, prompt) for file, prompt in (line.split("\t") for line in lines)]


def make_job(
    folder: Path,
    prompts: Sequence[tuple[Path, str]],
    *,
    size: tuple[int, int] = (64, 64),
    num_steps: tuple[int, ...] = (1, 2, 4, 8, 50),
    weights: tuple = ("ema",),
    num_samples: int = 1,
    blur: float = 1.0,
    sampler: Sampler | None = None,
) -> list[job.ImageSpec]:
    """Images of (photo, prompt), their `metadata.jsonl` and no gallery. Returns the plan."""
    settings = SamplingDefaults(num_steps=num_steps, num_samples=num_samples, height=size[0], width=size[1])
    settings = replace(settings, sampler=sampler or settings.sampler)
    requests = [Request(prompt, settings, "made up") for _, prompt in prompts]
    todo = job.plan(requests, weights, "flat", ".png")
    photos = {prompt: ImageOps.fit(Image.open(path).convert("RGB"), size[::-1]) for path, prompt in prompts}
    lines = []
    for spec in todo:
        image = photos[spec.prompt]
        if spec.sample % 2:
            image = ImageOps.mirror(image)
        radius = blur * size[0] / 16 / spec.num_steps * (1.5 if spec.weights == "live" else 1)
        image = image.filter(ImageFilter.GaussianBlur(radius))
        record = spec.record() | {"step": 700_000, "fingerprint": f"0123456789ab{spec.weights}"}
        image_encode.save(image, folder / spec.file, "png", record)
        line = {"file": spec.file} | record | {"checkpoint": "runs/selfe/checkpoints/step_00700000"}
        lines.append(json.dumps(line) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return todo
