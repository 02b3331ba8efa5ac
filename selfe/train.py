"""The trainer: `python -m selfe.train CONFIG [key=value ...]`, one process per device, started by `run.sh`."""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from selfe import checkpoint, config, dist, ema, launch, log, pictures
from selfe.dist import World
from selfe.draws import Draws
from selfe.samplers.renoise import Renoise
from selfe.system import System
from selfe.types import Batch, Data, Precision, Sampler, UserError


@dataclass(frozen=True)
class Samples:
    """Pictures drawn during training: a row per prompt, a column per step count, always from the same noise."""

    every: int = 5000
    prompts: tuple[str, ...] = ()
    num_steps: tuple[int, ...] = (1, 2, 4, 8)
    size: tuple[int, int] = (256, 256)  # height, width
    cfg_scale: float = 5.0
    s_ratio: float = 0.0
    sampler: Sampler = Renoise()  # noqa: RUF009 - it has no state


@dataclass(frozen=True)
class Wandb:
    mode: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "selfe"


@dataclass(frozen=True)
class Trainer:
    """Everything about a run that is not the system or the data. Defaults are the paper's (arXiv 2512.22374, S.2)."""

    output_dir: str
    max_steps: int
    total_batch_size: int
    micro_batch_size: int
    stop_step: int | None = None  # stop here; the schedule still counts to max_steps
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
    activation_checkpointing: bool = True
    num_workers: int = 4
    log_every: int = 50
    checkpoint_every: int = 5000
    val_every: int = 5000
    val_batches: int = 1  # of total_batch_size pictures each
    samples: Samples = Samples()
    wandb: Wandb = Wandb()

    def __post_init__(self):
        for name in ("max_steps", "total_batch_size", "micro_batch_size", "log_every", "checkpoint_every", "val_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def lr_at(self, step: int) -> float:
        """Linear warm-up to `lr`, held until `decay_start`, then linear decay to `min_lr` at the last step."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        start = max(self.warmup_steps, self.decay_start)
        progress = (step - start) / max(self.max_steps - 1 - start, 1)
        return self.lr + (self.min_lr - self.lr) * min(max(progress, 0.0), 1.0)

    def micro_batches(self, world_size: int, batch_multiple: int) -> int:
        """Micro-batches per rank and step."""
        together = self.micro_batch_size * world_size
        if self.total_batch_size % together:
            raise UserError(
                f"trainer.total_batch_size: {self.total_batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size} x {world_size} processes; change one of the three"
            )
        if self.micro_batch_size % batch_multiple:
            raise UserError(
                f"trainer.micro_batch_size: the objective needs a multiple of {batch_multiple}, got "
                f"{self.micro_batch_size}; every micro-batch must have the same share of samples with s < t"
            )
        return self.total_batch_size // together

    def fit(self, system: System, data: Data, seed: int, world: World) -> None:
        """Train to `max_steps` (or `stop_step`), resuming from the newest checkpoint in `output_dir`."""
        Fit(self, system, data, seed, world).run()


class Fit:
    """A run in progress on one rank: the live and EMA denoisers, the optimizer, and where the run's files are."""

    def __init__(self, trainer: Trainer, system: System, data: Data, seed: int, world: World):
        self.trainer, self.system, self.data, self.seed, self.world = trainer, system, data, seed, world
        self.num_micro = trainer.micro_batches(world.size, system.objective.batch_multiple)
        self.folder = Path(trainer.output_dir)
        mesh = dist.make_mesh(world, trainer.shard_size)
        self.net, self.ema = system.backbone, copy.deepcopy(system.backbone).requires_grad_(False)
        for module, saves_memory in ((self.net, trainer.activation_checkpointing), (self.ema, False)):
            dist.shard(module, mesh, precision=trainer.precision, activation_checkpointing=saves_memory)
        system.load_encoders(world.device)
        for module in (self.net, self.ema):
            dist.materialise(module, world.device, seed)
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=trainer.lr, betas=trainer.betas, weight_decay=trainer.weight_decay, fused=True
        )
        found = checkpoint.latest(self.folder / "checkpoints")
        self.start = checkpoint.resume(found, self.net, self.ema, self.optimizer) if found else 0
        if found and world.is_main:
            log.say(f"resuming from {found}")

    def run(self) -> None:
        trainer, main = self.trainer, self.world.is_main
        end = min(trainer.max_steps, trainer.stop_step or trainer.max_steps)
        if self.start >= end:
            if main:
                log.say(f"nothing to do: {self.start} steps are done, and this run ends at {end}")
            return
        metrics = log.Metrics(self.folder, self.start, trainer.wandb.mode, trainer.wandb.project) if main else None
        progress = log.Progress("training", end, self.start, quiet=not main)
        measured, clock = defaultdict(list), time.perf_counter()
        micro_batches = self.micro_batches(end)
        for step in range(self.start, end):
            grad_norm = self.step(step, micro_batches, measured)
            done = step + 1
            note = ""
            if done % trainer.log_every == 0 or done == end:
                values = self.summary(measured, grad_norm, step, time.perf_counter() - clock)
                measured, clock = defaultdict(list), time.perf_counter()
                note = f"loss {values['loss']:.4f}"
                if main:
                    metrics.write(step, values)
            if done % trainer.val_every == 0 and self.data.has_val:
                values = self.validate(step)
                if main:
                    metrics.write(step, values)
            if done % trainer.samples.every == 0 and trainer.samples.prompts:
                self.draw_samples(done)
            progress.advance(1, note)
            if done % trainer.checkpoint_every == 0 or done == end:
                path = checkpoint.save(
                    self.folder / "checkpoints", done, self.net, self.ema, self.optimizer, self.world
                )
        progress.close()
        if main:
            metrics.close()
            log.say(f"{done} steps done; checkpoint: {path}")

    def step(self, step: int, micro_batches: Iterator[Batch], measured: dict[str, list[Tensor]]) -> Tensor:
        """One optimizer step over `num_micro` micro-batches; adds what it measured and returns the gradient norm."""
        trainer = self.trainer
        lr = trainer.lr_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for _ in range(self.num_micro):
            batch = expect(next(micro_batches))
            draws = Draws.of_step(self.seed, step, batch.positions)
            loss = self.system.loss(self.net, self.ema, batch, draws, step)
            # FSDP averages over ranks; with this division, accumulation averages over micro-batches too
            (loss.per_sample.mean() / self.num_micro).backward()
            for name, rows in ({"loss": loss.per_sample.detach()} | loss.metrics).items():
                measured[name].append(rows)
        grad_norm = dist.clip_grad_norm(self.net, trainer.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        ema.update(self.ema, self.net, ema.decay_at(step, trainer.ema_decay, trainer.ema_warmup))
        return grad_norm

    def summary(self, measured: dict[str, list[Tensor]], grad_norm: Tensor, step: int, seconds: float) -> dict:
        """Means over all ranks since the last summary."""
        num_samples = sum(len(rows) for rows in measured["loss"]) * self.world.size
        values = dist.mean_over_ranks(measured, self.world.device)
        values |= {"grad_norm": grad_norm.item(), "lr": self.trainer.lr_at(step)}
        if not all(map(torch.isfinite, map(torch.tensor, values.values()))):
            raise UserError(
                f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}: training has diverged; "
                "lower trainer.lr and start again from the last checkpoint"
            )
        return values | {"samples_per_second": num_samples / seconds}

    def micro_batches(self, end: int) -> Iterator[Batch | UserError]:
        """This rank's micro-batches from the start step on, loaded ahead by worker processes."""
        loader = DataLoader(
            self.part("train"),
            sampler=range(self.start * self.num_micro, end * self.num_micro),
            batch_size=None,
            num_workers=self.trainer.num_workers,
            generator=torch.Generator(),  # the loader would otherwise draw from the global one
        )
        return iter(loader)

    def part(self, split: Literal["train", "val"]) -> MicroBatches:
        trainer = self.trainer
        return MicroBatches(self.data, self.seed, trainer.total_batch_size, trainer.micro_batch_size, self.world, split)

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """The objective on fixed pictures with fixed times and noise, so that only the weights change its value."""
        part, measured = self.part("val"), defaultdict(list)
        for number in range(self.trainer.val_batches * self.num_micro):
            batch = expect(part[number])
            draws = Draws(tuple((self.seed, "val", number // self.num_micro, p) for p in batch.positions))
            loss = self.system.loss(self.net, self.ema, batch, draws, step)
            for name, rows in ({"loss": loss.per_sample} | loss.metrics).items():
                measured[f"val_{name}"].append(rows)
        return dist.mean_over_ranks(measured, self.world.device)

    def draw_samples(self, done: int) -> None:
        """A sheet of pictures by the EMA weights. All ranks draw equally many: sharded calls are collective."""
        samples, world = self.trainer.samples, self.world
        share = -(-len(samples.prompts) // world.size)
        mine = [(world.rank + i * world.size) % len(samples.prompts) for i in range(share)]
        prompts = [samples.prompts[i] for i in mine]
        drawn = {}
        for num_steps in samples.num_steps:
            images = self.system.generate(
                self.ema,
                prompts,
                [samples.size] * share,
                Draws.of_pictures([(self.seed, prompt, 0) for prompt in prompts]),
                sampler=samples.sampler,
                num_steps=num_steps,
                cfg_scale=samples.cfg_scale,
                s_ratio=samples.s_ratio,
            )
            drawn |= {(i, num_steps): pictures.to_image(image) for i, image in zip(mine, images, strict=True)}
        everyone = {key: image for part in dist.gather(drawn, world) for key, image in part.items()}
        if world.is_main:
            sheet = pictures.grid([[everyone[i, n] for n in samples.num_steps] for i in range(len(samples.prompts))])
            path = self.folder / "samples" / f"step_{done:08d}.png"
            path.parent.mkdir(exist_ok=True)
            sheet.save(path)


@dataclass(frozen=True)
class MicroBatches(Dataset):
    """One rank's micro-batches by their number in the whole run.

    A user's mistake is handed over, not raised: an exception that crosses processes arrives as a traceback.
    """

    data: Data
    seed: int
    total: int
    micro: int
    world: World
    split: Literal["train", "val"]

    def __getitem__(self, number: int) -> Batch | UserError:
        per_rank = self.total // self.world.size
        step, place = divmod(number, per_rank // self.micro)
        first = self.world.rank * per_rank + place * self.micro
        try:
            return self.data.batch(self.seed, step, self.total, range(first, first + self.micro), self.split)
        except UserError as error:
            return error


def expect(batch: Batch | UserError) -> Batch:
    if isinstance(batch, UserError):
        raise batch
    return batch


def main(arguments: list[str]) -> None:
    settings = config.load(arguments[0], arguments[1:])
    with torch.device("meta"):
        system = config.build(settings, "system")
    data, trainer = config.build(settings, "data"), config.build(settings, "trainer")
    with dist.world() as world:
        if world.is_main:
            folder = Path(trainer.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            config.save(settings, folder / "config.yaml")
        trainer.fit(system, data, settings["seed"], world)


if __name__ == "__main__":
    launch.worker(main)
