"""The verb `selfe probe-text`: how well a text encoder distinguishes captions.

In few steps the image depends on the caption's code alone: what two codes do not tell apart, no sampler can draw apart
(arXiv 2604.18168). Each line of the prompt file has a caption, the same in other words, and captions with another
meaning, such as swapped attributes or another count. Of the three representations of a caption (the pooled vector, the
mean of its tokens, and its tokens matched one by one) the verb compares the similarities, all cosines.

Distances are relative to that of unrelated captions, so that encoders can be compared: some give all captions nearly
the same direction.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from selfe import compare, config, device
from selfe.errors import UserError
from selfe.io.text_files import check_encoding
from selfe.protocols import TextEncoder

BATCH = 64  # captions encoded together


@dataclass(frozen=True)
class Line:
    """A line of the prompt file."""

    kind: str  # what the other captions change: attributes, count, ...
    caption: str
    same: str  # the same meaning in other words
    others: tuple[str, ...]  # other meanings


def main(options: argparse.Namespace) -> None:
    """Entry point of `selfe probe-text`."""
    lines = read_prompts(options.prompts)
    settings = config.load(options.config, options.overrides)
    part = compare.uncached(settings["system"])["text_encoder"]
    with torch.device("meta"):
        encoder = config.build_part(part, "system.text_encoder")
    encoder.load(device.choose_device(0))

    result = {"config": str(options.config), "prompts": str(options.prompts), "text_encoder": part}
    result |= probe(encoder, lines)
    print(json.dumps(config.plain(result), indent=1, ensure_ascii=False) if options.json else table(result))


def read_prompts(path: Path) -> list[Line]:
    """The lines of a prompt file: kind, caption, same meaning and other meanings, separated by tabs.

    Empty lines and those that start with # are comments.

    Raises:
        UserError: the file is missing, is not UTF-8 text, or a line has fewer than four columns.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such prompt file; examples/probe_prompts.tsv is one")
    check_encoding(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from error

    lines = []
    for number, row in enumerate(text.splitlines(), start=1):
        if not row.strip() or row.startswith("#"):
            continue
        columns = [column.strip() for column in row.split("\t")]
        if len(columns) < 4 or not all(columns):
            raise UserError(
                f"{path}, line {number}: expected kind, caption, the same in other words and at least one other "
                f"meaning, separated by tabs; got {len([c for c in columns if c])} columns with text"
            )
        lines.append(Line(columns[0], columns[1], columns[2], tuple(columns[3:])))
    if len({line.caption for line in lines}) < 2:
        raise UserError(f"{path}: at least two lines with different captions are needed")
    return lines


def probe(encoder: TextEncoder, lines: Sequence[Line]) -> dict:
    """The measurements, by representation and kind of change."""
    captions = list(dict.fromkeys(text for line in lines for text in (line.caption, line.same, *line.others)))
    index = {caption: number for number, caption in enumerate(captions)}
    tokens, pooled = encode(encoder, captions)

    result: dict = {"captions": len(captions), "width": {"tokens": encoder.text_dim, "pooled": encoder.pooled_dim}}
    result["tokens_per_caption"] = sum(map(len, tokens)) / len(tokens)
    result["representations"] = {}
    for name, similarity in similarities(tokens, pooled).items():
        result["representations"][name] = measure(similarity, lines, index, captions)
    return result


@torch.no_grad()
def encode(encoder: TextEncoder, captions: Sequence[str]) -> tuple[list[Tensor], Tensor]:
    """Tokens of each caption (n, d) and pooled vectors (B, d), float32 on the host."""
    tokens, pooled = [], []
    for first in range(0, len(captions), BATCH):
        cond = encoder(captions[first : first + BATCH])
        tokens += [rows.cpu() for rows in cond.text.split()]
        pooled.append(cond.pooled.cpu())
    return tokens, torch.cat(pooled)


def similarities(tokens: Sequence[Tensor], pooled: Tensor) -> dict[str, Tensor]:
    """The similarity of each pair of captions (B, B) in [-1, 1], by representation."""
    means = torch.stack([rows.mean(dim=0) for rows in tokens])
    by_name = {"pooled": cosines(pooled), "mean token": cosines(means), "matched tokens": matched(tokens)}
    if not pooled.any():
        by_name.pop("pooled")  # the encoder has no pooled vector
    return by_name


def cosines(vectors: Tensor) -> Tensor:
    """The cosine of each pair of vectors (B, d)."""
    directions = F.normalize(vectors.double(), dim=1)
    return directions @ directions.T


def matched(tokens: Sequence[Tensor]) -> Tensor:
    """Each token of a caption is compared with the token of the other that is nearest to it; the mean of both ways."""
    lens = [len(rows) for rows in tokens]
    everything = F.normalize(torch.cat(list(tokens)).double(), dim=1)

    one_way = []
    for rows in everything.split(lens):
        by_caption = (rows @ everything.T).split(lens, dim=1)
        nearest = torch.stack([block.amax(dim=1) for block in by_caption], dim=1)
        one_way.append(nearest.mean(dim=0))
    similarity = torch.stack(one_way)
    return (similarity + similarity.T) / 2


def measure(similarity: Tensor, lines: Sequence[Line], index: dict[str, int], captions: Sequence[str]) -> dict:
    """The measurements of one representation: by kind of change, and the distances to nearest neighbours."""
    unit = unrelated_distance(similarity, lines, index)
    by_kind: dict[str, list[dict]] = {}
    for line in lines:
        caption, same = index[line.caption], similarity[index[line.caption], index[line.same]].item()
        for other in line.others:
            distance = 1 - similarity[caption, index[other]].item()
            case = {"caption": line.caption, "other": other, "distance": distance / unit}
            case["margin"] = (distance - (1 - same)) / unit
            by_kind.setdefault(line.kind, []).append(case)

    kinds = {kind: summary(cases) for kind, cases in by_kind.items()}
    kinds["all"] = summary([case for cases in by_kind.values() for case in cases])
    return {"unrelated": 1 - unit, "kinds": kinds, "nearest": nearest(similarity, lines, index, captions, unit)}


def unrelated_distance(similarity: Tensor, lines: Sequence[Line], index: dict[str, int]) -> float:
    """The mean distance of captions of different lines.

    Raises:
        UserError: all captions have the same code.
    """
    anchors = list(dict.fromkeys(index[line.caption] for line in lines))
    among = similarity[anchors][:, anchors]
    count = len(anchors) * (len(anchors) - 1)
    distance = 1 - (among.sum() - among.trace()).item() / count
    if not distance > 1e-9:
        raise UserError("system.text_encoder: all captions have the same code, or codes that are not finite")
    return distance


def summary(cases: Sequence[dict]) -> dict:
    """Of pairs of captions with different meanings: how many are distinguished, and by how much."""
    worst = min(cases, key=lambda case: case["margin"])
    return {
        "pairs": len(cases),
        "right": sum(case["margin"] > 0 for case in cases) / len(cases),
        "margin": sum(case["margin"] for case in cases) / len(cases),
        "distance": sum(case["distance"] for case in cases) / len(cases),
        "worst": worst,
    }


def nearest(
    similarity: Tensor, lines: Sequence[Line], index: dict[str, int], captions: Sequence[str], unit: float
) -> dict:
    """Distances of captions to the nearest one with another meaning."""
    allowed = ~torch.eye(len(captions), dtype=torch.bool)
    for line in lines:
        a, b = index[line.caption], index[line.same]
        allowed[a, b] = allowed[b, a] = False

    values, places = similarity.masked_fill(~allowed, -2).max(dim=1)
    distances = (1 - values) / unit
    least = int(distances.argmin())
    pair = {"caption": captions[least], "other": captions[int(places[least])]}
    return {"median": distances.median().item(), "least": distances[least].item(), **pair}


def table(result: dict) -> str:
    """The measurements as text."""
    lines = [
        f"{result['text_encoder']['module']}: {result['captions']} captions of "
        f"{result['tokens_per_caption']:.1f} tokens on average"
    ]
    for name, measured in result["representations"].items():
        lines += ["", f"{name} (unrelated captions: cosine {measured['unrelated']:.3f})"]
        lines += [f"  {'change':14}{'pairs':>6}{'right':>8}{'margin':>8}{'distance':>10}  worst pair"]
        for kind, row in measured["kinds"].items():
            worst = f"{row['worst']['caption']} | {row['worst']['other']}" if kind != "all" else ""
            numbers = f"{row['pairs']:>6}{row['right']:>8.0%}{row['margin']:>8.3f}{row['distance']:>10.3f}"
            lines.append(f"  {kind:14}{numbers}  {worst}".rstrip())

        near = measured["nearest"]
        lines.append(
            f"  nearest other caption: median {near['median']:.3f}, least {near['least']:.3f} "
            f"({near['caption']} | {near['other']})"
        )
    lines += [
        "",
        "right: the caption is nearer to its paraphrase than to the caption with another meaning",
        "distance: to the other meaning; margin: the same minus the distance to the paraphrase.",
        "Both are 0 for equal codes and 1 for unrelated captions.",
    ]
    return "\n".join(lines)
