"""Protocols of the swappable parts: denoiser, encoders, data, objective, sampler, extractor, parts of the trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from selfe.rng import SampleRNG
from selfe.types import Batch, Loss, Packed, Precision, Route, Split, TextCond


class Denoiser(Protocol):
    """V(x_t, t, s, c) of Eq. 6: predicts the velocity `noise - x0` of every token."""

    def __call__(
        self,
        x_t: Packed,
        t: Tensor,
        s: Tensor,
        cond: TextCond,
        features: Sequence[str] = (),
        route: Route | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """x_t (T, d) -> v (T, d).

        t and s are (B,), per sample, or (T,), per image token; their length decides.

        `features` are names of inner layers, such as "double_blocks.1", or of heads. With names the call returns
        (v, {name: (T, width)}), of the image tokens. With a `route`, some image tokens skip a range of blocks.
        """
        ...


class Backbone(Denoiser, Protocol):
    """The trained `nn.Module`. Modules in its `nn.ModuleList`s are sharded and activation-checkpointed individually."""

    patch_dim: int
    text_dim: int
    pooled_dim: int
    feature_widths: dict[str, int]  # layers that `features` may name, in order, and the widths of their outputs
    heads: nn.ModuleDict  # see `add_head`; left out where only v is needed: sampling and export

    def output_settings(self) -> dict[str, Any]:
        """Constructor parameters, besides the weights, that change what it computes; values as in YAML."""
        ...

    def add_head(self, name: str, layer: str, head: nn.Module) -> None:
        """Train `head` with the backbone: the feature `name` is head(feature of `layer` (T, width), x_t: Packed).

        A head has `flops(num_tokens)`, those of its forward pass. Raises ValueError if there is no such layer.
        """
        ...

    def initial(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """The initial value of a parameter, float32 on the host: a function of (seed, name, shape) only."""
        ...

    def flops(
        self,
        image_lens: Sequence[int],
        text_lens: Sequence[int],
        *,
        token_times: bool = False,
        features: Sequence[str] = (),
        route: Route | None = None,
    ) -> int:
        """FLOPs of a forward pass over samples with these numbers of image and caption tokens.

        `token_times`: t and s are per token.
        """
        ...


TensorReader = Callable[[str, slice], Tensor]  # (name, rows) -> those rows of a stored tensor, on the host


class ShardLoader(Protocol):
    """Materialises a module from the meta device, sharded by `blocks`, with values that `read` returns by name."""

    def __call__(self, module: nn.Module, blocks: Iterable[nn.Module], read: TensorReader) -> None: ...


class TextEncoder(Protocol):
    """Frozen; captions are encoded at their own length, without padding. Built without weights; `load` reads them.

    Loaded on the meta device, it reads no file and only estimates cost: outputs have shapes but no values.
    """

    text_dim: int
    pooled_dim: int

    def output_settings(self) -> dict[str, Any]:
        """Constructor parameters, besides the weights, that change what it computes; values as in YAML."""
        ...

    def load(self, device: torch.device, shard: ShardLoader | None = None) -> None:
        """Load the weights. With `shard`, large modules are sharded; every rank must then make the same calls."""
        ...

    def __call__(self, captions: Sequence[str]) -> TextCond: ...


class Autoencoder(Protocol):
    """Frozen; images to packed latent patches and back. Built without weights; `load` reads them."""

    token_dim: int
    multiple: int  # image height and width must be multiples of this many pixels

    def output_settings(self) -> dict[str, Any]:
        """Constructor parameters, besides the weights, that change what it computes; values as in YAML."""
        ...

    def load(self, device: torch.device) -> None: ...

    def encode(self, images: Sequence[Tensor], rng: SampleRNG) -> Packed:
        """B x (3, H, W) in [-1, 1] -> float32 tokens (T, token_dim)."""
        ...

    def moments(self, images: Sequence[Tensor]) -> tuple[Packed, Tensor | None]:
        """The distribution `encode` samples: mean tokens, and standard deviations (T, d), or None if deterministic."""
        ...

    def decode(self, latents: Packed) -> list[Tensor]:
        """Tokens -> B x (3, H, W) in [-1, 1], float32."""
        ...

    def noise(self, sizes: Sequence[tuple[int, int]], rng: SampleRNG) -> Packed:
        """Standard normal latents for images of B x (height, width) pixels, the start of sampling."""
        ...


class ImageEncoder(Protocol):
    """Frozen vision encoder whose features training aids are compared with. Built without weights; `load` reads them.

    It runs in `selfe precompute` only; training reads its stored features.
    """

    feature_dim: int

    def output_settings(self) -> dict[str, Any]:
        """Constructor parameters, besides the weights, that change what it computes; values as in YAML."""
        ...

    def load(self, device: torch.device) -> None: ...

    def __call__(self, images: Sequence[Tensor], grids: Sequence[tuple[int, int]]) -> Packed:
        """B x (3, H, W) in [-1, 1] -> features (T, feature_dim) on grids of B x (rows, columns), float32."""
        ...


class Data(Protocol):
    """Images with captions, in an order that is a pure function of the seed.

    `samples` are the global sample indices of a step's batch, counted from the start of the run, so the order does not
    depend on the batch size and continues where the batch size changes.

    A data set of a fixed size may have `num_images`, the number of its training images, by which epochs are counted.
    """

    has_val: bool
    multiple: int  # height and width of every image are multiples of this many pixels

    def resolution(self, step: int) -> tuple[int, ...]:
        """Pixel budgets of the training images at a step; a change starts a new phase of the run."""
        ...

    def costs(self, seed: int, step: int, samples: range, split: Split) -> tuple[int, ...]:
        """The cost in tokens of each position of the step's global batch, known before any image is decoded."""
        ...

    def batch(self, seed: int, step: int, samples: range, positions: Sequence[int], split: Split) -> Batch:
        """Load these positions of the step's global batch; the same samples for any split over ranks."""
        ...


class Objective(Protocol):
    """A training loss: `captions` names the captions it needs, the call computes the loss on clean latents.

    Some members are optional. `flow_map = True`: what is trained is the mean velocity from t to s, not that at time t,
    which only samplers with `follows_flow_map` take. `s_equals_t = True`: all samples have s = t, so that images need
    `s_ratio` 1. `starts`: steps at which the network calls change, and `passes`:
    names of the first pass with gradient, of others, and of those without; both for `selfe plan`.
    `wants_features = True`: the call gets stored image features, which `selfe precompute`
    writes with the `ImageEncoder` `feature_encoder`. `prepare(backbone)` is called once, before the backbone is
    sharded: it may add heads, and raises ValueError if the backbone lacks something.
    """

    batch_multiple: int  # micro-batches must be multiples of this, so that every rank makes the same network calls

    def phase(self, step: int) -> str:
        """The names of the loss terms at a step; a change may shift the level of the loss and the gradient norm."""
        ...

    # the captions to encode, under the names by which `conds` holds them; prompt dropout is applied here if `drop`
    def captions(
        self, prompts: Sequence[str], rng: SampleRNG, step: int, drop: bool = True
    ) -> dict[str, list[str]]: ...

    # x0: clean latents (T, d); `ema` only runs without gradient; features: on the grid of x0, passed only to objectives
    # with `wants_features`
    def __call__(
        self,
        net: Denoiser,
        ema: Denoiser,
        x0: Packed,
        conds: dict[str, TextCond],
        rng: SampleRNG,
        step: int,
        features: Packed | None = None,
    ) -> Loss: ...


# (x_t, t (B,), s (B,)) -> v (T, d), with conditioning and guidance applied
GuidedDenoiser = Callable[[Packed, Tensor, Tensor], Tensor]


class Sampler(Protocol):
    """Integrates from noise (t = 1) to data (t = 0).

    Three members are optional. `s_ratio`: the only value of that setting for which the sampler is valid.
    `calls(num_steps)`: the indices k of the times t_k at which it calls the denoiser, if not once at the start of each
    step. `follows_flow_map = True`: each step is x - (t_k - t_{k+1}) denoise(x, t_k, s_k), so that the sampler suits
    objectives whose network is a flow map.
    """

    def output_settings(self) -> dict[str, Any]:
        """Constructor parameters, besides the weights, that change what it computes; values as in YAML."""
        ...

    def __call__(self, denoise: GuidedDenoiser, noise: Packed, t: Tensor, s: Tensor, rng: SampleRNG) -> Tensor:
        """noise (T, d), times t (N + 1, B) from 1 to 0, secondary times s (N, B) -> x0 (T, d)."""
        ...


class Extractor(Protocol):
    """Turns images into the features from which evaluation computes its metrics. Built without weights.

    A member `scores_only = True` is optional: only the extractor's own scores are metrics, and it does not see the
    reference images, whose captions it may not know.
    """

    has_texts: bool  # whether it is a `TextExtractor`

    def record(self) -> dict[str, Any]:
        """What decides its output, in YAML types: the model, a hash of its weights, how images are resized.

        Numbers with different records are not comparable. May be called before `load`.
        """
        ...

    def load(self, device: torch.device) -> None: ...

    def __call__(self, images: Sequence[Tensor], captions: Sequence[str]) -> dict[str, Tensor]:
        """B x (3, H, W) in [-1, 1], and their captions -> by name, float32 on any device:

        `features` (B, d): for distances between sets of images. Required.
        `aligned` (B, e): to compare with the output of `texts`.
        `maps` (B, m): a feature map, flattened, for distances position by position; a member `has_maps` is then True.
        Any other name (B,): a score per image, whose mean is a metric of that name.
        """
        ...


class TextExtractor(Extractor, Protocol):
    """An extractor that compares images with captions."""

    def texts(self, captions: Sequence[str]) -> Tensor:
        """Captions -> (B, e): the nearer to an image's `aligned` by cosine, the better they fit."""
        ...


# ---- parts of the trainer ----


class Optimizer(Protocol):
    """Builds the optimizer of a run; what it builds updates the weights and is saved in checkpoints."""

    def output_settings(self) -> dict[str, Any]:
        """Constructor parameters that decide which state is kept for which parameter; values as in YAML."""
        ...

    def build(
        self, net: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float, precision: Precision
    ) -> torch.optim.Optimizer:
        """The optimizer of the parameters of `net` that require a gradient: sharded (DTensor) in training, plain in a
        plan.

        The trainer sets `lr` of every group before a step: the scheduled one, times the group's `lr_scale` if it has
        one. `betas` and `weight_decay` are the keys of `trainer`; `precision` is that of matrix products.
        """
        ...


class Schedule(Protocol):
    """The way of the learning rate from `trainer.lr` to `trainer.min_lr`, after the warm-up."""

    def __call__(self, step: int, start: int, end: int) -> float:
        """How much of the way is done at a step: 0 is `lr`, 1 is `min_lr`.

        `start`: first step after the warm-up, `trainer.decay_start` or the phase that set `lr`, whichever is last.
        `end`: last step of the run.
        """
        ...


class EmaTrack(Protocol):
    """A moving average of the weights."""

    name: str  # in checkpoints and metrics, different for different settings; the first track of a run is called "ema"

    def decay_at(self, step: int) -> float:
        """The share of the average that a step keeps; steps count from 0."""
        ...


class ValidationMetric(Protocol):
    """A measurement of the validation, of the live weights and of each EMA track."""

    def __call__(self, system: Any, net: Denoiser, batch: Batch, rng: SampleRNG, step: int) -> dict[str, Tensor]:
        """name -> a value per sample (B,), the mean of which is logged as `val/NAME`, `val_ema/NAME`, ...

        `system` is a `selfe.system.System`; `rng` is the same at every validation. Every rank must make the same calls
        of `net`.
        """
        ...


class Logger(Protocol):
    """Receives metrics and images of a run on rank 0, beside `metrics.jsonl`."""

    def open(self, folder: Path, start: int, record: dict) -> None:
        """Called once, before the first step.

        Args:
            folder: output directory of the run.
            start: completed steps of the checkpoint that the run continues from; steps after it are logged again.
            record: the complete config as YAML types.
        """
        ...

    def numbers(self, step: int, values: dict[str, float]) -> None:
        """Metrics after `step` completed steps."""
        ...

    def image(self, step: int, name: str, path: Path) -> None:
        """A sample grid or a heat map, as a file."""
        ...

    def close(self) -> None: ...
