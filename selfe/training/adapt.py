"""What a fine-tuning run trains of a pretrained denoiser: low-rank matrices (LoRA), some of the parameters, or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from selfe.backbones import lora
from selfe.errors import UserError
from selfe.optimizers.groups import check_patterns, matches
from selfe.types import MOST_WIDTH, check_range

# attention and MLPs of the blocks
LAYERS = ("*.qkv_in", "*.attention_out", "*.mlp.*", "*.qkv_mlp_in", "*.attention_mlp_out")
HEADS = "heads."  # of training aids, which are always trained


@dataclass(frozen=True)
class AdaptConfig:
    """Fine-tuning of `init_from`, whose weights are frozen: with low-rank matrices (LoRA), and by training some of its
    parameters."""

    rank: int | None = None  # of the low-rank matrices; null: none
    alpha: float | None = None  # the product of the matrices is added alpha / rank times; null: rank, so once
    layers: tuple[str, ...] = LAYERS  # patterns of linear layers that get low-rank matrices, with * and ?
    trainable: tuple[str, ...] = ()  # patterns of parameters that are trained themselves, such as "s_in.*"

    def __post_init__(self):
        check_range("rank", self.rank, 1, MOST_WIDTH)
        check_range("alpha", self.alpha, 0, 10**6)
        if self.rank is None and not self.trainable:
            raise ValueError("nothing would be trained; set rank, for LoRA, or trainable")
        if self.rank is None and self.alpha is not None:
            raise ValueError("alpha is set without rank; set rank, or remove alpha")
        if self.rank is not None and not self.layers:
            raise ValueError("layers: the list is empty; give patterns of linear layers, or remove rank")

    @property
    def scale(self) -> float:
        """Factor of the product of the low-rank matrices."""
        return 1.0 if self.rank is None or self.alpha is None else self.alpha / self.rank

    def record(self) -> dict[str, Any]:
        """What a checkpoint records of it, besides its tensors."""
        return {"rank": self.rank, "alpha": self.rank if self.alpha is None else self.alpha}

    def apply(self, net: nn.Module) -> None:
        """Freeze the parameters of a denoiser, except for `trainable`, and add low-rank matrices to its layers.

        Called before the denoiser is sharded. Raises UserError for a pattern that matches nothing.
        """
        names = [name for name, _ in net.named_parameters() if not name.startswith(HEADS)]
        check_patterns(self.trainable, names, "trainer.adapt.trainable")
        for name in names:
            net.get_parameter(name).requires_grad_(matches(name, self.trainable))
        if self.rank is None:
            return

        linear = [
            name for name, module in net.named_modules() if isinstance(module, nn.Linear) and not name.startswith(HEADS)
        ]
        chosen = [name for name in linear if matches(name, self.layers)]
        if self.layers != LAYERS or not chosen:  # a denoiser may lack one kind of blocks
            check_patterns(self.layers, linear, "trainer.adapt.layers", "linear layer")

        # a layer that is trained itself can already learn what low-rank matrices beside it can
        both = [name for name in chosen if matches(f"{name}.weight", self.trainable)]
        if both:
            raise UserError(
                f"trainer.adapt.trainable: {both[0]}.weight is trained itself, and trainer.adapt.layers adds matrices "
                "to it; let only one of the two match it"
            )
        lora.add_matrices(net, chosen, self.rank, self.record()["alpha"])
