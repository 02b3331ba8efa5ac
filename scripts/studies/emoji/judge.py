"""The judge of the emoji study: a small network, trained on the real images, that names emoji and drawing style.

    .venv/bin/python scripts/studies/emoji/judge.py           train it, write judge.safetensors and judge.json
    .venv/bin/python scripts/studies/emoji/judge.py --keep    measure the one of this repository, write judge.json

It is trained on all real images, held-out ones included: it judges, it does not compete. Noise, blur, small shifts and
changes of colour in its training keep it from recognising images by details of their rendering.
"""

from __future__ import annotations

import argparse
import json
import math
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from selfe.data.shards import ShardData
from selfe.errors import UserError
from selfe.log import Progress
from selfe.types import signed

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
WEIGHTS = HERE / "judge.safetensors"
SIDE = 32  # pixels
STYLES = ("noto", "twemoji", "fluent flat", "openmoji")
SPLITS = {"train": "train-*.tar", "held_out_pairs": "held_out_pairs.tar", "held_out_concepts": "held_out_concepts.tar"}
FEATURES, EMBEDDING = 160, 96  # channels
SCALE = 24.0  # of the cosine similarities, before the softmax over all emoji


@dataclass(frozen=True)
class Images:
    """Images (n, 3, 32, 32) in [-1, 1] with captions, and the indices (n,) of their emoji and styles."""

    pixels: Tensor
    captions: tuple[str, ...]
    concepts: Tensor
    styles: Tensor

    def __len__(self) -> int:
        return len(self.captions)

    def select(self, rows: Tensor) -> Images:
        """The images of these rows (m,)."""
        captions = tuple(self.captions[row] for row in rows.tolist())
        return Images(self.pixels[rows], captions, self.concepts[rows], self.styles[rows])


def joined(sets: Iterable[Images]) -> Images:
    """The images of several sets, one after another."""
    sets = list(sets)
    return Images(
        torch.cat([images.pixels for images in sets]),
        tuple(caption for images in sets for caption in images.captions),
        torch.cat([images.concepts for images in sets]),
        torch.cat([images.styles for images in sets]),
    )


def unpack(folder: Path) -> None:
    """Unpack the shards of debug_data/emoji into `folder`, unless they are there."""
    if not all(list(folder.glob(pattern)) for pattern in SPLITS.values()):
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(ROOT / "debug_data/emoji/shards.tar.xz") as archive:
            archive.extractall(folder, filter="data")


def labels() -> list[str]:
    """The labels of all emoji. Their places are the classes of the judge."""
    lines = (ROOT / "debug_data/emoji/index.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["label"] for line in lines]


def parse(caption: str) -> tuple[str, str]:
    """A caption "fox, twemoji" -> its label and its style."""
    label, _, style = caption.rpartition(", ")
    return label, style


def shards(folder: Path, split: str) -> list[Path]:
    """The unpacked shards of a split. Raises UserError if there are none."""
    files = sorted(folder.glob(SPLITS[split]))
    if not files:
        raise UserError(f"{folder}: has no {SPLITS[split]}; unpack the emoji as configs/emoji/base.yaml describes")
    return files


def real_images(folder: Path, split: str) -> Images:
    """All images of a split, as training reads them."""
    files = folder / SPLITS[split]
    data = ShardData(files, val_manifest=files, pixels=SIDE * SIDE, multiple=4)
    everything = range(data.num_images)
    batch = data.batch(0, 0, everything, everything, "val")

    classes = {label: number for number, label in enumerate(labels())}
    parsed = [parse(caption) for caption in batch.prompts]
    return Images(
        signed(torch.stack(batch.images)),
        batch.prompts,
        torch.tensor([classes[label] for label, _ in parsed]),
        torch.tensor([STYLES.index(style) for _, style in parsed]),
    )


def convolutions(widths: Sequence[int]) -> nn.Sequential:
    """Two convolutions per width, at half the resolution of the previous width."""
    layers: list[nn.Module] = []
    for before, width in zip((3, *widths), widths, strict=False):
        layers += [nn.MaxPool2d(2)] if layers else []
        for channels in (before, width):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers)


class ConceptNet(nn.Module):
    """Images (B, 3, 32, 32) -> features (B, 160), unit embeddings (B, 96) to compare with those of all emoji."""

    def __init__(self, num_concepts: int):
        super().__init__()
        self.trunk = convolutions((16, 48, 96, FEATURES))
        self.embed = nn.Linear(FEATURES * 16, EMBEDDING, bias=False)  # of a 4 x 4 grid, so that positions count
        self.concepts = nn.Parameter(torch.randn(num_concepts, EMBEDDING))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        grid = self.trunk(images)
        return grid.mean(dim=(2, 3)), F.normalize(self.embed(grid.flatten(1)), dim=1)

    def similarities(self, embeddings: Tensor) -> Tensor:
        """Cosine similarities (B, C) with all emoji."""
        return embeddings @ F.normalize(self.concepts, dim=1).T


class StyleNet(nn.Module):
    """Images (B, 3, 32, 32) -> logits of the styles (B, 4). Styles differ in lines and shading, at any place."""

    def __init__(self):
        super().__init__()
        self.trunk = convolutions((32, 48, 64))
        self.out = nn.Linear(2 * 64, len(STYLES))

    def forward(self, images: Tensor) -> Tensor:
        grid = self.trunk(images)
        return self.out(torch.cat([grid.mean(dim=(2, 3)), grid.amax(dim=(2, 3))], dim=1))


class Judge(nn.Module):
    """The two networks."""

    def __init__(self):
        super().__init__()
        self.concept, self.style = ConceptNet(len(labels())), StyleNet()


def distorted(images: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Images (B, 3, 32, 32), each scaled, shifted, rotated, recoloured, blurred and with noise, all slightly."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(images), *shape, generator=generator)

    # geometry; outside of the image is white
    angle, scale = uniform(-0.12, 0.12), uniform(0.85, 1.2)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    shift = uniform(-0.12, 0.12, 2)
    matrix = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    images = F.grid_sample(images - 1, grid, align_corners=False) + 1

    # colour
    recoloured = images * uniform(0.85, 1.1, 1, 1, 1) + uniform(-0.08, 0.08, 3, 1, 1)
    images = torch.lerp(images, recoloured, strength)

    # half of the images blurred, half with noise; both hide the lines and shades of a style
    kernel = torch.tensor([0.25, 0.5, 0.25])
    kernel = (kernel[:, None] * kernel)[None, None].expand(3, 1, 3, 3)
    blurred = F.conv2d(F.pad(images, (1, 1, 1, 1), "replicate"), kernel, groups=3)
    images = torch.where(uniform(0, 1, 1, 1, 1) < 0.5 * strength, blurred, images)
    noise = strength * uniform(-0.2, 0.2, 1, 1, 1).clamp_min(0)
    return images + noise * torch.randn(images.shape, generator=generator)


def train(
    net: nn.Module, images: Images, loss: Callable[[Tensor, Tensor], Tensor], strength: float, steps: int
) -> None:
    """Train a network on all images by `loss`, of distorted images (B, 3, 32, 32) and their numbers (B,)."""
    generator, batch, lr = torch.Generator().manual_seed(0), 128, 2e-3
    net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    progress = Progress(type(net).__name__, steps)

    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(images), generator=generator)
        rows, order = order[:batch], order[batch:]

        inputs = distorted(images.pixels[rows], generator, strength).contiguous(memory_format=torch.channels_last)
        value = loss(inputs, rows)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        progress.advance(1, f"loss {value.item():.4f}")
    progress.close()


def trained(images: Images, steps: int, style_steps: int) -> Judge:
    """A judge of these images."""
    torch.manual_seed(0)
    judge = Judge()

    def concept_loss(inputs: Tensor, rows: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            _, embeddings = judge.concept(inputs)
        logits = SCALE * judge.concept.similarities(embeddings.float())
        return F.cross_entropy(logits, images.concepts[rows])

    def style_loss(inputs: Tensor, rows: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = judge.style(inputs)
        return F.cross_entropy(logits.float(), images.styles[rows])

    train(judge.concept, images, concept_loss, 1.0, steps)
    train(judge.style, images, style_loss, 0.25, style_steps)
    return judge.eval().requires_grad_(False)


def load() -> Judge:
    """The judge of this repository."""
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()}, strict=False)
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def score(judge: Judge, pixels: Tensor, concepts: Tensor, styles: Tensor) -> dict[str, Tensor]:
    """Per image (n,): whether the emoji asked for comes first, or among the first five, of all; whether the style is
    the one asked for; `both`, whether emoji (first) and style are. `features` (n, 160) are for Frechet distances.
    """
    features, ranks, right = [], [], []
    for part, wanted, style in zip(pixels.split(256), concepts.split(256), styles.split(256), strict=True):
        feature, embeddings = judge.concept(part.clamp(-1, 1))
        similarities = judge.concept.similarities(embeddings)
        own = similarities.gather(1, wanted[:, None])
        features.append(feature)
        ranks.append((similarities > own).sum(dim=1))
        right.append(judge.style(part.clamp(-1, 1)).argmax(dim=1) == style)
    rank, style = torch.cat(ranks), torch.cat(right)
    shares = {"concept@1": rank < 1, "concept@5": rank < 5, "style": style, "both": (rank < 1) & style}
    return shares | {"features": torch.cat(features)}


def nearest(images: Tensor, trained: Tensor) -> Tensor:
    """Per image (n,): the root mean square difference of its pixels to the most similar training image."""
    trained = trained.flatten(1)
    squares = trained.square().sum(dim=1)
    distances = []
    for part in images.clamp(-1, 1).flatten(1).split(256):
        square = part.square().sum(dim=1, keepdim=True) - 2 * part @ trained.T + squares
        distances.append((square.amin(dim=1).clamp_min(0) / trained.shape[1]).sqrt())
    return torch.cat(distances)


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Images (B, 3, H, W) after a Gaussian blur of `sigma` pixels."""
    places = torch.arange(-3 * math.ceil(sigma), 3 * math.ceil(sigma) + 1)
    kernel = torch.exp(-(places**2) / (2 * sigma**2))
    kernel = (kernel[:, None] * kernel / kernel.sum() ** 2)[None, None].expand(3, 1, -1, -1)
    return F.conv2d(F.pad(images, (len(places) // 2,) * 4, "replicate"), kernel, groups=3)


def means_of_styles(images: Images) -> Images:
    """One image for each emoji that has at least three: their mean. It counts as the style of the first."""
    means, firsts = [], []
    for concept in images.concepts.unique():
        rows = (images.concepts == concept).nonzero()[:, 0]
        if len(rows) >= 3:
            means.append(images.pixels[rows].mean(dim=0))
            firsts.append(rows[0])
    return replace(images.select(torch.stack(firsts)), pixels=torch.stack(means))


def measured(judge: Judge, splits: Mapping[str, Images]) -> dict[str, dict[str, float]]:
    """The shares of `score` for real images, for damaged ones, and by chance."""
    concepts, styles = len(labels()), len(STYLES)
    chance = {"concept@1": 1 / concepts, "concept@5": 5 / concepts, "style": 1 / styles, "both": 1 / concepts / styles}
    result = {"chance": chance}

    generator = torch.Generator().manual_seed(1)
    train = splits["train"]
    sets = {f"{split}, real": images for split, images in splits.items()}
    sets |= {
        f"{split}, distorted": replace(images, pixels=distorted(images.pixels, generator))
        for split, images in splits.items()
    }
    sets |= {f"train, blur of {s} pixels": replace(train, pixels=blurred(train.pixels, s)) for s in (1, 1.5, 2, 3)}
    sets["train, mean of the styles of an emoji"] = means_of_styles(train)
    for name, images in sets.items():
        scores = score(judge, images.pixels, images.concepts, images.styles)
        result[name] = {key: round(scores[key].float().mean().item(), 4) for key in chance}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "runs/emoji", help="folder of the unpacked shards")
    parser.add_argument("--steps", type=int, default=3000, help="of the network that names emoji")
    parser.add_argument("--style-steps", type=int, default=1500, help="of the network that names styles")
    parser.add_argument("--keep", action="store_true", help="train nothing, measure the judge of this repository")
    given = parser.parse_args()

    unpack(given.data)
    splits = {split: real_images(given.data, split) for split in SPLITS}
    if not given.keep:
        judge = trained(joined(splits.values()), given.steps, given.style_steps)
        weights = {name: value.half().contiguous() for name, value in judge.state_dict().items()}
        save_file({name: value for name, value in weights.items() if "num_batches" not in name}, WEIGHTS)

    result = measured(load(), splits)
    (HERE / "judge.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
