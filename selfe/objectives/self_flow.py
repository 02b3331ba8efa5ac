"""Self-Flow: flow matching with two noise levels in an image, and features of the EMA denoiser (arXiv 2603.06507).

Two times are drawn per sample; some tokens have the second one, the others the first. The denoiser predicts, from these
inputs and at an early block, the features that the EMA denoiser has at a later block where all tokens have the lower
noise level: L = L_flow_matching - weight mean cos(head(h), h_ema).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from selfe import flow
from selfe.device import to_device
from selfe.objectives.flow_matching import FlowMatching
from selfe.objectives.heads import MlpHead, layer_width
from selfe.protocols import Backbone, Denoiser
from selfe.rng import SampleRNG, philox
from selfe.types import MOST_WIDTH, Loss, Packed, TextCond, check_range

HEAD = "self_flow"  # name of the head


class SelfFlow(FlowMatching):
    """Self-Flow in training; in validation flow matching with one time per sample, comparable with other runs."""

    passes = ("flow matching", "auxiliary", "teacher")

    def __init__(
        self,
        student_layer: str,
        teacher_layer: str,
        weight: float = 0.8,
        mask_ratio: float = 0.25,
        hidden: int = 2048,
        p_drop: float = 0.1,
        t_std: float = 1.0,
    ):
        """
        Args:
            student_layer: block that predicts the features; in the paper at 0.3 of the depth.
            teacher_layer: block of the EMA denoiser whose features are predicted; in the paper at 0.7 of the depth.
            weight: weight of the prediction.
            mask_ratio: share of the tokens of an image with the second time.
            hidden: width of the hidden layers of the head.
            p_drop: probability of replacing a prompt by the null prompt.
            t_std: standard deviation of the logit of the training times.
        """
        check_range("weight", weight, 0, 100)
        check_range("mask_ratio", mask_ratio, 0, 0.5)
        check_range("hidden", hidden, 1, MOST_WIDTH)
        super().__init__(p_drop, t_std)
        self.student_layer, self.teacher_layer = student_layer, teacher_layer
        self.weight, self.mask_ratio, self.hidden = weight, mask_ratio, hidden

    def prepare(self, backbone: Backbone) -> None:
        student, teacher = (layer_width(backbone, layer) for layer in (self.student_layer, self.teacher_layer))
        head = MlpHead(student, self.hidden, teacher)
        backbone.add_head(HEAD, self.student_layer, head)

    def phase(self, step: int) -> str:
        return "self-flow"

    def __call__(
        self, net: Denoiser, ema: Denoiser, x0: Packed, conds: dict[str, TextCond], rng: SampleRNG, step: int
    ) -> Loss:
        if not torch.is_grad_enabled():
            return super().__call__(net, ema, x0, conds, rng, step)

        # Two times per sample, and the tokens that have the second one.
        noise = rng.normal_like("noise", x0)
        first = flow.draw_t(rng, x0, self.times)
        second = flow.draw_t(rng, x0, self.times, name="second t")
        masked = to_device(mask_tokens(x0, rng, self.mask_ratio), first.device)
        t = torch.where(masked, second[x0.owner], first[x0.owner])

        # Flow matching on both noise levels.
        x_t = x0.with_tokens(flow.interpolate(x0.tokens, noise, t, x0))
        v, features = net(x_t, t, t, conds["cond"], (HEAD,))
        data_loss = flow.mean_per_sample((v - (noise - x0.tokens)).square(), x0)

        # Features of the EMA denoiser for the same noise at the lower of the two levels.
        lower = torch.minimum(first, second)
        x_lower = x0.with_tokens(flow.interpolate(x0.tokens, noise, lower, x0))
        with torch.no_grad():
            _, targets = ema(x_lower, lower, lower, conds["cond"], (self.teacher_layer,))
        target = targets[self.teacher_layer].to(v.dtype)
        cosine = F.cosine_similarity(features[HEAD].to(v.dtype), target, dim=-1)
        cosine = flow.mean_per_sample(cosine[:, None], x0)

        metrics = {"data_loss": data_loss.detach(), "feature_cosine": cosine.detach()}
        return Loss(data_loss - self.weight * cosine, metrics, first, first)


def mask_tokens(x0: Packed, rng: SampleRNG, ratio: float) -> Tensor:
    """(T,) on the host, true for the share `ratio` of each sample's tokens; a function of (seed, step, sample)."""
    masks = []
    for key, num_tokens in zip(rng.keys, x0.lens, strict=True):
        order = philox(*key, "mask").permutation(num_tokens)
        masks.append(torch.from_numpy(order < round(ratio * num_tokens)))
    return torch.cat(masks)
