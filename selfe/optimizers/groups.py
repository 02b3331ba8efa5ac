"""Parameter groups by name: other weight decay or learning rate for some of the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from selfe.errors import UserError
from selfe.types import check_range

MOST_DECAY = 10.0


@dataclass(frozen=True)
class GroupConfig:
    """Parameters whose name matches a pattern; the first group of the list that matches counts."""

    names: tuple[str, ...]  # patterns of parameter names, with * and ?, such as "*.bias" or "single_blocks.*"
    weight_decay: float | None = None  # null: that of the trainer
    lr_scale: float = 1.0  # factor on the learning rate

    def __post_init__(self):
        if not self.names:
            raise ValueError("names: the list is empty; give patterns of parameter names")
        check_range("weight_decay", self.weight_decay, 0, MOST_DECAY)
        check_range("lr_scale", self.lr_scale, 0, 1000)


def trained(net: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The named parameters that are not frozen."""
    return [(name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a parameter name matches any of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns(patterns: Sequence[str], names: Sequence[str], path: str, kind: str = "parameter") -> None:
    """Raise UserError for a pattern that no name matches.

    Args:
        path: the key that holds the patterns.
        kind: what the names are of.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"{path}: {pattern!r} matches no {kind}; their names are such as {', '.join(names[:3])} and {names[-1]}"
            )


def check_groups(groups: Sequence[GroupConfig], names: Sequence[str]) -> None:
    """Raise UserError if a pattern of a group matches no parameter."""
    for number, group in enumerate(groups):
        check_patterns(group.names, names, f"trainer.optimizer.params.groups[{number}].names")


def param_groups(named: Sequence[tuple[str, Tensor]], groups: Sequence[GroupConfig]) -> list[dict[str, Any]]:
    """The groups of `torch.optim.Optimizer` for named parameters, those that match no group first.

    A group has the weight decay of the optimizer, unless its config has another.
    """
    rest: dict[str, Any] = {"params": []}
    own: list[dict[str, Any]] = []
    for group in groups:
        decay = {} if group.weight_decay is None else {"weight_decay": group.weight_decay}
        own.append({"params": [], "lr_scale": group.lr_scale} | decay)

    for name, parameter in named:
        places = [place for group, place in zip(groups, own, strict=True) if matches(name, group.names)]
        (places[0] if places else rest)["params"].append(parameter)
    return [place for place in (rest, *own) if place["params"]]
