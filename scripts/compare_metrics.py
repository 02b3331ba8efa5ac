"""Compare the metrics of evaluation with torchmetrics, torch-fidelity, clean-fid and prdc; print a table.

    uv venv /tmp/peers
    uv pip install --python /tmp/peers . torchmetrics torch-fidelity clean-fid prdc
    PYTHONPATH=$PWD /tmp/peers/bin/python scripts/compare_metrics.py

An environment of its own, because none of them is needed at run time. On random features and on the features of emoji
images, the peers get the features; on the images, torchmetrics also computes them. Exit code 1 if a relative
difference is above 1e-4.
"""

from __future__ import annotations

import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from cleanfid import fid, resize
from prdc import compute_prdc
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from selfe.data.shards import Shards
from selfe.evaluation import statistics
from selfe.evaluation.hf_extractor import resized
from selfe.evaluation.image_sets import Captioned, subset
from selfe.evaluation.statistics import Bootstrap, Moments

ARCHIVE = Path(__file__).resolve().parents[1] / "debug_data/emoji/shards.tar.xz"
COUNT = 1000  # images of a set
WIDTH = 64  # features of an image
NEIGHBOURS = 5
MOST = 1e-4  # relative difference
PEERS = ("torchmetrics", "torch-fidelity", "clean-fid", "prdc")


class Projection(nn.Module):
    """uint8 images (N, 3, H, W) -> features (N, WIDTH): a random projection of thumbnails of 16 x 16 pixels."""

    num_features = WIDTH

    def __init__(self):
        super().__init__()
        self.matrix = torch.randn(3 * 16 * 16, WIDTH, generator=torch.Generator().manual_seed(0)) / 16

    def forward(self, images: Tensor) -> Tensor:
        small = F.interpolate(images.float() / 127.5 - 1, (16, 16), mode="area")
        return (small.flatten(1) @ self.matrix).double()  # the KID of torchmetrics cancels in float32


class Given(nn.Module):
    """Features as they are."""

    num_features = WIDTH

    def forward(self, features: Tensor) -> Tensor:
        return features


class Rows:
    """Features in blocks, as from files."""

    def __init__(self, rows: Tensor):
        self.rows = rows.double()

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self):
        yield from self.rows.split(100)


# ---- values ----


def ours(x: Tensor, y: Tensor) -> dict[str, float]:
    none, moments = Bootstrap(range(len(x)), 0), Moments.of(Rows(y))
    distance = statistics.frechet_distance(Rows(x), moments, statistics.root(moments.covariance), none).distance
    x, y = x.double(), y.double()
    values = {"fd": distance.value, "kid": statistics.kid(x, y, none).value, "cmmd": statistics.cmmd(x, y, none).value}
    rows = statistics.neighbours(x, y, NEIGHBOURS)._asdict()
    return values | {name: row.mean().item() for name, row in rows.items()}


def torchmetrics_values(network: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """From what the network takes."""
    distance = FrechetInceptionDistance(feature=network)
    kernel = KernelInceptionDistance(feature=network, subsets=1, subset_size=len(x))
    for metric in (distance, kernel):
        metric.update(y, real=True)
        metric.update(x, real=False)
    return {"fd": distance.compute().item(), "kid": kernel.compute()[0].item()}


def fidelity_values(x: Tensor, y: Tensor) -> dict[str, float]:
    kernel = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=len(x), verbose=False)
    options = {"prc_neighborhood": NEIGHBOURS, "prc_batch_size": 10_000, "save_cpu_ram": False, "verbose": False}
    share = prc_features_to_metric(x, y, **options)
    return {"kid": kernel["kernel_inception_distance_mean"], "precision": share["precision"], "recall": share["recall"]}


def clean_fid_values(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    moments = [(rows.mean(0), np.cov(rows, rowvar=False)) for rows in (x, y)]
    kernel = fid.kernel_distance(x, y, num_subsets=1, max_subset_size=len(x))
    return {"fd": fid.frechet_distance(*moments[0], *moments[1]), "kid": kernel}


def formula_of_cmmd(x: np.ndarray, y: np.ndarray) -> float:
    """In NumPy, from the paper: no library has CMMD."""
    x, y = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, y))

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T
        return np.exp(-squares / 200).mean()

    return 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))


# ---- comparison ----


def emoji() -> tuple[Tensor, Tensor]:
    """Two sets of images (COUNT, 3, 32, 32), uint8."""
    with tempfile.TemporaryDirectory() as folder, tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
        images = subset(Captioned(Shards(Path(folder) / "train-*.tar", 10**6)), 2 * COUNT)
        pixels = torch.stack([images.read(index)[0] for index in range(len(images))])
    return pixels[1::2], pixels[::2]


def random_features() -> tuple[Tensor, Tensor]:
    """Two sets (COUNT, WIDTH) that overlap: correlated, one of them not normal."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator) / 8
    x, y = (torch.randn(COUNT, WIDTH, generator=generator) for _ in range(2))
    return 0.9 * (x + 0.2 * x.square()) @ mixing, y @ mixing


def compare(title: str, network: nn.Module, x: Tensor, y: Tensor) -> float:
    """Print a table; returns the largest relative difference.

    Args:
        x: what the network takes for the generated images; y: for the reference.
    """
    features_x, features_y = (network(rows).double() for rows in (x, y))
    if isinstance(network, Given):
        x, y = features_x, features_y
    arrays = features_x.numpy(), features_y.numpy()
    real_first = compute_prdc(real_features=arrays[1], fake_features=arrays[0], nearest_k=NEIGHBOURS)
    values = {
        "torchmetrics": torchmetrics_values(network, x, y),
        "torch-fidelity": fidelity_values(features_x, features_y),
        "clean-fid": clean_fid_values(*arrays),
        "prdc": {name: float(value) for name, value in real_first.items()},
        "NumPy": {"cmmd": formula_of_cmmd(*arrays)},
    }

    print(f"\n{title}, {len(x)} generated and {len(y)} reference images, {WIDTH} features")
    print("| metric | selfe | peer | value | relative difference |\n| --- | --- | --- | --- | --- |")
    largest = 0.0
    for metric, value in ours(features_x, features_y).items():
        for peer, others in values.items():
            if metric in others:
                difference = abs(others[metric] - value) / abs(value)
                largest = max(largest, difference)
                print(f"| {metric} | {value:.8g} | {peer} | {others[metric]:.8g} | {difference:.1e} |")
    return largest


def compare_resizing(images: Tensor) -> float:
    """Largest difference to the resizing of clean-fid, of 255."""
    largest = 0.0
    for side in (14, 224):
        function = resize.make_resizer("PIL", False, "bicubic", (side, side))
        for image in images[:20]:
            theirs = function(image.permute(1, 2, 0).numpy()).clip(0, 255)
            mine = (resized(image[None].float() / 127.5 - 1, side)[0].permute(1, 2, 0).numpy() + 1) * 127.5
            largest = max(largest, float(np.abs(theirs - mine).max()))
    print(f"\nimages resized to 14 and to 224 pixels: differ from clean-fid by at most {largest:.1e} of 255")
    return largest


def main() -> None:
    print("versions:", ", ".join(f"{name} {version(name)}" for name in (*PEERS, "torch", "numpy")))
    images = emoji()
    differences = [
        compare("random features", Given(), *random_features()),
        compare("emoji images", Projection(), *images),
    ]
    resizing = compare_resizing(images[0])
    print(f"\nlargest relative difference: {max(differences):.1e}")
    sys.exit(int(max(differences) > MOST or resizing > 0.01))


if __name__ == "__main__":
    main()
