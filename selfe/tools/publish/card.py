"""The model card of a run, written from its records: nothing in it is made up, and what is not known is named."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from selfe import config, log
from selfe.checkpoint import adapter, verify
from selfe.evaluation import tables
from selfe.evaluation.results import Evaluation

# licences of pretrained parts, by the class that loads them
FLUX = "FLUX.1 [dev] Non-Commercial License (black-forest-labs/FLUX.1-dev)"
LICENCES = {
    "selfe.encoders.t5_clip.T5Clip": (
        "T5-XXL: Apache-2.0 (google/t5-v1_1-xxl); CLIP ViT-L/14: see openai/clip-vit-large-patch14"
    ),
    "selfe.encoders.flux_vae.FluxVAE": f"VAE: {FLUX}",
}
CURVE_POINTS = 6  # rows of the table of losses


def open_questions(facts: dict[str, Any]) -> list[str]:
    """What only the author can say, a line each."""
    questions = []
    if facts["license"] is None:
        questions.append("no licence is chosen; --push needs --license")
    if facts["data_statement"] is None:
        questions.append("the card has no description of the data; write one and pass it by --data-statement")
    if facts["format"] == "diffusers":
        questions.append("the folder holds encoders and VAE; their licences, named in the card, apply to them")
    return questions


def write(
    run: Path,
    checkpoint: Path,
    settings: dict,
    facts: dict[str, Any],
    lines: Sequence[dict],
    evaluations: Sequence[Evaluation],
    folder: Path,
) -> str:
    """The text of README.md.

    Args:
        settings: those of the run.
        facts: repository, weights, dtype, format, licence and data statement.
        lines: those of metrics.jsonl up to the checkpoint.
        folder: with the files that the card shows.
    """
    repo = facts["to"]
    head = {"pipeline_tag": "text-to-image", "tags": ["selfe", "any-step"]}
    if facts["license"] is not None:
        head["license"] = facts["license"]
    if facts["format"] == "diffusers":
        head["library_name"] = "diffusers"

    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# {repo.partition('/')[2]}\n",
        "A text-to-image model that samples in any number of steps, trained with selfe: the Self-Evaluating Model "
        "([arXiv 2512.22374](https://arxiv.org/abs/2512.22374)).\n",
    ]
    if (folder / "samples.png").is_file():
        parts.append("![Samples by number of sampling steps](samples.png)\n\n*A sample grid of the run.*\n")
    parts += ["## Use\n", usage(facts), "## Training\n", training(run, checkpoint, settings)]
    if (folder / "curves.png").is_file():
        parts += ["![Loss over the steps](curves.png)\n", losses(lines)]

    parts += ["## Data\n", data(settings, facts["data_statement"]), "## Licences\n", licences(settings, facts)]
    if evaluations:
        parts += ["## Evaluation\n", *(tables.markdown([evaluation]) for evaluation in evaluations)]
        parts.append("The records of these numbers, with what they were measured on, are in `evaluations/`.\n")
    return "\n".join(parts)


def usage(facts: dict[str, Any]) -> str:
    repo = facts["to"]
    name = repo.partition("/")[2]
    if facts["format"] == "diffusers":
        return (
            "```python\nfrom diffusers import DiffusionPipeline\n\n"
            f'pipe = DiffusionPipeline.from_pretrained("{repo}", custom_pipeline="{repo}", trust_remote_code=True)\n'
            'pipe("a red bird on a branch", num_inference_steps=4).images[0].save("bird.png")\n```\n'
        )
    return (
        "The folder holds the denoiser; the encoders are read from `SELFE_CACHE_DIR`.\n\n"
        f"```bash\nhf download {repo} --local-dir {name}\n"
        f"./infer.sh {name}/config.yaml 'inferencer.prompts=[\"a red bird on a branch\"]'\n```\n"
    )


def training(run: Path, checkpoint: Path, settings: dict) -> str:
    """Facts of the run as a table, and its commands."""
    marker = verify.read_marker(checkpoint)
    with torch.device("meta"):
        net = config.build(settings, "system").backbone
    trainer, system = settings["trainer"], settings["system"]

    rows = {
        "parameters of the denoiser": f"{sum(p.numel() for p in net.parameters()):,}",
        "objective": f"`{system['objective']['module']}`",
        "steps": f"{marker['step']:,} of {trainer['max_steps']:,}",
        "images seen": f"{marker['samples']:,}",
        "time of training": log.duration(marker["elapsed"]),
        "processes": str(marker["processes"]),
        "precision": str(trainer.get("precision", "auto")),
    }
    if record := adapter.read_record(checkpoint):
        rank = "" if record.rank is None else f", low-rank matrices of rank {record.rank}"
        rows["fine-tuned from"] = f"{Path(record.base).parent.parent.name}/{Path(record.base).name}{rank}"
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join([*table, "", "The complete config is `training.yaml`.", "", *commands(run)]) + "\n"


def commands(run: Path) -> list[str]:
    """The commands of all starts of the run, without the folders of the machine."""
    path = run / "starts.jsonl"
    starts = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    lines = []
    for start in starts:
        _, *arguments = [short(argument) for argument in start["command"]]
        if arguments:
            command, *overrides = arguments
            lines.append(shlex.join(["./run.sh", command, str(start["processes"]), *overrides]))
    if not lines:
        return []
    last = starts[-1]
    version = f"selfe {last['version']}" + (f", revision `{last['revision']}`" if last.get("revision") else "")
    return [f"Commands of its starts ({version}):", "", "```bash", *dict.fromkeys(lines), "```"]


def short(argument: str) -> str:
    """An argument in which an absolute path, also behind `key=`, is reduced to its last part."""
    key, equals, value = argument.rpartition("=")
    return f"{key}{equals}{Path(value).name}" if value.startswith(("/", "~")) else argument


def losses(lines: Sequence[dict]) -> str:
    """Losses at some steps, evenly spaced, as a table."""
    names = [name for name in ("train/loss", "val_plain/loss") if any(line.get(name) is not None for line in lines)]
    known = [line for line in lines if any(line.get(name) is not None for name in names)]
    count = min(CURVE_POINTS, len(known))
    chosen = [known[round(i * (len(known) - 1) / max(count - 1, 1))] for i in range(count)]

    rows = ["| step | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for line in chosen:
        values = ["" if line.get(name) is None else f"{line[name]:.4f}" for name in names]
        rows.append(f"| {line['step']:,} | {' | '.join(values)} |")
    return "\n".join(rows) + "\n"


def data(settings: dict, statement: str | None) -> str:
    """The author's statement, and what the config records."""
    part = settings["data"]
    while "source" in part["params"]:
        part = part["params"]["source"]
    train = part["params"].get("train_manifest")
    entries = train if isinstance(train, list) else [{"manifest": train}] if train else []
    names = ", ".join(f"`{Path(str(entry['manifest'])).name}`" for entry in entries)
    recorded = f"Read by `{part['module']}`" + (f" from {names}." if names else ".")
    return f"{statement or 'The author has not described the data.'}\n\n{recorded}\n"


def licences(settings: dict, facts: dict[str, Any]) -> str:
    """Of the model, and of the pretrained parts that it was trained with."""
    lines = [f"- this model: {facts['license'] or 'not chosen yet'}"]
    for name in ("text_encoder", "autoencoder"):
        for _, part in config.pretrained_parts(settings["system"][name], name):
            model = part["params"].get("model")
            named = LICENCES.get(part["module"])
            lines.append(
                f"- {named}" if named else f"- {Path(str(model)).name or part['module']}: see its own model card"
            )
    return "\n".join(lines) + "\n"
