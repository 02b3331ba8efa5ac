"""Checks of a GPU: kernels, agreement with the CPU, speed, memory, compilation, resuming, sampling, saving.

    .venv/bin/python scripts/gpu_check.py --out gpu.jsonl                 all checks, in about 8 minutes of one H100
    .venv/bin/python scripts/gpu_check.py --out gpu.jsonl --only parity,step_2b
    .venv/bin/python scripts/gpu_check.py --out gpu.jsonl --tiny          small sizes, also on a CPU

Needs torch >= 2.11, and neither network nor pretrained weights: all weights are random. Every result is printed as a
JSON line as soon as it is measured, and appended to --out. A check that fails prints its traceback, the others are
still run, and the exit code is 1. A check for which the --budget has no time left is reported as skipped.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from selfe import flow
from selfe.backbones.attention import Sequences, attend
from selfe.backbones.mmdit import MMDiT
from selfe.checkpoint import state
from selfe.checkpoint.manager import CheckpointManager, RetentionPolicy
from selfe.data.buckets import Buckets
from selfe.device import peak_tflops, synchronize
from selfe.distributed import activation_checkpoint, collectives, fsdp
from selfe.distributed.collectives import World
from selfe.distributed.fsdp import GatherConfig
from selfe.encoders.flux_vae import FluxVAE
from selfe.encoders.hf_text import HFText
from selfe.encoders.t5_clip import ClipSize, T5Clip, T5Size
from selfe.objectives.flow_matching import FlowMatching
from selfe.objectives.self_evaluation import SelfEvaluation
from selfe.protocols import Objective
from selfe.rng import SampleRNG
from selfe.samplers.guidance import guided
from selfe.samplers.renoise import Renoise
from selfe.system import System
from selfe.training import ema as ema_update
from selfe.types import Batch, Packed, TextCond, packed

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
STEP = 300_000  # a step at which the shipped schedule trains with s < t

Facts = Iterator[dict]
Conds = dict[str, TextCond]


@dataclass(frozen=True)
class Setting:
    """Where the checks run, and how large."""

    world: World
    tiny: bool
    peak_tflops: float | None

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def sizes(self, name: str) -> dict:
        """Constructor arguments of the denoiser "0.5b" or "2b", as in configs/base."""
        width = {"0.5b": 1024, "2b": 2048}[name]
        if self.tiny:
            return dict(width=128, num_heads=4, num_double_blocks=1, num_single_blocks=1, rope_axes=(8, 12, 12)) | SMALL
        axes = (width // 128, width * 7 // 256, width * 7 // 256)
        return dict(width=width, num_heads=16, num_double_blocks=8, num_single_blocks=16, rope_axes=axes)


SMALL = {"text_dim": 64, "pooled_dim": 32}
TEXT_DIMS = {"text_dim": 4096, "pooled_dim": 768}


# ---- measuring ----


def milliseconds(
    setting: Setting, work: Callable[[], object], repeats: int = 5, warmup: int = 2
) -> tuple[float, float]:
    """Mean time of a call, and the part of it after which the host is free to queue more work."""
    if setting.tiny:
        repeats, warmup = 1, 1
    for _ in range(warmup):
        work()

    synchronize()
    start, queued = time.perf_counter(), 0.0
    for _ in range(repeats):
        before = time.perf_counter()
        work()
        queued += time.perf_counter() - before
    synchronize()
    total = time.perf_counter() - start
    return round(total / repeats * 1e3, 3), round(queued / repeats * 1e3, 3)


def host_waits(setting: Setting, work: Callable[[], object]) -> dict[str, int]:
    """How often `work` makes the host wait for the device, by source line."""
    if not setting.cuda:
        work()
        return {}

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    return dict(Counter(lines))


def free_memory(setting: Setting) -> None:
    gc.collect()
    if setting.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(setting: Setting) -> float | None:
    """Peak of allocated device memory since `free_memory`."""
    return round(torch.cuda.max_memory_allocated() / GIB, 2) if setting.cuda else None


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference / norm of the reference."""
    value, reference = value.detach().double().cpu(), reference.detach().double().cpu()
    return float((value - reference).norm() / reference.norm().clamp_min(1e-30))


# ---- inputs ----


def caption_lengths(count: int, seed: int) -> list[int]:
    """Tokens of captions: log-normal, median 22, 5 to 77."""
    rng = random.Random(seed)
    return [min(max(round(rng.lognormvariate(math.log(22), 0.6)), 5), 77) for _ in range(count)]


def image_grids(setting: Setting, count: int, pixels: int, mixed: bool) -> list[tuple[int, int]]:
    """Grids of patches: squares of `pixels` per side or, if `mixed`, buckets of as many pixels, each twice in a row."""
    if setting.tiny:
        return [(4, 4)] * count
    if not mixed:
        return [(pixels // 16, pixels // 16)] * count
    shapes = (Buckets(pixels * pixels, 16, 2.0).shapes // 16).tolist()
    chosen = sorted(random.Random(0).choices(range(len(shapes)), k=count // 2))
    return [tuple(shapes[i]) for i in chosen for _ in range(2)]


def random_text(lengths: Sequence[int], dims: dict, device: torch.device) -> TextCond:
    text = packed(torch.randn(sum(lengths), dims["text_dim"], device=device), [(1, n) for n in lengths])
    return TextCond(text, torch.randn(len(lengths), dims["pooled_dim"], device=device))


def random_batch(grids: Sequence[tuple[int, int]], lengths: Sequence[int], dims: dict, device: torch.device) -> tuple:
    """Latents of B images and the captions that Self-E needs; every second row is self-evaluated."""
    evaluated = range(1, len(grids), 2)
    x0 = packed(torch.randn(sum(rows * columns for rows, columns in grids), 64, device=device), grids)
    conds = {
        "cond": random_text(lengths, dims, device),
        "null": random_text([1 for _ in evaluated], dims, device),
        "fake": random_text([lengths[i] + 4 for i in evaluated], dims, device),
    }
    return x0, conds


def randomise(net: nn.Module) -> None:
    """Random values in place, small enough for finite activations; zero-initialised layers would hide errors."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            elif parameter.ndim == 1:
                parameter.zero_()
            else:
                fsdp.local(parameter).normal_(0, 0.01 if "modulation" in name else 0.02)


def text_dims(setting: Setting) -> dict:
    return SMALL if setting.tiny else TEXT_DIMS


# ---- checks: generators of facts ----


def check_card(setting: Setting) -> Facts:
    """Name, versions, and the speed of a large matrix product."""
    facts = {"torch": torch.__version__, "device": str(setting.device), "cores": os.cpu_count()}
    if setting.cuda:
        properties = torch.cuda.get_device_properties(0)
        a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        seconds = milliseconds(setting, lambda: a @ a, 10)[0] / 1e3
        facts |= {
            "name": properties.name,
            "gib": round(properties.total_memory / GIB, 1),
            "peak_tflops": setting.peak_tflops,
            "gemm_tflops": round(2 * 8192**3 / seconds / 1e12, 1),
            "cudnn": torch.backends.cudnn.version(),
            "nccl": torch.cuda.nccl.version(),
        }
    yield facts


def check_attention(setting: Setting) -> Facts:
    """Error of variable-length attention in bf16 and fp32, its kernels and its speed.

    Expected: flash kernels, bf16 within 1e-2 of fp32, fp32 within 1e-5 of fp64, no host wait.
    """
    heads, head_dims = (2, (16,)) if setting.tiny else (16, (128, 64))
    cases = {"ragged": [1, 5, 333, 17, 300, 1101], "256 px": [333] * 32, "512 px": [1101] * 16, "1024 px": [4173] * 4}
    if setting.tiny:
        cases = {"ragged": [1, 5, 33, 17], "256 px": [20] * 4}

    for head_dim in head_dims:
        for name, lengths in cases.items():
            sequences = Sequences.of(lengths, setting.device)
            shape = (sum(lengths), 3, heads, head_dim)
            qkv = torch.randn(shape, device=setting.device, dtype=torch.bfloat16).unbind(1)  # strided, as in a block
            leaves = [x.detach().requires_grad_() for x in qkv]

            waits = host_waits(setting, lambda: attend(*leaves, sequences))  # noqa: B023 - called at once
            facts = {"lengths": name, "head_dim": head_dim, "waits": waits}
            if name == "ragged":
                yield facts | attention_errors(leaves, lengths, sequences)
            else:
                yield facts | attention_speed(setting, leaves, lengths, sequences)


def attention_errors(leaves: list[Tensor], lengths: list[int], sequences: Sequences) -> dict:
    """bf16 against fp32, and fp32 against plain attention in fp64, for outputs and gradients."""
    out = attend(*leaves, sequences)
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, upstream)

    single = [x.detach().float().requires_grad_() for x in leaves]
    out_single = attend(*single, sequences)
    grads_single = torch.autograd.grad(out_single, single, upstream.float())

    double = zip(*(x.detach().double().split(lengths) for x in leaves), strict=True)
    exact = [F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in sample)).transpose(0, 1) for sample in double]
    return {
        "bf16_error": relative_error(out, out_single),
        "bf16_gradient_errors": [relative_error(*pair) for pair in zip(grads, grads_single, strict=True)],
        "fp32_error": relative_error(out_single, torch.cat(exact)),
    }


def attention_speed(setting: Setting, leaves: list[Tensor], lengths: list[int], sequences: Sequences) -> dict:
    """TFLOP/s of forward, and of forward and backward; names of the kernels."""
    from torch.profiler import ProfilerActivity, profile

    upstream = torch.randn_like(leaves[2])
    detached = [x.detach() for x in leaves]

    def forward_backward() -> None:
        torch.autograd.grad(attend(*leaves, sequences), leaves, upstream)

    activity = ProfilerActivity.CUDA if setting.cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as trace:
        forward_backward()
        synchronize()
    names = {event.key[:60] for event in trace.key_averages()}

    flops = 4 * leaves[0].shape[1] * leaves[0].shape[2] * sum(n * n for n in lengths)
    forward = milliseconds(setting, lambda: attend(*detached, sequences), 10)[0]
    both = milliseconds(setting, forward_backward, 10)[0]
    return {
        "kernels": sorted(name for name in names if any(s in name.lower() for s in ("flash", "fmha", "attention"))),
        "forward_tflops": round(flops / forward / 1e9, 1),
        "forward_backward_tflops": round(3.5 * flops / both / 1e9, 1),
    }


def check_parity(setting: Setting) -> Facts:
    """Losses, gradients and samples of a small system against the CPU in fp32.

    Expected: in fp32 losses within 1e-5 and gradients within 1e-3; in bf16 within 5e-2. `score_difference` is the
    relative error of v_null - v_cond, the signal of Self-E.
    """
    dims = SMALL
    torch.manual_seed(0)
    cpu = MMDiT(width=128, num_heads=4, num_double_blocks=2, num_single_blocks=2, rope_axes=(8, 12, 12), **dims)
    for parameter in cpu.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape)

    grids = [(6, 4), (6, 4), (5, 5), (5, 5), (3, 8), (3, 8), (4, 4), (4, 4)]
    x0, conds = random_batch(grids, caption_lengths(len(grids), 1), dims, torch.device("cpu"))
    null = random_text([1] * len(grids), dims, torch.device("cpu"))

    reference = system_outputs(cpu, x0, conds, null, torch.device("cpu"), torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        outputs = system_outputs(cpu, x0, conds, null, setting.device, dtype)
        errors = {name: relative_error(value, reference[name]) for name, value in outputs.items()}
        yield {"device": str(setting.device), "dtype": str(dtype)} | errors


def system_outputs(
    cpu: MMDiT, x0: Packed, conds: Conds, null: TextCond, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Losses and gradients of Self-E, a sample with guidance, and the score difference, on a device."""

    def moved(cond: TextCond) -> TextCond:
        return TextCond(packed(cond.text.tokens.to(device), cond.text.grids), cond.pooled.to(device))

    net = copy.deepcopy(cpu).to(device, dtype)
    average = copy.deepcopy(net).requires_grad_(False)
    for parameter in average.parameters():
        parameter.data *= 0.97
    x0, conds, null = packed(x0.tokens.to(device), x0.grids), {k: moved(c) for k, c in conds.items()}, moved(null)

    # loss with every term
    rows, step = range(len(x0)), 600_000
    loss = SelfEvaluation()(net, average, x0, conds, SampleRNG.of_step(0, step, rows), step).per_sample
    loss.mean().backward()
    gradient = torch.cat([parameter.grad.flatten().float() for parameter in net.parameters()])

    with torch.no_grad():
        rng = SampleRNG(tuple((0, "prompt", i) for i in rows))
        noise = x0.with_tokens(rng.normal_like("noise", x0))
        t, s = flow.sampling_times(4, 0.3, noise)
        sample = Renoise(1.0)(guided(average, conds["cond"], null, 5.0), noise, t, s, rng)

        t = torch.linspace(0.1, 0.9, len(x0), device=device)
        difference = net(x0, t, t, null) - net(x0, t, t, conds["cond"])
    return {"loss": loss, "gradient": gradient, "sample": sample, "score_difference": difference}


OBJECTIVES: dict[str, Objective] = {
    "flow matching": FlowMatching(),
    "Self-E": SelfEvaluation(aux_start_step=None),
    "Self-E with auxiliary term": SelfEvaluation(aux_start_step=0),
}


def measure_steps(
    setting: Setting,
    model: str,
    objectives: Sequence[str],
    *,
    micro_batch: int,
    pixels: int = 256,
    mixed: bool = False,
    planned: bool = False,
    **options,
) -> Facts:
    """Time, MFU, memory and host waits of complete training steps of one micro-batch, without encoders.

    `mixed`: images and captions of many lengths. `planned`: add the peak memory that `selfe plan` expects.
    """
    free_memory(setting)
    dims, sizes = text_dims(setting), setting.sizes(model)
    with torch.device("meta"):
        net = MMDiT(**sizes)
    counting = copy.deepcopy(net)
    net, average = fsdp.shard_model_and_ema(net, fsdp.make_mesh(setting.world, None), "bf16", **options)
    for part in (net, average):
        part.to_empty(device=setting.device)
        randomise(part)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.01, fused=True)

    count = 4 if setting.tiny else micro_batch
    grids = image_grids(setting, count, pixels, mixed)
    lengths = caption_lengths(count, 0) if mixed else [77] * count
    x0, conds = random_batch(grids, lengths, dims, setting.device)
    toy = random_batch([(2, 2)] * 4, [2, 3, 4, 5], dims, setting.device)

    base = None
    for name in objectives:
        step = partial(training_step, net, average, optimizer, OBJECTIVES[name])
        elapsed = milliseconds(setting, lambda: step(x0, conds), 4)[0]  # noqa: B023 - called at once
        base = base or elapsed
        useful = useful_flops(counting, OBJECTIVES[name], grids, lengths, dims)
        yield {
            "objective": name,
            "micro_batch": count,
            "pixels": pixels,
            "mixed": mixed,
            **{key: str(value) for key, value in options.items()},
            "ms": elapsed,
            "host_ms": milliseconds(setting, lambda: step(*toy), 4)[0],  # noqa: B023 - time on inputs of no size
            "samples_per_second": round(count / elapsed * 1e3, 1),
            "mfu": round(useful / (elapsed / 1e3) / setting.peak_tflops / 1e12, 4) if setting.peak_tflops else None,
            "over_flow_matching": round(elapsed / base, 3),
            "waits": host_waits(setting, lambda: step(x0, conds)),  # noqa: B023 - called at once
            "peak_gib": peak_gib(setting),
        } | ({"planned_peak_gib": planned_peak(model, count, options)} if planned else {})

    del net, average, optimizer
    free_memory(setting)


def training_step(
    net: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, objective: Objective, x0: Packed, conds: Conds
) -> None:
    """The trainer's step from latents on, with one micro-batch."""
    rng = SampleRNG.of_step(0, STEP, range(len(x0)))
    loss = objective(net, average, x0, conds, rng, STEP).per_sample.mean()
    loss.backward()
    norm = fsdp.grad_norm(net)
    collectives.sync_step_outcome(norm, loss.detach(), 0)
    fsdp.clip_gradients(net, norm, 1.0)
    optimizer.step()
    ema_update.update(average, net, 0.9999)
    optimizer.zero_grad(set_to_none=True)


def useful_flops(
    net: MMDiT, objective: Objective, grids: Sequence[tuple[int, int]], lengths: Sequence[int], dims: dict
) -> int:
    """FLOPs of loss and backward without recomputation, counted on the meta device."""
    meta = torch.device("meta")
    average = copy.deepcopy(net).requires_grad_(False)
    x0, conds = random_batch(grids, lengths, dims, meta)
    rng = SampleRNG.of_step(0, STEP, range(len(x0)))
    with FlopCounterMode(display=False) as counter:
        objective(net, average, x0, conds, rng, STEP).per_sample.mean().backward()
    return counter.get_total_flops()


def planned_peak(model: str, micro_batch: int, options: dict) -> float | None:
    """Peak GiB that `selfe plan` expects on one GPU without encoders."""
    suffix = {"0.5b": "_0.5b", "2b": ""}[model]
    gathering = options.get("gathering", GatherConfig())
    command = [
        *(sys.executable, "-m", "selfe", "plan", f"configs/train/selfe{suffix}.yaml", "--gpus", "1", "--json"),
        *(f"trainer.{key}={micro_batch}" for key in ("micro_batch_size", "total_batch_size")),
        *("trainer.phases=[]", f"trainer.gathering.reshard_after_forward={gathering.reshard_after_forward}"),
        f"trainer.activation_checkpointing={options['activation_checkpointing']}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    if done.returncode:
        raise RuntimeError(f"selfe plan failed: {done.stderr[-500:]}")
    memory = json.loads(done.stdout)["memory"]
    variant = next(v for v in memory["variants"] if v["configured"])
    return round((variant["peak"] - memory["encoders"]) / GIB, 2)


UNSHARDED = GatherConfig(reshard_after_forward=False)


def check_step_half_b(setting: Setting) -> Facts:
    """The 0.5B model. By FLOPs, Self-E costs 1.31 and Self-E with its auxiliary term 1.82 of flow matching."""
    both, every = list(OBJECTIVES)[:2], list(OBJECTIVES)
    measure = partial(measure_steps, setting, "0.5b")
    yield from measure(both, micro_batch=32, activation_checkpointing=True, planned=not setting.tiny)
    yield from measure(every, micro_batch=32, activation_checkpointing=False, gathering=UNSHARDED)
    yield from measure(both, micro_batch=64, mixed=True, activation_checkpointing=False, gathering=UNSHARDED)


def check_step_2b(setting: Setting) -> Facts:
    """The 2B model at 256 and 512 pixels."""
    both = list(OBJECTIVES)[:2]
    measure = partial(measure_steps, setting, "2b")
    yield from measure(both, micro_batch=32, activation_checkpointing=True, planned=not setting.tiny)
    yield from measure(both, micro_batch=8, activation_checkpointing="selective", gathering=UNSHARDED)
    yield from measure(both, micro_batch=8, pixels=512, activation_checkpointing=True, gathering=UNSHARDED)


def check_compiled(setting: Setting) -> Facts:
    """Compiled blocks on shapes that vary. Expected: few graphs, faster than without compilation."""
    both = list(OBJECTIVES)[:2]
    for model, micro_batch, recompute in (("0.5b", 64, False), ("2b", 16, True)):
        start = time.time()
        options = {"activation_checkpointing": recompute, "compile": True, "gathering": UNSHARDED}
        for facts in measure_steps(setting, model, both, micro_batch=micro_batch, mixed=True, **options):
            yield {"model": model} | facts
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        yield {"model": model, "seconds": round(time.time() - start, 1), "graphs": graphs}


def check_encoders(setting: Setting) -> Facts:
    """T5-XXL, CLIP-L, a small encoder of HFText and the autoencoder with random weights, as the trainer calls them."""
    small = {"t5": T5Size(64, 2, 4, 16, 128), "clip": ClipSize(32, 2, 2, 64)} if setting.tiny else {}
    with torch.device("meta"):
        text_encoder = T5Clip(skip_pretrained=True, **small)
        autoencoder = FluxVAE(skip_pretrained=True, width=32 if setting.tiny else 128)
        net = MMDiT(**setting.sizes("0.5b"))
    system = System(net, text_encoder, autoencoder, OBJECTIVES["Self-E"])

    start = time.time()
    system.load_encoders(setting.device)
    synchronize()
    yield {"what": "load", "seconds": round(time.time() - start, 1), "peak_gib": peak_gib(setting)}

    count = 4 if setting.tiny else 32
    captions = ["x" * (n - 1) for n in caption_lengths(count, 3)]  # one token per byte, and the end token
    elapsed, host = milliseconds(setting, lambda: text_encoder(captions), 3, 1)
    waits = host_waits(setting, lambda: text_encoder(captions))
    num_lengths = len(set(map(len, captions)))
    times = {"ms": elapsed, "host_ms": host, "waits": waits}
    yield {"what": "text", "captions": count, "lengths": num_lengths} | times

    # another text encoder, against its values on the CPU
    places = {}
    for device in (torch.device("cpu"), setting.device):
        places[device.type] = HFText("random", 384, skip_pretrained=True, max_tokens=512, dtype="fp32")
        places[device.type].load(device)
    small_encoder = places[setting.device.type]
    elapsed, host = milliseconds(setting, lambda: small_encoder(captions), 3, 1)
    waits = host_waits(setting, lambda: small_encoder(captions))
    here, there = (encoder(captions).text.tokens.cpu() for encoder in (places["cpu"], small_encoder))
    error = round(float((here - there).norm() / here.norm()), 8)
    yield {"what": "hf text", "captions": count, "ms": elapsed, "host_ms": host, "waits": waits, "error": error}

    sizes = ((count, 64),) if setting.tiny else ((32, 256), (16, 512), (2, 1024))
    for images, pixels in sizes:
        batch = [torch.rand(3, pixels, pixels, device=setting.device) * 2 - 1 for _ in range(images)]
        encode = milliseconds(setting, lambda: autoencoder.moments(batch), 3, 1)[0]  # noqa: B023 - called at once
        latent = packed(torch.randn((pixels // 16) ** 2, 64, device=setting.device), [(pixels // 16,) * 2])
        decode = milliseconds(setting, lambda: autoencoder.decode(latent), 3, 1)[0]  # noqa: B023 - called at once
        yield {"what": "autoencoder", "images": images, "pixels": pixels, "encode_ms": encode, "decode_one_ms": decode}

    # a complete micro-batch, from images on the host to gradients
    nets = fsdp.build_model_and_ema(net, fsdp.make_mesh(setting.world, None), "bf16", 0, gathering=UNSHARDED)
    pixels = 64 if setting.tiny else 256
    images = tuple(torch.randint(0, 255, (3, pixels, pixels), dtype=torch.uint8) for _ in range(count))

    def micro_batch() -> None:
        batch = Batch(images, tuple(captions), tuple(range(count)), ("",) * count).to(setting.device)
        system.loss(*nets, batch, SampleRNG.of_step(0, STEP, range(count)), STEP).per_sample.mean().backward()
        for parameter in nets[0].parameters():
            parameter.grad = None

    elapsed, host = milliseconds(setting, micro_batch, 3)
    waits = host_waits(setting, micro_batch)
    yield {"what": "micro-batch of 0.5b", "ms": elapsed, "host_ms": host, "waits": waits, "peak_gib": peak_gib(setting)}


def check_resume(setting: Setting) -> Facts:
    """The trainer on the smoke config in bf16: uninterrupted, and stopped and resumed. Expected: equal checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)

        def train(name: str, *overrides: str) -> float:
            """Seconds of a run."""
            start = time.time()
            command = [sys.executable, "-m", "selfe.train", "configs/debug/selfe_smoke.yaml"]
            settings = {"output_dir": runs / name, "precision": "bf16", "deterministic": "true", "checkpoint_every": 4}
            command += [f"trainer.{key}={value}" for key, value in settings.items()]
            environment = os.environ | {"PYTHONPATH": str(ROOT), "SELFE_SKIP_PRETRAINED": "1"}
            done = subprocess.run([*command, *overrides], cwd=ROOT, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise RuntimeError(f"run {name} failed: {done.stderr[-1500:]}")
            return round(time.time() - start, 1)

        seconds = [train("straight"), train("resumed", "trainer.stop_step=6"), train("resumed")]

        markers = [
            sorted((runs / name / "checkpoints").glob("step_*/progress.json"))[-1] for name in ("straight", "resumed")
        ]
        sums = [json.loads(marker.read_text())["files"] for marker in markers]
        metrics = [json.loads(line) for line in (runs / "straight/metrics.jsonl").read_text().splitlines()]
        yield {
            "seconds": seconds,
            "equal_files": {name: sums[0][name] == sums[1].get(name) for name in sums[0] if name != ".metadata"},
            "losses": [line["train/loss"] for line in metrics if "train/loss" in line],
        }


@torch.no_grad()
def check_sampling(setting: Setting) -> Facts:
    """Latency of one image of the 2B model with guidance 5, without encoders; and of a padded peer."""
    free_memory(setting)
    dims, device = text_dims(setting), setting.device
    with torch.device("meta"):
        net = MMDiT(**setting.sizes("2b"))
    net = net.to(torch.bfloat16).to_empty(device=device).requires_grad_(False)
    randomise(net)
    rng = SampleRNG(((0, "prompt", 0),))

    def sampling(pixels: int, num_steps: int, cfg_scale: float = 5.0) -> Callable[[], Tensor]:
        grids = image_grids(setting, 1, pixels, mixed=False)
        noise = packed(torch.randn(grids[0][0] * grids[0][1], 64, device=device), grids)
        t, s = flow.sampling_times(num_steps, 0.0, noise)
        denoise = guided(net, random_text([22], dims, device), random_text([1], dims, device), cfg_scale)
        return lambda: Renoise(1.0)(denoise, noise, t, s, rng)

    steps = (1, 2) if setting.tiny else (1, 2, 4, 8, 50)
    for pixels in (512, 1024):
        latency = {f"{n} steps": milliseconds(setting, sampling(pixels, n), 3, 1)[0] for n in steps}
        latency["4 steps, guidance 1"] = milliseconds(setting, sampling(pixels, 4, 1.0), 3, 1)[0]
        waits = host_waits(setting, sampling(pixels, 4))
        yield {"pixels": pixels, "ms": latency, "waits": waits, "peak_gib": peak_gib(setting)}

    yield from padded_peer(setting)
    if setting.cuda and not setting.tiny:
        activation_checkpoint.compile(net)
        yield {"pixels": 512, "compiled ms": {n: milliseconds(setting, sampling(512, n), 3)[0] for n in (1, 4)}}


def padded_peer(setting: Setting) -> Facts:
    """diffusers' FLUX transformer of the same size: captions padded to 512 tokens, two calls for a guided step."""
    try:
        from diffusers import FluxTransformer2DModel
    except ImportError:
        yield {"peer": "skipped: diffusers is not installed"}
        return

    sizes, dims, device = setting.sizes("2b"), text_dims(setting), setting.device
    with torch.device("meta"):
        peer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=sizes["num_double_blocks"],
            num_single_layers=sizes["num_single_blocks"],
            attention_head_dim=sizes["width"] // sizes["num_heads"],
            num_attention_heads=sizes["num_heads"],
            joint_attention_dim=dims["text_dim"],
            pooled_projection_dim=dims["pooled_dim"],
            axes_dims_rope=sizes["rope_axes"],
        )
    peer = peer.to(torch.bfloat16).to_empty(device=device)
    randomise(peer)

    for pixels in (512, 1024):
        count = 16 if setting.tiny else (pixels // 16) ** 2
        half = {"device": device, "dtype": torch.bfloat16}
        image, text = torch.randn(1, count, 64, **half), torch.randn(1, 512, dims["text_dim"], **half)
        inputs = image, text, torch.randn(1, dims["pooled_dim"], **half), torch.ones(1, device=device)
        places = torch.zeros(count, 3, device=device), torch.zeros(512, 3, device=device)
        four_steps = milliseconds(setting, lambda: [peer(*inputs, *places) for _ in range(8)], 2, 1)[0]  # noqa: B023
        yield {"peer": "diffusers, padded to 512 tokens", "pixels": pixels, "ms": {"4 steps": four_steps}}


def check_save(setting: Setting) -> Facts:
    """Saving and loading the state of the 0.5B model: what the training loop waits for, and what runs beside it."""
    free_memory(setting)
    with torch.device("meta"):
        net = MMDiT(**setting.sizes("0.5b"))
    net, average = fsdp.shard_model_and_ema(net, fsdp.make_mesh(setting.world, None), "bf16")
    for part in (net, average):
        part.to_empty(device=setting.device)
        randomise(part)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0, fused=True)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()

    folder = Path(tempfile.mkdtemp())
    manager = CheckpointManager(folder, RetentionPolicy(keep_last=1), setting.world)
    facts = {}
    for save in (1, 2):
        manager.wait()
        synchronize()
        begin = time.time()
        manager.begin(save, state.training_state(net, {"ema": average}, optimizer))
        copied = time.time()
        path = manager.finish() if save == 2 else manager.wait()
        facts |= {f"save {save}: call": copied - begin, f"save {save}: writing": time.time() - copied}

    before = [fsdp.local(parameter.detach()).clone() for parameter in net.parameters()]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    begin = time.time()
    step = state.load(path, net, {"ema": average}, optimizer)
    facts["load"] = time.time() - begin
    equal = all(torch.equal(fsdp.local(p.detach()), b) for p, b in zip(net.parameters(), before, strict=True))

    gib = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / GIB
    shutil.rmtree(folder)
    yield {"gib": round(gib, 2), "restored": step == 2 and equal, "seconds": {k: round(v, 3) for k, v in facts.items()}}


CHECKS: dict[str, tuple[Callable[[Setting], Facts], int]] = {  # name -> check, and the seconds it takes on an H100
    "card": (check_card, 10),
    "attention": (check_attention, 15),
    "parity": (check_parity, 15),
    "step_0.5b": (check_step_half_b, 60),
    "step_2b": (check_step_2b, 70),
    "encoders": (check_encoders, 45),
    "compiled": (check_compiled, 90),
    "resume": (check_resume, 70),
    "sampling": (check_sampling, 60),
    "save": (check_save, 30),
}


@contextmanager
def quick_compilation() -> Iterator[None]:
    """torch.compile without code generation, which takes minutes."""
    compile = torch.compile
    torch.compile = partial(compile, backend="aot_eager")
    try:
        yield
    finally:
        torch.compile = compile


def run_checks(names: Sequence[str], budget: float, tiny: bool, out: Path) -> bool:
    """Run checks in this process; returns whether all succeeded."""
    started, succeeded = time.time(), True

    def report(check: str, facts: dict) -> None:
        line = json.dumps({"check": check, "at": round(time.time() - started, 1)} | facts)
        print(line, flush=True)
        with out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    if tiny:
        torch.set_num_threads(1)
    with collectives.process_group() as world:
        setting = Setting(world, tiny, peak_tflops())
        for name in names:
            check, expected = CHECKS[name]
            if time.time() - started + expected > budget and not tiny:
                report(name, {"skipped": "no time left"})
                continue
            try:
                for facts in check(setting):
                    report(name, facts)
            except Exception:  # of any kind: it is reported and fails the script, after the other checks
                report(name, {"failed": traceback.format_exc()[-2500:]})
                succeeded = False
            free_memory(setting)
    return succeeded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file that JSON lines are appended to")
    parser.add_argument("--budget", type=float, default=470, help="seconds for all checks (default %(default)s)")
    parser.add_argument("--only", default=",".join(CHECKS), help="names of checks, separated by commas")
    parser.add_argument("--tiny", action="store_true", help="small sizes, and no code generation by torch.compile")
    options = parser.parse_args()

    names = options.only.split(",")
    if unknown := [name for name in names if name not in CHECKS]:
        parser.error(f"--only: unknown check {unknown[0]}; choose from {', '.join(CHECKS)}")
    if not torch.cuda.is_available() and not options.tiny:
        parser.error("no GPU found; on a CPU, use --tiny")

    if options.tiny:
        with quick_compilation():
            succeeded = run_checks(names, options.budget, True, options.out)
    else:
        succeeded = run_checks(names, options.budget, False, options.out)
    sys.stdout.flush()
    os._exit(0 if succeeded else 1)  # a gloo thread may abort an ordinary interpreter shutdown


if __name__ == "__main__":
    main()
