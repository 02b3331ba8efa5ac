"""An objective: flow matching with the Huber loss, which limits the weight of images with large errors."""

from collections.abc import Sequence

from torch.nn.functional import huber_loss

from selfe import flow
from selfe.protocols import Denoiser
from selfe.rng import SampleRNG
from selfe.types import Loss, Packed, TextCond, check_range


class HuberMatching:
    batch_multiple = 1  # any micro-batch size

    def __init__(self, delta: float = 1.0, p_drop: float = 0.1):
        """
        Args:
            delta: the loss is quadratic in the velocity up to this error, and linear above it.
            p_drop: probability that a prompt is replaced by the null prompt.
        """
        check_range("delta", delta, 1e-6, 1e6)
        check_range("p_drop", p_drop, 0, 1)
        self.delta, self.p_drop = delta, p_drop

    def phase(self, step: int) -> str:
        return "Huber matching"

    def captions(self, prompts: Sequence[str], rng: SampleRNG, step: int, drop: bool = True) -> dict[str, list[str]]:
        return {"cond": flow.drop_prompts(prompts, rng, self.p_drop) if drop else list(prompts)}

    def __call__(
        self, net: Denoiser, ema: Denoiser, x0: Packed, conds: dict[str, TextCond], rng: SampleRNG, step: int
    ) -> Loss:
        noise = rng.normal_like("noise", x0)  # (T, d)
        t = flow.draw_t(rng, x0)  # (B,)
        x_t = x0.with_tokens(flow.interpolate(x0.tokens, noise, t, x0))

        v = net(x_t, t, t, conds["cond"])
        error = huber_loss(v, noise - x0.tokens, reduction="none", delta=self.delta)
        loss = flow.mean_per_sample(error, x0)
        return Loss(loss, {"data_loss": loss.detach()}, t, t)
