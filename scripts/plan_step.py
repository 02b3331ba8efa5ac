"""A training step without a weight or a number: the real code on the meta device, its operations counted, its memory
watched."""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from selfe import blocks
from selfe.blocks import Recompute
from selfe.draws import Draws
from selfe.system import System
from selfe.types import DTYPES, Batch, Denoiser, Packed, Precision, TextCond

META = torch.device("meta")


@dataclass(frozen=True)
class Call:
    """One pass of a denoiser."""

    weights: str  # live or ema
    part: str
    learns: bool  # a backward pass follows
    picture_tokens: int
    text_tokens: int


@dataclass(frozen=True)
class Step:
    """What a micro-batch costs, forward and backward."""

    pictures: int
    calls: tuple[Call, ...]
    flops: dict[str, int]  # by part; see `Meter`
    saved: int  # bytes that are kept from the forward to the backward passes, weights not counted
    peak: int  # bytes: the most that exists at once while the denoiser works, weights and their gradients not counted
    encode_peak: int  # bytes: the same while the encoders work

    @property
    def useful(self) -> int:
        """FLOPs, without those that are done again to save memory."""
        return sum(self.flops.values()) - self.flops.get("recomputed", 0)

    @property
    def encoders(self) -> int:
        """FLOPs that a cache saves."""
        return sum(n for part, n in self.flops.items() if part.startswith(("text_encoder", "autoencoder")))


class Blank(Draws):
    """Random numbers that cost nothing; no prompt is dropped."""

    def select(self, rows: Sequence[int]) -> Blank:
        return Blank(tuple(self.keys[r] for r in rows))

    def uniform(self, name: str, like: Tensor) -> Tensor:
        return torch.ones(len(self.keys)).to(like)

    def normal(self, name: str, like: Tensor) -> Tensor:
        return torch.zeros(len(self.keys)).to(like)

    def normal_like(self, name: str, x: Packed) -> Tensor:
        return torch.empty_like(x.tokens)


def blank_batch(shapes: Sequence[tuple[int, int]], num_words: int) -> tuple[Batch, Blank]:
    """Pictures of B x (height, width), each with a caption of its own of so many words, and draws that go with them."""
    rows = tuple(range(len(shapes)))
    images = tuple(torch.empty(3, height, width, device=META) for height, width in shapes)
    captions = tuple(" ".join([str(row)] * num_words) for row in rows)
    return Batch(images, captions, rows, ("",) * len(rows)), Blank(tuple((row,) for row in rows))


def measure(
    system: System,
    batch: Batch,
    draws: Draws,
    step: int,
    *,
    precision: Precision,
    activation_checkpointing: Recompute = False,
) -> Step:
    """Run one micro-batch through loss and backward pass; system, encoders and pictures are on the meta device."""
    net = copy.deepcopy(system.backbone).to(DTYPES[precision])
    ema = copy.deepcopy(net).requires_grad_(False)
    encoders = networks(system.text_encoder) | networks(system.autoencoder)
    meter = Meter([net, ema, *encoders.values()], blocks.COSTLY if activation_checkpointing == "selective" else ())
    for _, block in blocks.blocks(net):
        block.forward = partial(meter.again, block.forward)  # below the checkpoint, which calls it a second time
    blocks.save_memory(net, activation_checkpointing)
    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(drop_grad)  # FSDP too has no whole gradient for long
    with meter.watching(system.text_encoder):
        loss = system.loss(meter.around(net, "live"), meter.around(ema, "ema"), batch, draws, step)
        saved, meter.in_backward = meter.saved.now, True
        loss.per_sample.mean().backward()
    flops = {part: n for part, n in meter.flops.items() if n}
    return Step(len(batch.images), tuple(meter.calls), flops, saved, meter.living.peak, meter.encode_peak)


def drop_grad(parameter: Tensor) -> None:
    parameter.grad = None


class Meter:
    """Operations by part, and bytes of the tensors that exist.

    Parts: `text_encoder.*`, one for each of its networks; `autoencoder`; of the denoiser `flow matching`,
    `self-evaluation` (without gradient), `auxiliary`, and the backward passes of the first and the last; `recomputed`,
    which is what activation checkpointing does a second time.
    """

    def __init__(self, modules: Sequence[nn.Module], costly: Sequence[Any] = ()):
        """
        Args:
            modules: what holds weights, which are not counted.
            costly: operations whose outputs the blocks that learn keep, beside what autograd is handed.
        """
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
        """From here on operations count as those of another part; returns the one before."""
        total, before = self.counter.get_total_flops(), self.part
        self.flops[before] += total - self.counted
        self.counted, self.part = total, part
        return before

    @contextmanager
    def watching(self, text_encoder: Any) -> Iterator[None]:
        handles = []
        for name, module in networks(text_encoder).items():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: self.enter(f"text_encoder.{name}")))
            handles.append(module.register_forward_hook(lambda *_: self.enter("autoencoder")))
        with self.counter, Watch(self.made), saved_tensors_hooks(self.keep, lambda tensor: tensor):
            yield
            self.mark("autoencoder")
        for handle in handles:
            handle.remove()

    def enter(self, part: str) -> None:
        self.mark(part)

    def made(self, operation: Any, tensor: Tensor) -> None:
        self.living.add(tensor)
        if self.in_block and operation in self.costly:
            self.saved.add(tensor)

    def keep(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            self.saved.add(tensor)
        return tensor

    def around(self, net: Denoiser, weights: str) -> Denoiser:
        def call(x_t: Packed, t: Tensor, s: Tensor, cond: TextCond) -> Tensor:
            if not self.calls:
                self.encode_peak = self.living.restart()
            learns = torch.is_grad_enabled()
            learned = any(call.learns for call in self.calls)
            part = ("auxiliary" if learned else "flow matching") if learns else "self-evaluation"
            self.calls.append(Call(weights, part, learns, len(x_t.tokens), len(cond.text.tokens)))
            before = self.mark(part)
            v = net(x_t, t, s, cond)
            self.mark(before)
            if learns:  # its backward pass begins when the gradient of v is there; the latest call's comes first
                v.register_hook(lambda _: self.enter(f"{part}, backward"))
            return v

        return call

    def again(self, forward: Callable, *arguments: Any) -> Any:
        """A block's forward pass, which in the backward pass is one that was done before."""
        if not self.in_backward:
            self.in_block = torch.is_grad_enabled()
            result = forward(*arguments)
            self.in_block = False
            return result
        before = self.mark("recomputed")
        try:  # a checkpoint leaves by an exception when it has seen enough
            return forward(*arguments)
        finally:
            self.mark(before)


class NoModules(nullcontext):
    """In place of the counter's tracker of modules, whose hooks keep alive what a backward pass would free."""

    parents = frozenset({"Global"})


def networks(encoder: Any) -> dict[str, nn.Module]:
    """An encoder's networks by the names that it gives them."""
    return {name: part for name, part in vars(encoder).items() if isinstance(part, nn.Module)}


class Living:
    """Bytes of all storages that were added and still exist, `others` left out."""

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
        """The peak so far; the next one begins with what exists."""
        peak, self.peak = self.peak, self.now
        return peak


class Watch(TorchDispatchMode):
    """Tells of every tensor that an operation makes on the meta device."""

    def __init__(self, made: Callable[[Any, Tensor], None]):
        super().__init__()
        self.made = made

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self.made(function, tensor)
        return result
