"""What training aids around an objective share: its captions, phases and batch sizes are those of the objective."""

from __future__ import annotations

from collections.abc import Sequence

from selfe.protocols import Backbone, ImageEncoder, Objective
from selfe.rng import SampleRNG
from selfe.types import Loss, Packed


class Wrapper:
    """An objective around another one. Subclasses define `__call__`."""

    def __init__(self, objective: Objective):
        self.objective = objective
        self.batch_multiple = objective.batch_multiple

    @property
    def flow_map(self) -> bool:
        return getattr(self.objective, "flow_map", False)

    @property
    def s_equals_t(self) -> bool:
        return getattr(self.objective, "s_equals_t", False)

    @property
    def passes(self) -> tuple[str, str, str]:
        return getattr(self.objective, "passes", ("flow matching", "auxiliary", "self-evaluation"))

    @property
    def wants_features(self) -> bool:
        return getattr(self.objective, "wants_features", False)

    @property
    def feature_encoder(self) -> ImageEncoder | None:
        return getattr(self.objective, "feature_encoder", None)

    def prepare(self, backbone: Backbone) -> None:
        if hasattr(self.objective, "prepare"):
            self.objective.prepare(backbone)

    def phase(self, step: int) -> str:
        return self.objective.phase(step)

    def captions(self, prompts: Sequence[str], rng: SampleRNG, step: int, drop: bool = True) -> dict[str, list[str]]:
        return self.objective.captions(prompts, rng, step, drop)

    def inner_loss(self, *arguments, features: Packed | None = None) -> Loss:
        """The loss of the wrapped objective; `features` are handed over if it wants them."""
        if getattr(self.objective, "wants_features", False):
            return self.objective(*arguments, features=features)
        return self.objective(*arguments)
