"""Run the batch of a skipped step again: `.venv/bin/python scripts/replay.py RUN STEP [key=value ...]`.

RUN is a run folder with `skipped/step_STEP.json`. The samples, their times and noise are those of the step. The
weights are those of the newest checkpoint at or before it; if that is the state before the step, the losses are the
step's too. One process.
"""

from __future__ import annotations

import json
import sys
from itertools import chain
from pathlib import Path

import torch

from selfe import checkpoint, config, dist, launch
from selfe.draws import Draws
from selfe.observe import Measured
from selfe.types import UserError


def main(arguments: list[str]) -> None:
    if len(arguments) < 2 or not arguments[1].isdecimal():
        raise UserError("replay.py RUN STEP [key=value ...]: name a run folder and a step that lies in its skipped/")
    folder, step = Path(arguments[0]), int(arguments[1])
    path = folder / "skipped" / f"step_{step:08d}.json"
    if not path.is_file():
        known = ", ".join(str(int(found.stem[5:])) for found in sorted(path.parent.glob("step_*.json"))) or "none"
        raise UserError(f"{path}: no such file; skipped steps of this run: {known}")
    told = json.loads(path.read_text(encoding="utf-8"))
    settings = config.load(folder / "config.yaml", arguments[2:])
    with dist.world() as world:
        replay(settings, told, before(folder / "checkpoints", step), world)


def before(folder: Path, step: int) -> Path | None:
    """The newest whole checkpoint of at most `step` finished steps."""
    whole = filter(checkpoint.is_whole, checkpoint.candidates(folder))
    return next((path for path in whole if checkpoint.read_step(path) <= step), None)


def replay(settings: dict, told: dict, found: Path | None, world: dist.World) -> None:
    """The step's micro-batches one after another, without an optimizer step; prints what was recorded and what came."""
    with torch.device("meta"):
        system = config.build(settings, "system")
    data, trainer = config.build(settings, "data"), config.build(settings, "trainer")
    seed, step = settings["seed"], told["step"]
    net, ema = dist.twins(system.backbone, world, trainer.precision, seed)
    system.load_encoders(world.device)
    done = checkpoint.load(found, net, ema, None, ("model", "ema", "step")) if found else 0
    print(f"step {step} with the weights after {done} steps ({found or 'the initial ones'})")
    measured, micro_batches = Measured(), told["micro_batches"]
    for samples in micro_batches:
        positions = [sample["position"] for sample in samples]
        batch = data.batch(seed, step, trainer.samples_at(step), positions, "train").to(world.device)
        loss = system.loss(net, ema, batch, Draws.of_step(seed, step, batch.positions), step)
        (loss.per_sample.mean() / len(micro_batches)).backward()
        measured.add(loss, batch)
    print(f"{'position':>8} {'t':>7} {'s':>7} {'recorded loss':>14} {'replayed loss':>14}  sample")
    for then, now in zip(chain(*micro_batches), chain(*measured.describe()), strict=True):
        losses = f"{then['loss']:14.7g} {now['loss']:14.7g}"
        print(f"{now['position']:8} {now['t']:7.4f} {now['s']:7.4f} {losses}  {now['name']}: {now['prompt']}")
    norm = dist.clip_grad_norm(net, float("inf")).item()
    print(f"gradient norm: recorded {told['grad_norm']:.7g}, replayed {norm:.7g}; the limit was {told['limit']:.7g}")


if __name__ == "__main__":
    sys.argv[0] = "replay.py"
    launch.worker(main)
