"""Muon: updates that are orthogonal matrices (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

The matrices of the blocks move by their orthogonalised momentum, everything else by AdamW. Updates are scaled to the
size of AdamW's (Liu et al., arXiv 2502.16982), so both use the learning rate and weight decay of the trainer.

Fused weights hold several matrices side by side: queries, keys and values in one projection, the outputs of attention
and MLP in another. Each is orthogonalised by itself, because an orthogonal update gives all directions of a matrix the
same length, and directions of different layers should not compete for it.

Modulation goes to AdamW: its input is one vector per sample, so its gradient has at most as many directions as the
batch has samples, and orthogonalisation would amplify rounding in all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from selfe.distributed.fsdp import local
from selfe.distributed.unsharded import apply_to_matrices
from selfe.errors import UserError
from selfe.optimizers.adamw import can_fuse
from selfe.optimizers.groups import GroupConfig, check_groups, check_patterns, matches, param_groups, trained
from selfe.types import DTYPES, Precision, check_range

MATRICES, ADAMW = ("*blocks.*",), ("*modulation*",)  # patterns of parameter names, by default

# a x + b x^3 + c x^5, iterated on singular values: steep at 0, and near 1 from any start after five steps
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SMALLEST_NORM = 1e-7
ADAMW_RMS = 0.2  # typical root mean square of an update of AdamW, relative to the learning rate


class Muon:
    """Muon for the matrices of the blocks, AdamW for all other parameters."""

    def __init__(
        self,
        matrices: tuple[str, ...] = MATRICES,
        adamw: tuple[str, ...] = ADAMW,
        momentum: float = 0.95,
        num_iterations: int = 5,
        lr_scale: float = 1.0,
        groups: tuple[GroupConfig, ...] = (),
    ):
        """
        Args:
            matrices: patterns of parameter names; the matrices among these are updated by Muon.
            adamw: patterns of parameter names that are updated by AdamW all the same; [] for none.
            momentum: share of the momentum that a step keeps.
            num_iterations: Newton-Schulz iterations of the orthogonalisation.
            lr_scale: factor on the learning rate of the matrices; 1 gives updates of the size of AdamW's.
            groups: parameters with other weight decay or learning rate.
        """
        check_range("momentum", momentum, 0, 0.9999)
        check_range("num_iterations", num_iterations, 1, 20)
        check_range("lr_scale", lr_scale, 0, 1000)
        self.matrices, self.adamw, self.groups = matrices, adamw, groups
        self.momentum, self.num_iterations, self.lr_scale = momentum, num_iterations, lr_scale

    def output_settings(self) -> dict[str, Any]:
        return {"matrices": self.matrices, "adamw": self.adamw}

    def build(
        self, net: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float, precision: Precision
    ) -> torch.optim.Optimizer:
        named = trained(net)
        names = [name for name, _ in named]
        check_groups(self.groups, names)
        if self.matrices != MATRICES:
            check_patterns(self.matrices, names, "trainer.optimizer.params.matrices")
        if self.adamw != ADAMW:  # a fine-tuning run may train nothing of it
            check_patterns(self.adamw, names, "trainer.optimizer.params.adamw")

        # matrices and all others, each with the groups of the config
        chosen = {name for name in names if matches(name, self.matrices) and not matches(name, self.adamw)}
        matrices = [(name, p) for name, p in named if name in chosen and p.ndim == 2]
        if not matrices:
            raise UserError("trainer.optimizer.params.matrices: matches no matrix; use selfe.optimizers.adamw.AdamW")
        others = [(name, p) for name, p in named if name not in dict(matrices)]

        groups = [group | {"orthogonal": False} for group in param_groups(others, self.groups)]
        for group in param_groups(matrices, self.groups):
            lr_scale = self.lr_scale * group.get("lr_scale", 1.0)
            groups.append(group | {"orthogonal": True, "momentum": self.momentum, "lr_scale": lr_scale})

        # how fused weights are made of matrices, as the backbone says
        describe = getattr(net, "matrices", lambda name: (0, ()))
        layouts = {p: describe(name) for name, p in matrices}
        step_settings = (layouts, self.num_iterations, DTYPES[precision])
        return MuonWithAdamW(groups, step_settings, lr=lr, betas=betas, weight_decay=weight_decay, fused=can_fuse(net))


class MuonWithAdamW(torch.optim.AdamW):
    """AdamW, except for groups with `orthogonal`, whose state is the momentum of each matrix."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        step_settings: tuple[dict[nn.Parameter, tuple[int, tuple[int, ...]]], int, torch.dtype],
        **options: Any,
    ):
        """
        Args:
            step_settings: of each matrix, the dimension in which it is fused and the sizes of its parts, none if it is
                not; Newton-Schulz iterations; their dtype.
        """
        super().__init__(groups, **options)
        self.layouts, self.num_iterations, self.dtype = step_settings

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called on loading. AdamW's own looks for a number of steps in the state of every parameter."""
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        """One step with the gradients of all parameters."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["orthogonal"]]
        try:
            super().step(closure)
        finally:
            self.param_groups = groups

        self.step_matrices([(p, group) for group in groups if group["orthogonal"] for p in group["params"]])

    def step_matrices(self, matrices: list[tuple[nn.Parameter, dict[str, Any]]]) -> None:
        """One step of Muon, with Nesterov momentum and decoupled weight decay."""
        matrices = [(p, group) for p, group in matrices if p.grad is not None]
        for parameter, group in matrices:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            local(state["momentum"]).lerp_(local(parameter.grad), 1 - group["momentum"])

        def direction(number: int) -> Tensor:
            parameter, group = matrices[number]
            ahead = local(parameter.grad).lerp(local(self.state[parameter]["momentum"]), group["momentum"])
            return ahead.to(self.dtype)

        def update(number: int, full: Tensor) -> Tensor:
            return orthogonal_update(full, *self.layouts[matrices[number][0]], self.num_iterations)

        parameters = [parameter for parameter, _ in matrices]
        for number, rows in apply_to_matrices(parameters, self.dtype, direction, update):
            parameter, group = matrices[number]
            weights = local(parameter)
            weights.mul_(1 - group["lr"] * group["weight_decay"]).add_(rows, alpha=-group["lr"])


def orthogonal_update(full: Tensor, dim: int, sizes: tuple[int, ...], num_iterations: int) -> Tensor:
    """Orthogonalise the matrices of which `full` is made, and scale them to the size of AdamW's updates."""
    parts = full.split(sizes, dim) if sizes else [full]
    updates = [orthogonalise(part, num_iterations) * (ADAMW_RMS * math.sqrt(max(part.shape))) for part in parts]
    return torch.cat(updates, dim)


def orthogonalise(matrix: Tensor, num_iterations: int) -> Tensor:
    """About U V^T of the singular value decomposition U S V^T: singular values of about 0.7 to 1.2 (Newton-Schulz)."""
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix  # the products below are of the size of the shorter side

    x = x / x.norm().clamp_min(SMALLEST_NORM)
    for _ in range(num_iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
