"""Checkpoints of fine-tuning runs hold only what was trained. The rest are the weights that the run started from, in
another checkpoint or in files; the marker of the checkpoint has their path and a digest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from selfe import log
from selfe.backbones import lora
from selfe.checkpoint import flux, state, verify
from selfe.checkpoint.flux import FluxStateDict
from selfe.checkpoint.state import Digest, InitFromConfig
from selfe.distributed import collectives, fsdp
from selfe.distributed.collectives import World
from selfe.errors import UserError

KEY = "adapter"  # of the marker
HEADS = "heads."  # of training aids: trained, but not part of the model
MERGE = "merge it with selfe export, and start from the exported folder"

Reader = Callable[[str, torch.Size], Tensor]  # (name, shape) of a parameter -> its values, float32 on the host


@dataclass(frozen=True)
class AdapterRecord:
    """How the tensors of a fine-tuning run's checkpoint combine with the weights that it started from."""

    base: str  # path of those weights: a checkpoint, or FLUX tensors in safetensors files
    weights: str  # which weights of a checkpoint: "ema" or "live"; empty for files
    digest: str  # of the frozen parameters
    rank: int | None  # of the low-rank matrices; None without any
    alpha: float | None

    @property
    def scale(self) -> float:
        """Factor of the product of the low-rank matrices."""
        return self.alpha / self.rank if self.rank else 1.0


def read_record(checkpoint: Path) -> AdapterRecord | None:
    """The record of a fine-tuning run's checkpoint; None if the checkpoint holds complete weights."""
    entry = verify.read_marker(checkpoint).get(KEY)
    return AdapterRecord(**entry) if entry else None


def as_note(record: AdapterRecord | None) -> dict:
    """The entry of the marker."""
    return {KEY: asdict(record)} if record else {}


def refuse(checkpoint: Path) -> None:
    """Raise UserError if a run cannot start from a checkpoint, because it holds only what was trained."""
    if record := read_record(checkpoint):
        raise UserError(f"{checkpoint}: holds only what a fine-tuning run of {record.base} has trained; {MERGE}")


# ---- training ----


def load_base(
    origin: Path | InitFromConfig,
    net: nn.Module,
    averages: Mapping[str, nn.Module],
    world: World,
    *,
    rank: int | None,
    alpha: float | None,
    report: Path,
    resumed: Path | None = None,
) -> AdapterRecord:
    """Load the weights that a fine-tuning run starts from into a sharded denoiser and its averages, on every rank.

    Args:
        origin: the value of `trainer.init_from`. Of a checkpoint, the EMA weights are loaded, unless only `model` is
            listed: a single set of weights is shared by the denoiser and its averages.
        report: where the names of the tensors of a FLUX file are listed.
        resumed: the checkpoint from which the run continues.

    Raises:
        UserError: parameters that stay frozen are missing.
    """
    path = flux.weights_of(Path(origin.path if isinstance(origin, InitFromConfig) else origin))
    if flux.holds_weights(path):
        weights, source = "", flux.warm_start(path, net, *averages.values())
        missing = [name for name in source.missing if not name.startswith(HEADS)]
        if world.is_main:
            log.print_line(source.summary(report))
    else:
        path = collectives.broadcast(find_checkpoint(path, resumed) if world.is_main else None, world)
        refuse(path)
        only_model = isinstance(origin, InitFromConfig) and origin.parts == ("model",)
        weights = "live" if only_model else "ema"
        missing = state.load_base(path, net, averages, weights)
        if world.is_main:
            log.print_line(f"fine-tuning the {weights} weights of {path}")

    check_complete(path, net, missing)
    return AdapterRecord(str(path.absolute()), weights, digest_of_frozen(net), rank, alpha)


def find_checkpoint(path: Path, resumed: Path | None) -> Path:
    """The checkpoint that `trainer.init_from` names. Of a folder of checkpoints, to which newer ones may have been
    added since, a resumed run takes the one that it has started from.
    """
    record = None if resumed is None else read_record(resumed)
    if record is not None:
        started_from = Path(record.base)
        if started_from.parent == path.absolute() and verify.is_complete(started_from):
            return started_from
    return verify.find(path)


def check_complete(path: Path, net: nn.Module, missing: list[str]) -> None:
    """Raise UserError if a parameter that is missing at `path` would stay frozen at its initial value."""
    frozen = [name for name in missing if not net.get_parameter(name).requires_grad]
    if frozen:
        raise UserError(
            f"trainer.init_from: {path} lacks {frozen[0]}, which would stay frozen at random values; add a pattern "
            f"such as {frozen[0].partition('.')[0] + '.*'!r} to trainer.adapt.trainable"
        )


def digest_of_frozen(net: nn.Module) -> str:
    """Digest of the frozen parameters of a sharded denoiser; the same on any number of ranks. Call it on every rank."""
    frozen = {name: p.detach() for name, p in net.named_parameters() if not p.requires_grad}
    digest = Digest()
    for name in sorted(frozen):
        digest.update(name, fsdp.unsharded(frozen[name]))
    return digest.hexdigest()


def check_resumed(checkpoint: Path, record: AdapterRecord | None, net: nn.Module) -> None:
    """Raise UserError if a checkpoint of a run does not continue with these settings of `trainer.adapt`.

    Args:
        record: that of this start; None for a run that trains all weights.
    """
    before = read_record(checkpoint)
    if before is None and record is None:
        return
    if before is None:
        raise UserError(
            f"{checkpoint}: holds complete weights, but trainer.adapt is set; start a run in another "
            f"trainer.output_dir, with trainer.init_from={checkpoint.parent}"
        )
    if record is None:
        raise UserError(f"{checkpoint}: is of a fine-tuning run, but trainer.adapt is not set; set it as in the run")

    for key in ("rank", "alpha"):
        values = getattr(before, key), getattr(record, key)
        if values[0] != values[1]:
            raise UserError(f"{checkpoint}: trainer.adapt.{key} was {values[0]}, is now {values[1]}; use the first")

    stored = set(state.stored_parameters(checkpoint, "net"))
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    if changed := sorted(stored ^ trained):
        holds = "has" if changed[0] in stored else "lacks"
        raise UserError(
            f"{checkpoint}: {holds} {changed[0]}, unlike this config; set trainer.adapt.layers and "
            "trainer.adapt.trainable as in the run"
        )

    if before.digest != record.digest:
        raise UserError(
            f"trainer.init_from: the weights of {record.base} are not those that this run fine-tunes; set "
            f"trainer.init_from={before.base}, from which it started"
        )


# ---- sampling and export ----


class AdapterWeights:
    """The parameters of a fine-tuned denoiser, read one by one: base + (alpha / rank) B A, in float32."""

    def __init__(self, checkpoint: Path, record: AdapterRecord, shapes: Mapping[str, torch.Size], read_trained: Reader):
        """
        Args:
            record: that of the checkpoint.
            shapes: of the parameters of the denoiser, without heads.
            read_trained: reads a parameter that was trained.

        Raises:
            UserError: the base is missing, or does not have the parameters.
        """
        self.checkpoint, self.record, self.read_trained = checkpoint, record, read_trained
        self.trained = state.stored_parameters(checkpoint, "net")
        self.frozen = {name: shape for name, shape in shapes.items() if name not in self.trained}
        self.scale = record.scale

        base = Path(record.base)
        if not base.exists():
            raise UserError(
                f"{checkpoint}: fine-tunes {base}, which does not exist; restore it, or link it to its new place: ln "
                f"-s NEW_PLACE {base}"
            )
        self.files = None if record.weights else FluxStateDict.of(base, self.frozen)
        if self.files and self.files.missing:
            raise UserError(f"{base}: lacks {self.files.missing[0]}, which {checkpoint} fine-tunes; restore the file")

    def read_base(self, name: str, shape: torch.Size) -> Tensor:
        """A frozen parameter as it was before the fine-tuning, float32 on the host."""
        if self.files:
            return self.files.read(name).float()
        return state.read_parameter(Path(self.record.base), name, shape, self.record.weights)

    def read(self, name: str, shape: torch.Size) -> Tensor:
        """A parameter after the fine-tuning, float32 on the host."""
        if name in self.trained:
            return self.read_trained(name, shape)
        return self.merge(name, self.read_base(name, shape))

    def merge(self, name: str, base: Tensor) -> Tensor:
        """A frozen parameter with the product of its low-rank matrices, if it has any."""
        names = [name.removesuffix(".weight") + kind for kind in (lora.A, lora.B)]
        if not all(matrix in self.trained for matrix in names):
            return base
        a, b = (self.read_trained(matrix, self.trained[matrix]) for matrix in names)
        return torch.addmm(base, b, a, alpha=self.scale)

    def check_base(self) -> None:
        """Raise UserError if the base is not the one of the training."""
        digest = Digest()
        for name in sorted(self.frozen):
            digest.update(name, self.read_base(name, self.frozen[name]))
        self.compare(digest)

    def compare(self, digest: Digest) -> None:
        if digest.hexdigest() != self.record.digest:
            raise UserError(
                f"{self.checkpoint}: the weights of {self.record.base} are no longer those that it fine-tunes; restore "
                "them"
            )

    @torch.no_grad()
    def load(self, net: nn.Module) -> None:
        """Load all parameters into an unsharded denoiser without heads."""
        digest = Digest()
        for name in sorted(self.frozen):
            base = self.read_base(name, self.frozen[name])
            digest.update(name, base)
            net.get_parameter(name).copy_(self.merge(name, base))
        self.compare(digest)

        for name, parameter in net.named_parameters():
            if name in self.trained:
                parameter.copy_(self.read_trained(name, parameter.shape))

    def matrices(self) -> dict[str, Tensor]:
        """All low-rank matrices, float32 on the host.

        Raises:
            UserError: there are none, or other parameters were trained as well.
        """
        others = [name for name in self.trained if not lora.is_low_rank(name) and not name.startswith(HEADS)]
        if others:
            raise UserError(
                f"{self.checkpoint}: {others[0]} was trained too, which the file of an adapter cannot hold; export the "
                "merged model, without --adapter-only"
            )
        return {name: self.read_trained(name, shape) for name, shape in self.trained.items() if lora.is_low_rank(name)}
