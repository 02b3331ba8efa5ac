"""The settings of the trainer and their schedules: learning rate, batch size, micro-batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from selfe import config
from selfe.checkpoint import state
from selfe.checkpoint.manager import RetentionPolicy
from selfe.data import loader
from selfe.distributed.activation_checkpoint import ActivationCheckpointing
from selfe.distributed.fsdp import GatherConfig
from selfe.errors import UserError
from selfe.optimizers.adamw import AdamW
from selfe.protocols import EmaTrack, Logger, Optimizer, Schedule, ValidationMetric
from selfe.training.adapt import AdaptConfig
from selfe.training.ema import ConstantDecay
from selfe.training.evaluation import TrainingEvaluation
from selfe.training.grad_guard import GradGuardConfig
from selfe.training.loggers import WandbConfig
from selfe.training.profiling import ProfileConfig
from selfe.training.schedules import WSD, Linear
from selfe.training.visuals import SampleGridConfig
from selfe.types import MOST_SAMPLES, MOST_STEPS, PrecisionOrAuto, check_period, check_range, is_due

MOST_LR = 10.0


def without_evaluation(settings: dict) -> TrainerConfig:
    """The trainer of a config, for tools that do not evaluate: the weights of its extractors need not be there.

    Raises UserError.
    """
    if "trainer" in settings:
        settings = settings | {"trainer": settings["trainer"] | {"evaluate": None}}
    return config.build(settings, "trainer")


@dataclass(frozen=True)
class BatchPhase:
    """From `step` on: the batch size, and the learning rate from which the schedule goes to `min_lr`."""

    step: int  # first step of the phase
    lr: float | None = None  # learning rate at the start of the phase; null: the schedule goes on
    total_batch_size: int | None = None  # images per step; null: unchanged

    def __post_init__(self):
        check_range("step", self.step, 0, MOST_STEPS)
        check_range("lr", self.lr, 0, MOST_LR)
        check_range("total_batch_size", self.total_batch_size, 1, MOST_SAMPLES)


@dataclass(frozen=True)
class TrainerConfig:
    """Training settings, except for the system and the data. Defaults follow the paper (arXiv 2512.22374, S.2)."""

    output_dir: Path  # folder of the run; a run in it is resumed
    max_steps: int  # steps of the complete schedule
    total_batch_size: int  # images per step, over all processes
    micro_batch_size: int  # images per pass, at most; the largest number that divides those of a process is taken
    phases: tuple[BatchPhase, ...] = ()  # changes of batch size and learning rate, sorted by step
    stop_step: int | None = None  # stop early; the schedule still ends at max_steps
    # initial weights; unused if output_dir has a checkpoint, unless adapt is set
    init_from: Path | state.InitFromConfig | None = None
    # train only low-rank matrices beside the weights of init_from (LoRA), or some of the parameters; null: all weights
    adapt: AdaptConfig | None = None
    lr: float = 3e-4  # learning rate after the warm-up
    min_lr: float = 1e-5  # learning rate of the last step
    warmup_steps: int = 1000  # steps in which the learning rate rises linearly to lr
    decay_start: int = 0  # the learning rate stays at lr until this step; ignored if the warm-up ends later
    # how the learning rate goes from lr to min_lr
    schedule: Schedule = Linear()  # noqa: RUF009 - stateless
    betas: tuple[float, float] = (0.9, 0.95)  # of Adam's two moments
    weight_decay: float = 0.01  # of the optimizer, on all parameters that its groups do not exempt
    # what updates the weights
    optimizer: Optimizer = AdamW()  # noqa: RUF009 - stateless
    clip_norm: float | None = 1.0  # largest gradient norm; null: no clipping
    ema_decay: float | None = None  # share of the EMA weights that a step keeps; null: 0.9999
    ema_warmup: bool | None = None  # lower decay in the first steps: at most (1 + step) / (10 + step); null: false
    # moving averages of the weights, instead of ema_decay and ema_warmup; objective and samples use the first
    ema: tuple[EmaTrack, ...] = ()
    precision: PrecisionOrAuto = "auto"  # of matrix products; auto: bf16 where the hardware has it, otherwise fp32
    shard_size: int | None = None  # ranks per FSDP shard group, replicated across groups (HSDP); null: all ranks
    shard_text_encoder: bool = False  # shard T5 over the same ranks: less memory, more communication
    # when FSDP keeps parameters unsharded
    gathering: GatherConfig = GatherConfig()  # noqa: RUF009 - frozen
    # recompute in the backward pass: every block (true), every k-th (k), or only the cheap operations (selective)
    activation_checkpointing: ActivationCheckpointing = True
    compile: bool = False  # compile each block once for all shapes; takes a minute or more at start-up
    deterministic: bool = False  # bitwise reproducible on accelerators too; slower
    timeout_minutes: float = 10  # all processes are terminated when one makes no progress for this long
    num_workers: int = 4  # processes that load data, per process of training; 0: load in the training process
    # which steps are skipped, and when the run stops
    health: GradGuardConfig = GradGuardConfig()  # noqa: RUF009 - frozen
    peak_tflops: float | None = None  # bf16 peak of one device, for MFU; null: looked up by device name
    log_every: int | None = 50  # steps between lines of metrics.jsonl; null: only the last step of a start
    checkpoint_every: int | None = 5000  # steps between checkpoints; null: only the last step of a start
    # which checkpoints are kept
    checkpoints: RetentionPolicy = RetentionPolicy()  # noqa: RUF009 - frozen
    cells_every: int | None = 1000  # steps between heat maps over (t, s), a multiple of log_every; null: none
    val_every: int | None = 5000  # steps between validations, if data.params.val_manifest is set; null: none
    val_batches: int = 1  # batches per validation, each of total_batch_size images
    val_metrics: tuple[ValidationMetric, ...] = ()  # measured beside the losses of the objective
    # steps to profile
    profile: ProfileConfig = ProfileConfig()  # noqa: RUF009 - frozen
    # evaluation during training, see docs/evaluation.md; null: none
    evaluate: TrainingEvaluation | None = None
    # sample grids during training
    samples: SampleGridConfig = SampleGridConfig()  # noqa: RUF009 - frozen
    # Weights & Biases
    wandb: WandbConfig = WandbConfig()  # noqa: RUF009 - frozen
    tensorboard: bool = False  # also write metrics for TensorBoard
    loggers: tuple[Logger, ...] = ()  # further loggers
    allow_changes: tuple[str, ...] = ()  # keys in which a resumed run may differ from the run so far

    def __post_init__(self):
        # schedule
        for name in ("max_steps", "stop_step"):
            check_range(name, getattr(self, name), 1, MOST_STEPS)
        for name in ("log_every", "checkpoint_every", "cells_every", "val_every"):
            check_period(name, getattr(self, name))
        for name in ("warmup_steps", "decay_start"):
            check_range(name, getattr(self, name), 0, MOST_STEPS)
        for name in ("total_batch_size", "micro_batch_size", "val_batches"):
            check_range(name, getattr(self, name), 1, MOST_SAMPLES)

        # fine-tuning
        if self.adapt is not None and self.init_from is None:
            raise ValueError("adapt: init_from is not set; set it to the weights that are fine-tuned")
        parts = self.init_from.parts if isinstance(self.init_from, state.InitFromConfig) else ()
        if self.adapt is not None and getattr(self.init_from, "reset_s", False):
            raise ValueError("init_from.reset_s: changes weights that adapt freezes; convert all weights first")
        if self.adapt is not None and (extra := sorted({"optimizer", "step"} & set(parts))):
            raise ValueError(
                f"init_from.parts: {extra[0]} is that of another run, which adapt cannot continue; remove it"
            )

        # optimizer
        for name in ("lr", "min_lr", "weight_decay"):
            check_range(name, getattr(self, name), 0, MOST_LR)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")
        check_range("ema_decay", self.ema_decay, 0, 1)
        if self.decay_start and isinstance(self.schedule, WSD):
            raise ValueError(
                f"decay_start: {self.decay_start} and a WSD schedule, whose decay starts by its decay_share; set 0"
            )
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ValueError(f"clip_norm must be positive, got {self.clip_norm}; null disables clipping")

        # processes and devices
        check_range("shard_size", self.shard_size, 1, 2**20)
        check_range("num_workers", self.num_workers, 0, 1024)
        check_range("timeout_minutes", self.timeout_minutes, 0.01, 10**5)
        check_range("peak_tflops", self.peak_tflops, 0.001, 10**6)
        if self.activation_checkpointing != "selective":
            check_range("activation_checkpointing", self.activation_checkpointing, 0, 1000)

        # the checkpoint that an evaluation may keep
        evaluate = self.evaluate
        keeps_best = evaluate is not None and evaluate.keep_best is not None
        if keeps_best and not is_due(evaluate.every, self.checkpoint_every):
            every = "null" if self.checkpoint_every is None else self.checkpoint_every
            raise ValueError(
                f"evaluate.every: {evaluate.every} is not a multiple of checkpoint_every, {every}; "
                "keep_best needs a checkpoint of every evaluation"
            )

        steps = [phase.step for phase in self.phases]
        if steps != sorted(set(steps)):
            raise ValueError(f"phases must be sorted by step, each step once, got {steps}")

        # averages of the weights
        for name in ("ema_decay", "ema_warmup"):
            if self.ema and getattr(self, name) is not None:
                raise ValueError(f"{name} and ema are both set; remove one of them, or set it to null")
        names = [track.name for track in self.ema]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"ema: two tracks are {min(twice)}; remove one")
        known = ["live", *self.ema_tracks]
        if unknown := [name for name in self.samples.weights if name not in known]:
            raise ValueError(f"samples.weights: {unknown[0]} is not one of {', '.join(known)}")

    @property
    def ema_tracks(self) -> dict[str, EmaTrack]:
        """The averages of the weights by their names in checkpoints and metrics; the first is called "ema"."""
        decay = 0.9999 if self.ema_decay is None else self.ema_decay
        first, *others = self.ema or [ConstantDecay(decay, bool(self.ema_warmup))]
        return {"ema": first} | {track.name: track for track in others}

    def lr_at(self, step: int) -> float:
        """Linear warm-up to `lr`, held until `decay_start`, then `schedule` to `min_lr` at the last step."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps

        # each phase with its own learning rate restarts the decay; the last one that has begun counts
        falls = [(max(self.warmup_steps, self.decay_start), self.lr)]
        falls += [(phase.step, phase.lr) for phase in self.phases if phase.lr is not None and phase.step <= step]
        start, lr = falls[-1]
        return lr + (self.min_lr - lr) * self.schedule(step, start, self.max_steps - 1)

    def samples_at(self, step: int) -> range:
        """Global sample indices of a step, counted from the start of the run."""
        sizes = [(0, self.total_batch_size)]
        sizes += [
            (p.step, p.total_batch_size) for p in self.phases if p.total_batch_size is not None and p.step <= step
        ]
        first = sum(total * (end - begin) for (begin, total), (end, _) in pairwise([*sizes, (step, 0)]))
        return range(first, first + sizes[-1][1])

    def micro_batches(self, world_size: int, batch_multiple: int, step: int = 0) -> int:
        """Micro-batches per rank in a step. Raises UserError if the batch cannot be divided evenly."""
        total, most = len(self.samples_at(step)), self.micro_batch_size
        if total % world_size:
            raise UserError(
                f"trainer.total_batch_size: {total} is not a multiple of the {world_size} processes; change one of them"
            )

        # every micro-batch evaluates the same number of samples, so that all ranks make the same network calls
        if most < batch_multiple:
            raise UserError(
                f"trainer.micro_batch_size: the objective needs a multiple of {batch_multiple}, got "
                f"{most}; every micro-batch must have the same share of samples with s < t"
            )
        per_rank = total // world_size
        if per_rank % batch_multiple:
            raise UserError(
                f"trainer.total_batch_size: {total} leaves {per_rank} for each of {world_size} processes, but the "
                f"objective needs a multiple of {batch_multiple}; set a multiple of {batch_multiple * world_size}, or "
                "start fewer processes"
            )

        return per_rank // loader.micro_batch_size(per_rank, most, batch_multiple)
