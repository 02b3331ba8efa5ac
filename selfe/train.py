"""The trainer: `python -m selfe.train CONFIG [key=value ...]`, one process per device, started by `run.sh`."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, product
from pathlib import Path

import torch

from selfe import config, errors, launch, log
from selfe.checkpoint import adapter, origin, state, verify
from selfe.checkpoint.adapter import AdapterRecord
from selfe.checkpoint.manager import CheckpointManager
from selfe.data import loader
from selfe.data.cached import CachedData
from selfe.data.loader import MicroBatches, raise_if_error
from selfe.device import choose_precision, device_name, set_deterministic
from selfe.distributed import collectives, fsdp
from selfe.distributed.collectives import World
from selfe.errors import UserError
from selfe.io.folder_lock import FolderLock, removed_on_failure
from selfe.io.image_encode import save_sheet
from selfe.optimizers.groups import trained
from selfe.protocols import Data
from selfe.rng import SampleRNG
from selfe.signals import Stopped, StopSignal
from selfe.system import System
from selfe.training import banners, ema, grad_guard, run_info
from selfe.training import evaluation as evaluations
from selfe.training.evaluation import Evaluator
from selfe.training.grad_guard import GradGuard
from selfe.training.loggers import Loggers
from selfe.training.metrics import MetricAccumulator, TimeGrid, ema_distance, write_cells
from selfe.training.profiling import Profiler
from selfe.training.settings import TrainerConfig
from selfe.training.throughput import ManualGC, StepTimer
from selfe.training.watchdog import Watchdog
from selfe.types import Batch, Split, is_due, raise_if_not_finite


class Trainer:
    """A training run on one rank: live and EMA denoisers, optimizer, and the output directory.

    Constructing it shards and initialises the denoisers, loads the encoders, and resumes from the newest valid
    checkpoint if there is one. Raises UserError if the settings, the system and the data do not fit together.
    """

    def __init__(self, cfg: TrainerConfig, system: System, data: Data, seed: int, world: World):
        self.cfg, self.system, self.data, self.seed, self.world = cfg, system, data, seed, world

        # validate every batch size of the schedule before the first step
        for step in (0, *(phase.step for phase in cfg.phases)):
            self.num_micro(step)
        system.check_data(data)
        self.folder = Path(cfg.output_dir)
        self.evaluator = None if cfg.evaluate is None else Evaluator(cfg.evaluate, system, self.folder, world)

        # live and EMA denoisers, both sharded; the text encoder is sharded over the same ranks on request
        if cfg.adapt is not None:
            cfg.adapt.apply(system.backbone)
        mesh = fsdp.make_mesh(world, cfg.shard_size)
        precision = choose_precision(cfg.precision, world.device)
        self.tracks = cfg.ema_tracks
        self.net, averages = fsdp.build_model_and_averages(
            system.backbone,
            mesh,
            precision,
            seed,
            count=len(self.tracks),
            activation_checkpointing=cfg.activation_checkpointing,
            compile=cfg.compile,
            gathering=cfg.gathering,
        )
        self.averages = dict(zip(self.tracks, averages, strict=True))
        self.ema = self.averages["ema"]
        shard_encoder = partial(fsdp.load_sharded, mesh=mesh)
        system.load_encoders(world.device, shard_encoder if cfg.shard_text_encoder else None)
        cfg.samples.check(system)
        if self.evaluator:
            self.evaluator.prepare()

        self.optimizer = cfg.optimizer.build(
            self.net, lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay, precision=precision
        )

        # totals of the entire run, over all starts: images that all ranks have learned from, and seconds of training
        self.samples, self.elapsed_before = 0, 0.0

        # resume from the newest valid checkpoint, or initialise a new run
        self.saver = CheckpointManager(self.folder / "checkpoints", cfg.checkpoints, world)
        newest = verify.newest_valid(self.saver.folder, world)
        self.adapter = None if cfg.adapt is None else self.load_base(newest)
        if newest:
            adapter.check_resumed(newest, self.adapter, self.net)
        self.start = self.resume(newest) if newest else self.initialise()
        marker = verify.read_marker(newest) if newest else {"guard": None}
        self.guard = GradGuard(cfg.health, marker["guard"])
        if newest:
            self.samples, self.elapsed_before = marker["samples"], marker["elapsed"]
        self.begun = time.monotonic()

        # statistics since the last logged step
        self.measured, self.cells = MetricAccumulator(), TimeGrid()
        num_trained = sum(parameter.numel() for _, parameter in trained(self.net))
        trained_share = num_trained / banners.num_parameters([self.net])
        self.clock = StepTimer(world.device, cfg.peak_tflops, trained_share)
        self.num_steps = 0
        self.replaced = 0  # images of this rank that could not be read
        self.num_samples = self.num_tokens = 0  # of this rank, in the steps that were not skipped

        # since this start: whether any step was not skipped, and a description of the last one that was
        self.has_learned, self.last_skip = False, ""

        if newest and world.is_main:
            log.print_line(f"resuming from {newest}")

    def num_micro(self, step: int) -> int:
        """Micro-batches per rank in a step."""
        return self.cfg.micro_batches(self.world.size, self.system.objective.batch_multiple, step)

    def resume(self, path: Path) -> int:
        """Load a checkpoint of this run, and return the number of its steps.

        Where `allow_changes` permits another optimizer or another average of the weights, those start anew.
        """
        stored = state.list_weights(path)
        started_anew = [name for name in self.averages if name not in stored]
        parts = state.PARTS
        may_change = any(key.startswith("trainer.optimizer") for key in self.cfg.allow_changes)
        if may_change and state.optimizer_problem(path, self.net, self.optimizer):
            parts = tuple(part for part in parts if part != "optimizer")
            started_anew.append("state of the optimizer")

        done = state.load(path, self.net, self.averages, self.optimizer, parts)
        if "optimizer" not in parts:
            self.optimizer.state.clear()  # `optimizer_problem` has created one
        if started_anew and self.world.is_main:
            log.print_line(f"not in {path}, so started anew: {', '.join(started_anew)}")
        return done

    def load_base(self, resumed: Path | None) -> AdapterRecord:
        """Load the weights that this run fine-tunes, and return what its checkpoints record of them.

        `resumed`: the checkpoint from which the run continues.
        """
        cfg = self.cfg
        options = cfg.adapt.record() | {"report": self.folder / "init_from.txt", "resumed": resumed}
        return adapter.load_base(cfg.init_from, self.net, self.averages, self.world, **options)

    def initialise(self) -> int:
        """Start a run that has no checkpoint yet, loading what `init_from` names. Returns the first step."""
        if self.cfg.init_from is None or self.adapter is not None:
            return 0
        report = self.folder / "init_from.txt"
        done, self.samples = origin.load(
            self.cfg.init_from, self.net, self.averages, self.optimizer, self.world, report
        )
        return done

    def run(self, settings: dict | None = None) -> None:
        """Train to `max_steps`, `stop_step` or a stop signal, then save. Raises Stopped after a signal.

        Args:
            settings: the complete config, recorded by Weights & Biases and TensorBoard.
        """
        cfg, main = self.cfg, self.world.is_main
        end = cfg.max_steps if cfg.stop_step is None else min(cfg.max_steps, cfg.stop_step)
        evaluation_is_missing = self.evaluator is not None and self.evaluator.is_missing(self.start)
        nothing_to_do = f"nothing to do: {self.start} steps are done, and this run ends at {end}"
        if self.start >= end and not evaluation_is_missing:
            return self.finish(nothing_to_do, stop=0)

        record = config.plain(settings or {})
        loggers = Loggers(self.folder, self.start, cfg.wandb, cfg.tensorboard, cfg.loggers, record, main)
        progress = log.Progress("training", end, self.start, quiet=not main, unit="step")
        watch = Watchdog(self.world, cfg.timeout_minutes, partial(launch.end, 1))
        stop_signal = StopSignal(0.9 * launch.grace_seconds(), self.end_late)
        profiler, garbage = Profiler(cfg.profile, self.folder, self.world), ManualGC()
        background = (progress, watch, stop_signal, loggers, garbage)

        if main:
            run = (cfg, self.system, self.data, self.net, self.seed, self.world)
            log.print_line(banners.start(*run, step=self.start, num_micro=self.num_micro(self.start)))

        # an evaluation that an interruption has prevented
        if self.evaluator:
            self.evaluator.remove_later(self.start)
        if evaluation_is_missing:
            watch.heartbeat(self.start, "evaluating", limited=False)
            self.evaluate(self.start, loggers)
        if self.start >= end:
            for service in background:
                service.close()
            return self.finish(nothing_to_do, stop=0)

        # one data loader for the run; workers prefetch micro-batches in this order
        order = ((step, place) for step in range(self.start, end) for place in range(self.num_micro(step)))
        micro_batches = loader.make_loader(self.part("train"), order, cfg.num_workers)

        for step in range(self.start, end):
            # `step` steps are completed; messages, files and metrics name this one by its number, which is one more
            done, last = step + 1, step + 1 == end
            launch.STATUS["step"] = done  # reported if this process fails
            # the first step of a phase may compile for minutes; the timeout of the process group still holds
            watch.heartbeat(done, "training", limited=not (cfg.compile and self.is_first_of_phase(step)))
            if is_due(step, cfg.health.compare_every):
                fsdp.compare_replicas(self.net, self.world, cfg.shard_size, f"step {done}")

            # train; the stop signal is the same on all ranks, so all leave the loop after the same step
            profiler.before(step)
            loss, grad_norm, stop = self.step(step, micro_batches, lambda: stop_signal.received)
            last = last or stop > 0
            profiler.after(step, last)
            garbage.after(step)

            # metrics and validation
            values = self.summary(step, grad_norm) if is_due(done, cfg.log_every) or last else {}
            if is_due(done, cfg.cells_every):
                self.write_cells(done, loggers)
            if is_due(done, cfg.val_every) and self.data.has_val:
                watch.heartbeat(done, "validating", limited=False)
                values |= self.validate(step)
            fsdp.reshard(self.net)  # forward passes without a backward pass leave parameters unsharded
            if values:
                loggers.numbers(done, self.totals() | values)
            terms = self.system.objective.phase(step)
            progress.advance(1, f"loss {loss:.4f}, lr {cfg.lr_at(step):.3g}, grad norm {grad_norm:.3g}, {terms}")

            # checkpoint, if there is anything new; written to disk in the background
            if self.has_learned and (is_due(done, cfg.checkpoint_every) or last):
                watch.heartbeat(done, "saving", limited=False)
                self.save(done, values.get("val_plain/loss"))

            # sample grids
            if is_due(done, cfg.samples.every) and cfg.samples.prompts:
                watch.heartbeat(done, "sampling", limited=False)
                self.draw_samples(done, loggers)

            # evaluation; after a stop signal, the next start makes up for it
            if self.evaluator and is_due(done, cfg.evaluate.every) and not stop:
                watch.heartbeat(done, "evaluating", limited=False)
                self.evaluate(done, loggers)
            if last:
                break

        # wait for the last checkpoint, then close everything that runs in the background
        watch.heartbeat(done, "saving", limited=False)
        path = self.saver.finish()
        for service in background:
            service.close()
        if not self.has_learned and not stop:
            raise UserError(
                f"{self.folder}: nothing was learned, every step from {self.start + 1} to {done} was skipped and no "
                f"checkpoint was saved; {self.last_skip}"
            )
        if main:
            log.print_line(self.summary_of_start(done))
        self.finish(f"{done} steps done; checkpoint: {path}" if path else f"{done} steps done, all skipped", stop)
        if main and path:
            log.print_line(banners.end(self.folder, "inferencer" in (settings or {})))

    def summary_of_start(self, done: int) -> str:
        """Steps and time of this start, and totals of the run."""
        steps, seconds, totals = done - self.start, time.monotonic() - self.begun, self.totals()
        epochs = f", {totals['epoch']:.3g} epochs" if "epoch" in totals else ""
        return (
            f"{log.count(steps, 'step', 'steps')} in {log.duration(seconds)} ({seconds / steps:.3g} s/step); the run "
            f"so far: {totals['samples']:,} images{epochs}, {log.duration(totals['elapsed'])}"
        )

    def is_first_of_phase(self, step: int) -> bool:
        """Whether a step is the first of this start, or the first with other loss terms."""
        phase = self.system.objective.phase
        return step == self.start or phase(step) != phase(step - 1)

    def end_late(self, stop: int) -> None:
        """End this process at once: it was asked to stop long ago, and hangs in a step, a save or the data."""
        name, allowed = signal.Signals(stop).name, launch.grace_seconds()
        launch.end(
            128 + stop,
            f"stopped by {name}{launch.where()}, which did not end within GRACE_SECONDS={allowed}; run the same "
            "command again to resume from the newest checkpoint",
        )

    def finish(self, message: str, stop: int) -> None:
        """Print the final message of a run; raises Stopped if `stop` is a signal number rather than 0."""
        if stop:
            message = f"stopped by {signal.Signals(stop).name}: {message}; run the same command again to resume"
        if self.world.is_main:
            log.print_line(message)
        if stop:
            raise Stopped(stop, message)

    def save(self, done: int, score: float | None) -> None:
        """Start an asynchronous checkpoint after `done` steps; `score` is the validation loss, used by `keep_best`."""
        self.clock.mark("checkpoint")
        snapshot = state.training_state(self.net, self.averages, self.optimizer)
        notes = {"score": score, "guard": self.guard.memory, "samples": self.samples, "elapsed": self.elapsed()}
        self.saver.begin(done, snapshot, notes | adapter.as_note(self.adapter))
        self.clock.mark("other")

    def elapsed(self) -> float:
        """Seconds of training in this run, over all starts. Steps that an interruption lost count once."""
        return self.elapsed_before + time.monotonic() - self.begun

    def totals(self) -> dict[str, float]:
        """Totals of the run: seconds, images that it has learned from, and epochs if the data has a size."""
        totals = {"elapsed": round(self.elapsed(), 3), "samples": self.samples}
        num_images = getattr(self.data, "num_images", None)
        return totals | {"epoch": self.samples / num_images} if num_images else totals

    def step(self, step: int, micro_batches: Iterator[Batch], received: Callable[[], int]) -> tuple[float, float, int]:
        """One optimizer step over this rank's micro-batches, skipped if the gradient norm is non-finite or a spike.

        Returns the loss, the gradient norm before clipping, and the stop signal that any rank has received (0: none).
        """
        cfg, clock, num_micro = self.cfg, self.clock, self.num_micro(step)
        losses, checks, num_tokens, measured = [], [], 0, MetricAccumulator()
        for group in self.optimizer.param_groups:
            group["lr"] = cfg.lr_at(step) * group.get("lr_scale", 1.0)

        # accumulate gradients
        for _ in range(num_micro):
            clock.mark("data")
            batch = raise_if_error(next(micro_batches))
            log.record_replaced(self.folder, batch.replaced)
            self.replaced += len(batch.replaced)
            batch = batch.to(self.world.device)

            clock.mark("encode")
            rng = SampleRNG.of_step(self.seed, step, batch.positions)
            loss = self.system.loss(clock.around(self.net), clock.around(self.ema), batch, rng, step)

            # FSDP averages gradients over ranks; this division averages them over micro-batches too
            clock.mark("backward")
            mean_loss = loss.per_sample.mean() / num_micro
            mean_loss.backward()
            losses.append(mean_loss.detach())
            checks += loss.checks
            num_tokens += loss.num_tokens
            measured.add(loss, batch)

        # agree with all ranks on norm, loss and stop signal
        clock.mark("optimizer")
        self.enter_phase(step)
        limit = self.guard.limit()
        norm = fsdp.grad_norm(self.net)
        grad_norm, mean_loss, stop = collectives.sync_step_outcome(norm, sum(losses), received())

        # An encoder whose output is not finite makes the loss so too. Its check waits for the device, which the line
        # above has done anyway.
        if not math.isfinite(mean_loss):
            raise_if_not_finite(checks)

        # update live and EMA weights, or skip the step
        if self.guard.accepts(grad_norm, mean_loss):
            self.has_learned = True
            if cfg.clip_norm is not None:
                fsdp.clip_gradients(self.net, norm, cfg.clip_norm)
            self.optimizer.step()
            for name, track in self.tracks.items():
                ema.update(self.averages[name], self.net, track.decay_at(step))
            self.measured.extend(measured)
            self.samples += len(cfg.samples_at(step))
            self.num_samples += len(cfg.samples_at(step)) // self.world.size
            self.num_tokens += num_tokens
        else:
            self.skip(step + 1, grad_norm, limit, measured)
        self.optimizer.zero_grad(set_to_none=True)
        self.num_steps += 1
        clock.mark("other")
        return mean_loss, grad_norm, stop

    def enter_phase(self, step: int) -> None:
        """Reset the gradient norm statistics where the loss terms, the batch size or the resolution change."""
        terms, batch_size = self.system.objective.phase(step), len(self.cfg.samples_at(step))
        pixels = " and ".join(map(str, self.data.resolution(step)))
        phase = f"{terms}, batch size {batch_size}, {pixels} pixels"
        previous = self.guard.enter(phase)
        if not previous or not self.world.is_main:
            return

        consequence = ""
        if terms != self.system.objective.phase(step - 1):
            consequence = "; the loss has other terms from here on, so its value jumps"
            if self.data.has_val:
                consequence += ", val_plain/loss stays comparable"
        log.print_line(f"after step {step}: now {phase} (before: {previous}){consequence}")

    def skip(self, number: int, grad_norm: float, limit: float, measured: MetricAccumulator) -> None:
        """Log and record a skipped step, the `number`-th of the run.

        The decision is the same on every rank. Raises UserError after too many.
        """
        # the first non-finite tensor of all ranks; None if the gradient norm is a spike
        of_this_rank = grad_guard.first_non_finite(self.net, self.ema, measured.samples)
        of_all_ranks = [first for first in collectives.gather_on_all(of_this_rank, self.world) if first is not None]
        cause = min(of_all_ranks)[1] if of_all_ranks else None
        self.last_skip = f"step {number}, gradient norm {grad_norm:.4g}, first non-finite: {cause or 'none'}"

        descriptions = list(chain(*collectives.gather(measured.describe(), self.world)))
        if self.world.is_main:
            path = grad_guard.record(self.folder / "skipped", number, grad_norm, limit, cause, descriptions)
            why = f"first non-finite: {cause}" if cause else f"limit {limit:.4g}"
            count = len(self.cfg.samples_at(number - 1))
            log.print_line(f"step {number} skipped: gradient norm {grad_norm:.4g}, {why}; its {count} samples: {path}")
        self.guard.check(number, grad_norm, cause)

    def summary(self, step: int, grad_norm: float) -> dict[str, float]:
        """Metrics since the last summary, averaged over all ranks, and throughput."""
        device = self.world.device
        values = self.measured.means(device, "train/")
        self.cells.add(self.measured.cells(device))
        self.measured = MetricAccumulator()

        counts = torch.tensor([self.replaced, self.num_samples, self.num_tokens], dtype=torch.float64, device=device)
        replaced, num_samples, num_tokens = collectives.sum_over_ranks(counts).tolist()
        values |= {
            "train/grad_norm": grad_norm,
            "train/lr": self.cfg.lr_at(step),
            "train/ema_distance": ema_distance(self.ema, self.net, device),
            "train/skipped": self.guard.skipped,
            "train/replaced": int(replaced),
        }
        values |= self.clock.rates(self.num_steps, num_samples, num_tokens)
        self.num_steps = self.replaced = self.num_samples = self.num_tokens = 0
        return values

    def part(self, split: Split) -> MicroBatches:
        """This rank's micro-batches of a split, indexed by (step, micro-batch)."""
        read_captions = self.system.caption_reader(self.seed) if split == "train" else None
        return MicroBatches(
            self.data,
            self.seed,
            self.cfg.samples_at,
            self.cfg.micro_batch_size,
            self.system.objective.batch_multiple,
            self.world,
            split,
            read_captions,
        )

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """The objective and `val_metrics` on fixed images, times and noise.

        val/ and val_ema/: the current objective with live and EMA weights; val_NAME/ with those of a further average.
        val_plain/: the objective of step 0 (for Self-E: flow matching) with EMA weights, comparable over the entire run
        because no schedule changes it.
        """
        self.clock.mark("validation")
        micro_batches, values = self.part("val"), {}

        # by the prefix of its metrics: the denoiser, and the step at which the objective is evaluated
        passes = {"val/": (self.net, step)}
        passes |= {f"val_{name}/": (average, step) for name, average in self.averages.items()}
        passes["val_plain/"] = self.ema, 0

        for prefix, (net, objective_step) in passes.items():
            measured = MetricAccumulator()
            for number, place in product(range(self.cfg.val_batches), range(self.num_micro(0))):
                batch = raise_if_error(micro_batches[number, place]).to(self.world.device)
                rng = SampleRNG(tuple((self.seed, "val", number, position) for position in batch.positions))
                loss = self.system.loss(net, self.ema, batch, rng, objective_step)
                raise_if_not_finite(loss.checks)
                measured.add(loss, batch)
                if prefix != "val_plain/":
                    for metric in self.cfg.val_metrics:
                        measured.add_values(metric(self.system, net, batch, rng, step))
            values |= measured.means(self.world.device, prefix)
        self.clock.mark("other")
        return values

    def write_cells(self, done: int, loggers: Loggers) -> None:
        """Log mean metrics by (t, s) cell since the last call."""
        means = self.cells.take()
        if self.world.is_main and means:
            loggers.image(done, "cells", write_cells(self.folder, done, means))

    def draw_samples(self, done: int, loggers: Loggers) -> None:
        """Generate and log a sample grid for each of `samples.weights`."""
        self.saver.wait()  # complete the checkpoint first, so that a failure in sampling loses no step
        self.clock.mark("samples")
        nets = {"live": self.net, **self.averages}
        nets = {name: nets[name] for name in self.cfg.samples.weights}
        for name, sheet in self.cfg.samples.draw(self.system, nets, self.seed, done, self.world).items():
            folder = "samples" if name == "ema" else f"samples_{name}"
            loggers.image(done, folder, save_sheet(sheet, self.folder / folder, done))
        fsdp.reshard(self.net)
        self.clock.mark("other")

    def evaluate(self, done: int, loggers: Loggers) -> None:
        """Evaluate the EMA weights, log and record the values, and keep the checkpoint if it is the best one."""
        self.saver.wait()  # complete the checkpoint first, so that a failure in the evaluation loses no step
        self.clock.mark("evaluation")
        evaluation = self.evaluator.run(self.ema, done)
        if evaluation is not None:
            loggers.numbers(done, self.totals() | evaluations.logged(evaluation))
            if self.cfg.evaluate.keep_best is not None:
                best = self.evaluator.best(evaluation, self.saver.best())
                if best is not None and self.saver.keep_best(done, best):
                    log.print_line(f"step {done} is the best so far: {best['name']} {best['value']:.4g}")

            # last: what has no record is evaluated again by the next start
            log.print_line(f"evaluation after step {done}: {self.evaluator.write(evaluation)}")
        self.clock.mark("other")


def main(arguments: list[str]) -> None:
    """Train the run that a config file describes: CONFIG [key=value ...]."""
    settings = config.load(arguments[0], arguments[1:])

    # meta device: no memory is allocated before the denoiser is sharded
    with torch.device("meta"):
        system = config.build(settings, "system")
    data, trainer = config.build(settings, "data"), config.build(settings, "trainer")
    set_deterministic(trainer.deterministic)

    # longer than the watchdog's timeout, whose report names ranks and steps and not only collectives
    timeout = 2 * trainer.timeout_minutes + 1
    with collectives.process_group(timeout, trainer.deterministic) as world:
        folder = Path(trainer.output_dir)
        lock = FolderLock(folder, "trainer.output_dir", lost=partial(launch.end, 1))
        new = removed_on_failure(folder, run_info.RECORDS)
        with errors.writing_to(folder), collectives.on_main(new, world), collectives.on_main(lock, world):
            # the first process decides on `auto` for all, and the choice is recorded
            chosen = collectives.broadcast(choose_precision(trainer.precision, world.device), world)
            if trainer.precision == "auto" and world.is_main:
                log.print_line(f"trainer.precision: auto is {chosen} on this machine ({device_name(world.device)})")
            trainer = replace(trainer, precision=chosen)
            settings["trainer"]["precision"] = chosen
            if world.is_main:
                run_info.check_system(folder, settings)
            run = Trainer(trainer, system, data, settings["seed"], world)
            if world.is_main:
                run_info.describe(folder, settings, sys.argv, world.size)
                if isinstance(data, CachedData) and (warning := data.changed_images()):
                    log.print_line(warning)
            run.run(settings)


if __name__ == "__main__":
    launch.worker(lambda: main(sys.argv[1:]))
