"""The verb `selfe replay`: run the batch of a skipped step again, in one process.

The batch is described by `RUN/skipped/step_STEP.json`; samples, times and noise are those of the recorded step. The
weights come from the newest checkpoint before it, so the losses match the recorded ones only if that checkpoint holds
the state just before the step.
"""

from __future__ import annotations

import argparse
import json
from itertools import chain
from pathlib import Path

import torch

from selfe import config
from selfe.checkpoint import adapter, origin, state, verify
from selfe.device import choose_precision
from selfe.distributed import collectives, fsdp
from selfe.errors import UserError
from selfe.rng import SampleRNG
from selfe.training.metrics import MetricAccumulator
from selfe.training.settings import without_evaluation
from selfe.types import raise_if_not_finite


def main(options: argparse.Namespace) -> None:
    """Entry point of `selfe replay`."""
    folder, step = options.run, options.step
    path = folder / "skipped" / f"step_{step:08d}.json"
    if not path.is_file():
        known = ", ".join(str(int(file.stem[5:])) for file in sorted(path.parent.glob("step_*.json"))) or "none"
        raise UserError(f"{path}: no such file; skipped steps of this run: {known}")
    record = json.loads(path.read_text(encoding="utf-8"))

    settings = config.load(folder / "config.yaml", options.overrides)
    with collectives.process_group() as world:
        replay(settings, record, before(folder / "checkpoints", step - 1), world)


def before(folder: Path, step: int) -> Path | None:
    """The newest complete checkpoint with at most `step` finished steps; None if there is none."""
    complete = filter(verify.is_complete, verify.list_checkpoints(folder))
    return next((path for path in complete if verify.read_step(path) <= step), None)


def replay(settings: dict, record: dict, checkpoint: Path | None, world: collectives.World) -> None:
    """Forward and backward on the step's micro-batches, without an optimizer step; prints both sets of values."""
    # build the system as the trainer does, then load the weights
    with torch.device("meta"):
        system = config.build(settings, "system")
    data, trainer = config.build(settings, "data"), without_evaluation(settings)
    seed, number = settings["seed"], record["step"]
    step = number - 1  # completed before it
    precision = choose_precision(trainer.precision, world.device)
    if trainer.adapt is not None:
        trainer.adapt.apply(system.backbone)
    net, ema = fsdp.build_model_and_ema(system.backbone, fsdp.make_mesh(world, None), precision, seed)
    averages, report = {"ema": ema}, trainer.output_dir / "init_from.txt"
    if trainer.adapt is not None:
        adapter.load_base(trainer.init_from, net, averages, world, **trainer.adapt.record(), report=report)
    system.load_encoders(world.device)
    if checkpoint:
        done = state.load(checkpoint, net, averages, None, ("model", "ema", "step"))
    elif trainer.init_from is not None and trainer.adapt is None:
        done, _ = origin.load(trainer.init_from, net, averages, None, world, report)
    else:
        done = 0
    print(f"step {number} with the weights after {done} steps ({checkpoint or 'initial weights'})")

    # positions and the step select the same samples and the same random numbers as in training
    measured, micro_batches = MetricAccumulator(), record["micro_batches"]
    for samples in micro_batches:
        positions = [sample["position"] for sample in samples]
        batch = data.batch(seed, step, trainer.samples_at(step), positions, "train").to(world.device)
        loss = system.loss(net, ema, batch, SampleRNG.of_step(seed, step, batch.positions), step)
        raise_if_not_finite(loss.checks)
        (loss.per_sample.mean() / len(micro_batches)).backward()
        measured.add(loss, batch)

    print(f"{'position':>8} {'t':>7} {'s':>7} {'recorded loss':>14} {'replayed loss':>14}  sample")
    for then, now in zip(chain(*micro_batches), chain(*measured.describe()), strict=True):
        losses = f"{then['loss']:14.7g} {now['loss']:14.7g}"
        print(f"{now['position']:8} {now['t']:7.4f} {now['s']:7.4f} {losses}  {now['name']}: {now['prompt']}")

    norm = fsdp.grad_norm(net).item()
    recorded, limit = record["grad_norm"], record["limit"]
    print(f"gradient norm: recorded {recorded:.7g}, replayed {norm:.7g}; limit {limit:.7g}")
