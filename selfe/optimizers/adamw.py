"""AdamW (Loshchilov and Hutter, arXiv 1711.05101): torch's fused implementation, or one with moments in bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from selfe.distributed.fsdp import local
from selfe.errors import UserError
from selfe.optimizers.groups import GroupConfig, check_groups, param_groups, trained
from selfe.types import Precision

# With a larger beta, a second moment in bf16 would not decay: a step changes it by less than its rounding error
LARGEST_BF16_BETA = 0.98


class AdamW:
    """AdamW with `trainer.betas` and `trainer.weight_decay`, by default on all parameters, as in the paper (S.2)."""

    def __init__(self, groups: tuple[GroupConfig, ...] = (), moments: Literal["fp32", "bf16"] = "fp32"):
        """
        Args:
            groups: parameters with other weight decay or learning rate.
            moments: stored precision of the two moments. bf16 halves their memory, and computes in fp32.
        """
        self.groups, self.moments = groups, moments

    def output_settings(self) -> dict[str, Any]:
        return {"moments": self.moments}  # groups only change how the moments are used

    def build(
        self, net: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float, precision: Precision
    ) -> torch.optim.Optimizer:
        named = trained(net)
        check_groups(self.groups, [name for name, _ in named])
        groups = param_groups(named, self.groups)
        if self.moments == "fp32":
            return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=can_fuse(net))

        if max(betas) > LARGEST_BF16_BETA:
            raise UserError(
                f"trainer.betas: {max(betas)} is too close to 1 for moments in bf16, which would not change; set at "
                f"most {LARGEST_BF16_BETA}, or trainer.optimizer.params.moments=fp32"
            )
        return Bf16AdamW(groups, lr, betas, weight_decay)


def can_fuse(net: nn.Module) -> bool:
    """Whether torch's fused kernels take the parameters: not on the meta device, where a plan is made."""
    return not any(parameter.is_meta for parameter in net.parameters())


class Bf16AdamW(torch.optim.Optimizer):
    """AdamW whose moments are bf16 between steps, and fp32 while one parameter is updated."""

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], weight_decay: float):
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        """One step with the gradients of all parameters."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, group)

    def update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        state["step"] += 1

        (beta1, beta2), steps = group["betas"], state["step"].item()
        gradient = local(parameter.grad)
        mean = local(state["exp_avg"]).float().lerp_(gradient, 1 - beta1)
        square = local(state["exp_avg_sq"]).float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)

        # torch casts loaded state to the dtype of the parameter
        for name, value in (("exp_avg", mean), ("exp_avg_sq", square)):
            state[name] = state[name].bfloat16()
            local(state[name]).copy_(value)

        weights = local(parameter)
        size = square.div_(1 - beta2**steps).sqrt_().add_(group["eps"])
        weights.mul_(1 - group["lr"] * group["weight_decay"])
        weights.addcdiv_(mean, size, value=-group["lr"] / (1 - beta1**steps))
