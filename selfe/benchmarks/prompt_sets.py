"""The prompt sets of benchmarks: where they come from, under which licence, and how their files are read."""

from __future__ import annotations

import csv
import hashlib
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfe.errors import UserError
from selfe.io import image_encode
from selfe.io.sampling_limits import normal_prompt

SHIPPED = Path(__file__).parent  # licences are beside the files
TIMEOUT = 60  # seconds without an answer after which a download fails


@dataclass(frozen=True)
class Prompt:
    """A prompt of a set."""

    id: str  # by which the scorer identifies it
    text: str
    category: str = ""
    facts: dict[str, Any] = field(default_factory=dict, repr=False)  # what the scorer needs besides the text


@dataclass(frozen=True)
class PromptSet:
    """A set of prompts in a file of its authors' format."""

    name: str
    title: str
    licence: str
    num_prompts: int
    protocol: str  # how many images of which prompts the authors generate
    file: str  # name of the authors' file
    url: str  # of the authors' file, at a fixed commit
    parse: Callable[[Path], list[Prompt]]
    is_shipped: bool = False

    @property
    def path(self) -> Path | None:
        """The file in this package, if its licence allows that."""
        return SHIPPED / f"{self.name}.jsonl" if self.is_shipped else None

    def read(self, path: Path) -> list[Prompt]:
        """The prompts of a file of the authors. Raises UserError if it is another file."""
        try:
            prompts = self.parse(path)
        except FileNotFoundError as error:
            raise UserError(f"{path}: no such file; download {self.url} to it") from error
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise UserError(f"{path}: not {self.file} of {self.title} ({error}); download {self.url}") from error
        if len(prompts) != self.num_prompts:
            raise UserError(
                f"{path}: has {len(prompts)} prompts, but {self.title} has {self.num_prompts}; download {self.url} "
                "again"
            )
        return prompts


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def download(url: str, path: Path) -> None:
    """Raises UserError."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            content = answer.read()
    except (urllib.error.URLError, TimeoutError, ValueError) as error:
        raise UserError(
            f"{url}: cannot be downloaded ({error}); download it on another machine and name the file with --source"
        ) from error
    image_encode.write(path, content)


# ---- files of the authors ----


def lines(path: Path) -> list[dict]:
    """The objects of a JSONL file."""
    texts = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(text) for text in texts if text.strip()]


def geneval(path: Path) -> list[Prompt]:
    prompts = []
    for number, line in enumerate(lines(path)):
        if "include" not in line:
            raise ValueError(f"prompt {number} has no key include")
        prompts.append(Prompt(f"{number:05d}", normal_prompt(line["prompt"]), line["tag"], line))
    return prompts


def geneval2(path: Path) -> list[Prompt]:
    prompts = []
    for number, line in enumerate(lines(path)):
        if len(line["vqa_list"]) != len(line["skills"]):
            raise ValueError(f"prompt {number} has {len(line['vqa_list'])} questions and {len(line['skills'])} skills")
        category = f"{line['atom_count']} atoms"
        prompts.append(Prompt(f"{number:05d}", normal_prompt(line["prompt"]), category, line))
    return prompts


def dpg(path: Path) -> list[Prompt]:
    """A prompt has several rows, one for each question."""
    with path.open(encoding="utf-8", newline="") as file:
        texts = {row["item_id"]: row["text"] for row in csv.DictReader(file)}
    return [Prompt(item, normal_prompt(text)) for item, text in texts.items()]


def parti(path: Path) -> list[Prompt]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))  # quotes are part of a prompt
    return [Prompt(f"{number:05d}", normal_prompt(row["Prompt"]), row["Category"]) for number, row in enumerate(rows)]


GITHUB = "https://raw.githubusercontent.com"
PROMPT_SETS = {
    each.name: each
    for each in (
        PromptSet(
            "geneval",
            "GenEval",
            "MIT",
            553,
            "4 images of each prompt",
            "evaluation_metadata.jsonl",
            f"{GITHUB}/djghosh13/geneval/16f1681160a110fd077309eb04c1e004f951e06d/prompts/evaluation_metadata.jsonl",
            geneval,
            is_shipped=True,
        ),
        PromptSet(
            "geneval2",
            "GenEval 2",
            "CC BY-NC 4.0: not for commercial use",
            800,
            "one image of each prompt",
            "geneval2_data.jsonl",
            f"{GITHUB}/facebookresearch/GenEval2/c088ab7f65a38ce87f2c5d0ae28bf65bd5ba37b0/geneval2_data.jsonl",
            geneval2,
        ),
        PromptSet(
            "dpg",
            "DPG-Bench",
            "see TencentQQGYLab/ELLA",
            1065,
            "4 images of each prompt",
            "dpg_bench.csv",
            f"{GITHUB}/TencentQQGYLab/ELLA/e1c36191243b4bfca8701f7ca3004bd257a32499/dpg_bench/dpg_bench.csv",
            dpg,
        ),
        PromptSet(
            "parti",
            "PartiPrompts",
            "Apache-2.0",
            1632,
            "judged by people, no scorer",
            "PartiPrompts.tsv",
            f"{GITHUB}/google-research/parti/2c99f6652cbc7f0d0441aa91f4c7e7055bcb0071/PartiPrompts.tsv",
            parti,
        ),
    )
}


def opened(prompt_set: PromptSet, source: Path | None) -> tuple[list[Prompt], Path]:
    """The prompts of a set and their file: the one that is given, or that of this package. Raises UserError."""
    path = source or prompt_set.path
    if path is None:
        raise UserError(
            f"{prompt_set.title}: its licence ({prompt_set.licence}) or size does not allow to ship it; name "
            f"{prompt_set.file} with --source, which selfe benchmark prompts {prompt_set.name} downloads"
        )
    return prompt_set.read(path), path


def write_prompts(prompt_set: PromptSet, out: Path, source: Path | None) -> tuple[int, Path]:
    """Write the prompt file of `selfe infer`, download the authors' file beside it if needed. Raises UserError.

    Returns the number of prompts and the authors' file.
    """
    if source is None and not prompt_set.is_shipped:
        source = out.with_name(prompt_set.file)
        if not source.is_file():
            download(prompt_set.url, source)
    prompts, path = opened(prompt_set, source)

    text = []
    for prompt in prompts:
        own = {"prompt": prompt.text} | ({"category": prompt.category} if prompt.category else {})
        # lines of GenEval are sampled from unchanged
        line = prompt.facts if prompt_set.name == "geneval" else own
        text.append(json.dumps(line, ensure_ascii=False) + "\n")
    image_encode.write(out, "".join(text).encode())
    return len(prompts), path
