"""The trainer: `python -m selfe.train CONFIG [key=value ...]`, one process per device, started by `run.sh`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise, product
from pathlib import Path

import torch

from selfe import checkpoint, config, dist, ema, flux_format, folder, health, launch, loading, log
from selfe.blocks import Recompute
from selfe.clock import Clock
from selfe.device import set_deterministic
from selfe.dist import Gathering, World
from selfe.draws import Draws
from selfe.health import Guard, Health
from selfe.loading import MicroBatches, expect
from selfe.observe import Cells, Measured, ema_distance, write_cells
from selfe.pictures import save_sheet
from selfe.saving import Keep, Saver
from selfe.sheets import Samples
from selfe.signals import Ear, Stopped
from selfe.sinks import Sinks, Wandb
from selfe.system import System
from selfe.types import Batch, Data, Precision, Split, UserError, at_least
from selfe.watch import Watch


@dataclass(frozen=True)
class Phase:
    """From `step` on: a batch size, and a learning rate that falls linearly from there to `min_lr` at the last step."""

    step: int
    lr: float | None = None
    total_batch_size: int | None = None


@dataclass(frozen=True)
class Trainer:
    """Everything about a run that is not the system or the data. Defaults are the paper's (arXiv 2512.22374, S.2)."""

    output_dir: str
    max_steps: int
    total_batch_size: int
    micro_batch_size: int
    phases: tuple[Phase, ...] = ()  # in the order of their steps
    stop_step: int | None = None  # stop here; the schedule still counts to max_steps
    init_from: str | checkpoint.InitFrom | None = None  # for a run that has no checkpoint of its own yet
    lr: float = 3e-4
    min_lr: float = 1e-5
    warmup_steps: int = 1000
    decay_start: int = 0  # until this step, if it is later than the warm-up, the learning rate stays at lr
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.9999
    ema_warmup: bool = False
    precision: Precision = "bf16"
    shard_size: int | None = None  # ranks that share one copy of the parameters; the others replicate it
    shard_text_encoder: bool = False  # cut T5 over the same ranks: less memory, more traffic
    gathering: Gathering = Gathering()  # noqa: RUF009 - frozen
    activation_checkpointing: Recompute = True  # k: of every k-th block; selective: of all, but only what is cheap
    compile: bool = False  # every block, once for all shapes; takes a minute or more at the start
    deterministic: bool = False  # the same bits every time on accelerators too, where it is slower
    timeout_minutes: float = 10  # without progress on any process; then all end
    num_workers: int = 4
    health: Health = Health()  # noqa: RUF009 - frozen
    peak_tflops: float | None = None  # of one device, for the estimate of its use (MFU); null: looked up by its name
    log_every: int = 50
    checkpoint_every: int = 5000
    checkpoints: Keep = Keep()  # noqa: RUF009 - frozen
    cells_every: int = 1000  # a multiple of log_every
    val_every: int = 5000
    val_batches: int = 1  # of total_batch_size pictures each
    samples: Samples = Samples()  # noqa: RUF009 - frozen
    wandb: Wandb = Wandb()  # noqa: RUF009 - frozen
    tensorboard: bool = False

    def __post_init__(self):
        at_least(1, self, "max_steps", "total_batch_size", "micro_batch_size", "log_every", "checkpoint_every")
        at_least(1, self, "cells_every", "val_every", "val_batches")
        at_least(0, self, "lr", "min_lr", "warmup_steps", "decay_start", "weight_decay", "clip_norm", "num_workers")
        if not all(0 <= beta < 1 for beta in self.betas) or not 0 <= self.ema_decay <= 1:
            raise ValueError(f"betas lie in [0, 1), ema_decay in [0, 1], got {self.betas} and {self.ema_decay}")
        steps = [phase.step for phase in self.phases]
        if steps != sorted(set(steps)):
            raise ValueError(f"phases must be in the order of their steps, got {steps}")

    def lr_at(self, step: int) -> float:
        """Linear warm-up to `lr`, held until `decay_start`, then linear decay to `min_lr` at the last step."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        falls = [(max(self.warmup_steps, self.decay_start), self.lr)]
        falls += [(phase.step, phase.lr) for phase in self.phases if phase.lr and phase.step <= step]
        start, lr = falls[-1]
        progress = (step - start) / max(self.max_steps - 1 - start, 1)
        return lr + (self.min_lr - lr) * min(max(progress, 0.0), 1.0)

    def samples_at(self, step: int) -> range:
        """The step's samples, numbered over the run."""
        sizes = [(0, self.total_batch_size)]
        sizes += [(p.step, p.total_batch_size) for p in self.phases if p.total_batch_size and p.step <= step]
        first = sum(total * (end - begin) for (begin, total), (end, _) in pairwise([*sizes, (step, 0)]))
        return range(first, first + sizes[-1][1])

    def micro_batches(self, world_size: int, batch_multiple: int, step: int = 0) -> int:
        """Micro-batches per rank in a step."""
        together, total = self.micro_batch_size * world_size, len(self.samples_at(step))
        if total % together:
            raise UserError(
                f"trainer.total_batch_size: {total} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size} x {world_size} processes; change one of the three"
            )
        if self.micro_batch_size % batch_multiple:
            raise UserError(
                f"trainer.micro_batch_size: the objective needs a multiple of {batch_multiple}, got "
                f"{self.micro_batch_size}; every micro-batch must have the same share of samples with s < t"
            )
        return total // together

    def fit(self, system: System, data: Data, seed: int, world: World) -> None:
        """Train to `max_steps` (or `stop_step`), resuming from the newest checkpoint in `output_dir`."""
        Fit(self, system, data, seed, world).run()


class Fit:
    """A run in progress on one rank: the live and EMA denoisers, the optimizer, and where the run's files are."""

    def __init__(self, trainer: Trainer, system: System, data: Data, seed: int, world: World):
        self.trainer, self.system, self.data, self.seed, self.world = trainer, system, data, seed, world
        for step in (0, *(phase.step for phase in trainer.phases)):  # every batch size is checked before the first step
            self.num_micro(step)
        system.check_data(data)
        self.folder = Path(trainer.output_dir)
        names = "shard_size", "activation_checkpointing", "compile", "gathering"
        how = {name: getattr(trainer, name) for name in names}
        self.net, self.ema = dist.twins(system.backbone, world, trainer.precision, seed, **how)
        cut = partial(dist.place_sharded, mesh=dist.make_mesh(world, trainer.shard_size))
        system.load_encoders(world.device, cut if trainer.shard_text_encoder else None)
        trainer.samples.check(system)
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=trainer.lr, betas=trainer.betas, weight_decay=trainer.weight_decay, fused=True
        )
        self.saver = Saver(self.folder / "checkpoints", trainer.checkpoints, world)
        found = checkpoint.newest_good(self.saver.folder, world)
        self.start = checkpoint.load(found, self.net, self.ema, self.optimizer) if found else self.initialise()
        self.guard = Guard(trainer.health, checkpoint.read_marker(found)["guard"] if found else None)
        self.measured, self.cells, self.clock = Measured(), Cells(), Clock(world.device, trainer.peak_tflops)
        self.steps_logged, self.replaced = self.start, 0
        if found and world.is_main:
            log.say(f"resuming from {found}")

    def num_micro(self, step: int) -> int:
        return self.trainer.micro_batches(self.world.size, self.system.objective.batch_multiple, step)

    def initialise(self) -> int:
        """The first step of a run that has no checkpoint of its own yet, with what `init_from` brings."""
        origin, main = self.trainer.init_from, self.world.is_main
        if origin is None:
            return 0
        if isinstance(origin, str) and flux_format.holds_weights(Path(origin)):
            found = flux_format.warm_start(Path(origin), self.net, self.ema)
            if main:
                log.say(found.tell(self.folder / "init_from.txt"))
            return 0
        origin = checkpoint.InitFrom(origin) if isinstance(origin, str) else origin
        if main:
            log.say(f"starting from {', '.join(origin.parts)} of {origin.path}")
        path = dist.broadcast(checkpoint.find(Path(origin.path)) if main else None, self.world)
        return checkpoint.load(path, self.net, self.ema, self.optimizer, origin.parts)

    def run(self) -> None:
        trainer, main = self.trainer, self.world.is_main
        end = min(trainer.max_steps, trainer.stop_step or trainer.max_steps)
        if self.start >= end:
            return self.part_with(f"nothing to do: {self.start} steps are done, and this run ends at {end}", stop=0)
        sinks = Sinks(self.folder, self.start, trainer.wandb, trainer.tensorboard, main)
        progress = log.Progress("training", end, self.start, quiet=not main)
        ear, watch = Ear(), Watch(self.world, trainer.timeout_minutes, partial(launch.end, 1))
        order = ((step, place) for step in range(self.start, end) for place in range(self.num_micro(step)))
        micro_batches = loading.ahead(self.part("train"), order, trainer.num_workers)
        for step in range(self.start, end):
            launch.STATUS["step"] = step
            watch.beat(step, "training")
            if trainer.health.compare_every and step % trainer.health.compare_every == 0:
                dist.compare_replicas(self.net, self.world, trainer.shard_size, f"step {step}")
            grad_norm, stop = self.step(step, micro_batches, lambda: ear.heard)
            done, last = step + 1, step + 1 == end or stop > 0
            values = self.summary(step, grad_norm) if done % trainer.log_every == 0 or last else {}
            if done % trainer.cells_every == 0:
                self.write_cells(step, sinks)
            if done % trainer.val_every == 0 and self.data.has_val:
                watch.beat(step, "validating", limited=False)
                values |= self.validate(step)
            dist.reshard(self.net)
            if values:
                sinks.numbers(step, values)
            progress.advance(1, f"loss {values['loss']:.4f}" if "loss" in values else "")
            if done % trainer.checkpoint_every == 0 or last:
                watch.beat(step, "saving", limited=False)
                self.save(done, values.get("val_plain_loss"))
            if done % trainer.samples.every == 0 and trainer.samples.prompts:
                watch.beat(step, "drawing", limited=False)
                self.draw_samples(done, sinks)
            if last:
                break
        watch.beat(step, "saving", limited=False)
        path = self.saver.finish()
        for part in (progress, watch, ear, sinks):
            part.close()
        self.part_with(f"{done} steps done; checkpoint: {path}", stop)

    def part_with(self, message: str, stop: int) -> None:
        """The last word of a run, and how its processes end if a signal asked for it."""
        if stop:
            message = f"stopped by {signal.Signals(stop).name}: {message}; the same command continues"
        if self.world.is_main:
            log.say(message)
        if stop:
            raise Stopped(stop, message)

    def save(self, done: int, score: float | None) -> None:
        self.clock.mark("checkpoint")
        state = checkpoint.training_state(self.net, self.ema, self.optimizer)
        self.saver.begin(done, state, {"score": score, "guard": self.guard.memory})
        self.clock.mark("other")

    def step(self, step: int, micro_batches: Iterator[Batch], heard: Callable[[], int]) -> tuple[float, int]:
        """One optimizer step over this rank's micro-batches, unless its gradient is sick.

        Returns the gradient norm, and the signal that any process has heard.
        """
        trainer, clock, measured = self.trainer, self.clock, Measured()
        num_micro = self.num_micro(step)
        for group in self.optimizer.param_groups:
            group["lr"] = trainer.lr_at(step)
        for _ in range(num_micro):
            clock.mark("data")
            batch = expect(next(micro_batches))
            log.quarantine(self.folder, batch.replaced)
            self.replaced += len(batch.replaced)
            batch = batch.to(self.world.device)
            clock.mark("encode")
            draws = Draws.of_step(self.seed, step, batch.positions)
            loss = self.system.loss(clock.around(self.net), clock.around(self.ema), batch, draws, step)
            clock.mark("backward")
            # FSDP averages over ranks; with this division, accumulation averages over micro-batches too
            (loss.per_sample.mean() / num_micro).backward()
            measured.add(loss, batch)
        clock.mark("optimizer")
        limit = self.guard.limit()
        grad_norm = dist.clip_grad_norm(self.net, trainer.clip_norm)
        grad_norm, stop = dist.agree(grad_norm, heard(), self.world.device)
        if self.guard.accepts(grad_norm):
            self.optimizer.step()
            ema.update(self.ema, self.net, ema.decay_at(step, trainer.ema_decay, trainer.ema_warmup))
            self.measured.extend(measured)
        else:
            self.skip(step, grad_norm, limit, measured)
        self.optimizer.zero_grad(set_to_none=True)
        clock.mark("other")
        return grad_norm, stop

    def skip(self, step: int, grad_norm: float, limit: float, measured: Measured) -> None:
        """Tell and record a step that is not taken; the same verdict on every rank."""
        parts = dist.gather(measured.describe(), self.world)
        if self.world.is_main:
            path = health.record(self.folder / "skipped", step, grad_norm, limit, list(chain(*parts)))
            log.say(f"step {step} skipped: gradient norm {grad_norm:.4g}, limit {limit:.4g}; its samples: {path}")
        self.guard.check(step, grad_norm)

    def summary(self, step: int, grad_norm: float) -> dict[str, float]:
        """Means over all ranks since the last summary, and where the time went."""
        device, measured, self.measured = self.world.device, self.measured, Measured()
        values = measured.means(device) | {"grad_norm": grad_norm, "lr": self.trainer.lr_at(step)}
        self.cells.add(measured.cells(device))
        values |= {"ema_distance": ema_distance(self.ema, self.net, device), "skipped": self.guard.skipped}
        values["replaced"] = int(dist.sum_over_ranks(torch.tensor([float(self.replaced)], device=device)))
        self.replaced = 0
        num_samples = self.trainer.samples_at(step).stop - self.trainer.samples_at(self.steps_logged).start
        self.steps_logged = step + 1
        return values | self.clock.rates(num_samples, self.world.size)

    def part(self, split: Split) -> MicroBatches:
        sizes = self.trainer.samples_at, self.trainer.micro_batch_size, self.system.objective.batch_multiple
        return MicroBatches(self.data, self.seed, *sizes, self.world, split)

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """The objective on fixed pictures, times and noise, by the live and the EMA weights; and, because its schedule
        changes it too, as it is at step 0 (of Self-E: flow matching), which compares over a whole run."""
        self.clock.mark("validation")
        part, values = self.part("val"), {}
        now_and_plain = {"val_": (self.net, step), "val_ema_": (self.ema, step), "val_plain_": (self.ema, 0)}
        for prefix, (net, at) in now_and_plain.items():
            measured = Measured()
            for number, place in product(range(self.trainer.val_batches), range(self.num_micro(0))):
                batch = expect(part[number, place]).to(self.world.device)
                draws = Draws(tuple((self.seed, "val", number, p) for p in batch.positions))
                measured.add(self.system.loss(net, self.ema, batch, draws, at), batch)
            values |= measured.means(self.world.device, prefix)
        self.clock.mark("other")
        return values

    def write_cells(self, step: int, sinks: Sinks) -> None:
        means = self.cells.take()
        if self.world.is_main and means:
            sinks.picture(step, "cells", write_cells(self.folder, step, means))

    def draw_samples(self, done: int, sinks: Sinks) -> None:
        self.saver.wait()  # so that what fails in drawing costs no step
        self.clock.mark("samples")
        nets = {"samples": self.ema, "samples_live": self.net}
        for name, sheet in self.trainer.samples.draw(self.system, nets, self.seed, self.world).items():
            sinks.picture(done - 1, name, save_sheet(sheet, self.folder / name, done))
        dist.reshard(self.net)
        self.clock.mark("other")


def main(arguments: list[str]) -> None:
    settings = config.load(arguments[0], arguments[1:])
    with torch.device("meta"):
        system = config.build(settings, "system")
    data, trainer = config.build(settings, "data"), config.build(settings, "trainer")
    set_deterministic(trainer.deterministic)
    # the watch speaks of ranks and steps, the process group only of operations: let the watch be first
    with dist.world(timeout_minutes=2 * trainer.timeout_minutes + 1) as world:
        if world.is_main:
            folder.describe(Path(trainer.output_dir), settings, sys.argv, world.size)
        trainer.fit(system, data, settings["seed"], world)


if __name__ == "__main__":
    launch.worker(main)
