"""FLOPs and peak memory of one micro-batch: the real training code on the meta device, without weights or data."""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from selfe.distributed import activation_checkpoint
from selfe.distributed.activation_checkpoint import ActivationCheckpointing
from selfe.encoders.composed_text import ComposedText
from selfe.optimizers.groups import trained
from selfe.protocols import Denoiser
from selfe.rng import SampleRNG
from selfe.system import System
from selfe.types import DTYPES, Batch, Packed, Precision, Route, TextCond

META = torch.device("meta")
PASSES = "flow matching", "auxiliary", "self-evaluation"  # of an objective that does not name its own


@dataclass(frozen=True)
class Call:
    """One forward pass of a denoiser."""

    weights: str  # "live" or "ema"
    part: str
    learns: bool  # followed by a backward pass
    image_tokens: int
    text_tokens: int


@dataclass(frozen=True)
class Step:
    """Cost of a micro-batch, forward and backward."""

    num_images: int
    calls: tuple[Call, ...]
    flops: dict[str, int]  # by part, see `Meter`
    saved: int  # bytes kept from forward to backward, without weights
    peak: int  # peak bytes while the denoiser runs, without weights and their gradients
    encode_peak: int  # peak bytes while the encoders run

    @property
    def useful(self) -> int:
        """FLOPs without recomputation (activation checkpointing)."""
        return sum(self.flops.values()) - self.flops.get("recomputed", 0)

    @property
    def encoders(self) -> int:
        """FLOPs of the encoders, which a cache saves."""
        return sum(n for part, n in self.flops.items() if part.startswith(("text_encoder", "autoencoder")))


def blank_batch(shapes: Sequence[tuple[int, int]], num_words: int) -> tuple[Batch, SampleRNG]:
    """A batch of images B x (height, width) on the meta device, each with its own caption, and the rng for it."""
    rows = tuple(range(len(shapes)))
    images = tuple(torch.empty(3, height, width, device=META) for height, width in shapes)
    captions = tuple(" ".join([str(row)] * num_words) for row in rows)
    return Batch(images, captions, rows, ("",) * len(rows)), SampleRNG(tuple((row,) for row in rows))


def with_features(system: System, batch: Batch) -> Batch:
    """The batch with the stored image features that the objective wants, if it wants any."""
    if not getattr(system.objective, "wants_features", False):
        return batch
    latents, _ = system.autoencoder.moments(batch.images)
    width = system.objective.feature_encoder.feature_dim
    return replace(batch, features=tuple(torch.empty(*grid, width, device=META) for grid in latents.grids))


def measure(
    system: System,
    batch: Batch,
    rng: SampleRNG,
    step: int,
    *,
    precision: Precision,
    activation_checkpointing: ActivationCheckpointing = False,
) -> Step:
    """Run loss and backward of one micro-batch; system, encoders and images are on the meta device."""
    # copies: dtype, hooks and checkpointing must not change the system
    net = copy.deepcopy(system.backbone).to(DTYPES[precision])
    ema = copy.deepcopy(net).requires_grad_(False)
    encoders = networks(system.text_encoder) | networks(system.autoencoder)

    # hooks and wrappers
    meter = Meter(
        [net, ema, *encoders.values()],
        activation_checkpoint.COSTLY if activation_checkpointing == "selective" else (),
        getattr(system.objective, "passes", PASSES),
    )
    for _, block in activation_checkpoint.blocks(net):
        block.forward = partial(meter.again, block.forward)  # inside the checkpoint, which calls it again
    activation_checkpoint.apply_activation_checkpointing(net, activation_checkpointing)
    for _, parameter in trained(net):
        parameter.register_post_accumulate_grad_hook(drop_grad)  # FSDP reshards gradients right away too

    with meter.watching(system.text_encoder):
        loss = system.loss(meter.around(net, "live"), meter.around(ema, "ema"), batch, rng, step)
        saved, meter.in_backward = meter.saved.now, True
        loss.per_sample.mean().backward()

    flops = {part: n for part, n in meter.flops.items() if n}
    return Step(len(batch.images), tuple(meter.calls), flops, saved, meter.living.peak, meter.encode_peak)


def drop_grad(parameter: Tensor) -> None:
    parameter.grad = None


class Meter:
    """Counts FLOPs by part, and bytes of live tensors.

    Parts: `text_encoder.*` for each of its networks; `autoencoder`; of the denoiser its `passes`, and `..., backward`
    of those with gradient; `recomputed` for the forward passes that activation checkpointing repeats.
    """

    def __init__(self, modules: Sequence[nn.Module], costly: Sequence[Any] = (), passes: Sequence[str] = PASSES):
        """
        Args:
            modules: networks whose weights are not counted.
            costly: operations whose outputs selective checkpointing keeps, beside the tensors that autograd saves.
            passes: names of the first pass of the denoiser with gradient, of further ones, and of those without.
        """
        self.passes = passes
        self.counter, self.counted, self.part = FlopCounterMode(display=False), 0, "autoencoder"
        self.counter.mod_tracker = NoModules()
        self.flops: dict[str, int] = defaultdict(int)
        self.calls: list[Call] = []

        tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        weights = {tensor.untyped_storage()._cdata for tensor in tensors}
        self.living, self.saved = Living(weights), Living(weights)

        self.costly, self.in_block = costly, False
        self.in_backward, self.encode_peak = False, 0

    def mark(self, part: str) -> str:
        """Attribute the following FLOPs to `part`; returns the previous part."""
        total, before = self.counter.get_total_flops(), self.part
        self.flops[before] += total - self.counted
        self.counted, self.part = total, part
        return before

    @contextmanager
    def watching(self, text_encoder: Any) -> Iterator[None]:
        """Count all operations in this context."""
        # the text encoder's networks are parts of their own; between them, FLOPs belong to the autoencoder
        handles = []
        for name, module in networks(text_encoder).items():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: self.enter(f"text_encoder.{name}")))
            handles.append(module.register_forward_hook(lambda *_: self.enter("autoencoder")))

        with self.counter, Watchdog(self.made), saved_tensors_hooks(self.keep, lambda tensor: tensor):
            yield
            self.mark("autoencoder")

        for handle in handles:
            handle.remove()

    def enter(self, part: str) -> None:
        """`mark` for hooks, which must return None."""
        self.mark(part)

    def made(self, operation: Any, tensor: Tensor) -> None:
        """Called for every tensor that an operation creates."""
        self.living.add(tensor)
        if self.in_block and operation in self.costly:
            self.saved.add(tensor)

    def keep(self, tensor: Tensor) -> Tensor:
        """Called for every tensor that autograd saves for backward."""
        if tensor.is_meta:
            self.saved.add(tensor)
        return tensor

    def around(self, net: Denoiser, weights: str) -> Denoiser:
        """Wrap a denoiser so that its calls are recorded."""

        def call(
            x_t: Packed,
            t: Tensor,
            s: Tensor,
            cond: TextCond,
            features: Sequence[str] = (),
            route: Route | None = None,
        ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
            # the first call of the denoiser: the encoders are done
            if not self.calls:
                self.encode_peak = self.living.restart()

            learns = torch.is_grad_enabled()
            learned = any(call.learns for call in self.calls)
            first, further, fixed = self.passes
            part = (further if learned else first) if learns else fixed
            self.calls.append(Call(weights, part, learns, len(x_t.tokens), len(cond.text.tokens)))

            before = self.mark(part)
            output = net(x_t, t, s, cond, features, route)
            self.mark(before)
            if learns:  # its backward pass begins with the gradient of an output
                for tensor in tree_leaves(output):
                    if tensor.requires_grad:  # not a feature of a frozen layer
                        tensor.register_hook(lambda _: self.enter(f"{part}, backward"))
            return output

        return call

    def again(self, forward: Callable, *arguments: Any) -> Any:
        """Forward pass of a block; during the backward pass it is a recomputation."""
        if not self.in_backward:
            self.in_block = torch.is_grad_enabled()
            result = forward(*arguments)
            self.in_block = False
            return result

        before = self.mark("recomputed")
        try:  # non-reentrant checkpointing stops early by raising an exception
            return forward(*arguments)
        finally:
            self.mark(before)


class NoModules(nullcontext):
    """Replaces the FLOP counter's module tracker, whose hooks keep tensors alive that backward would free."""

    parents = frozenset({"Global"})


def networks(encoder: Any) -> dict[str, nn.Module]:
    """The networks of an encoder, by attribute name; of one that consists of others, by their dotted names."""
    if isinstance(encoder, ComposedText):
        return {
            f"{name}.{inner}": network
            for name, part in encoder.encoders.items()
            for inner, network in networks(part).items()
        }
    return {name: part for name, part in vars(encoder).items() if isinstance(part, nn.Module)}


class Living:
    """Bytes of the added storages that are still alive, without those in `others`."""

    def __init__(self, others: set[int]):
        self.now = self.peak = 0
        self.known = set(others)

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.end, storage._cdata, storage.nbytes())

    def end(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def restart(self) -> int:
        """Return the peak so far, and start a new one from the current bytes."""
        peak, self.peak = self.peak, self.now
        return peak


class Watchdog(TorchDispatchMode):
    """Calls `made(operation, tensor)` for every meta tensor that an operation returns."""

    def __init__(self, made: Callable[[Any, Tensor], None]):
        super().__init__()
        self.made = made

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self.made(function, tensor)
        return result
