"""Averages of any length after training, from power-function tracks of a run's checkpoints (EDM2, arXiv 2312.02696).

A power-function EMA at step T weights the step t by its profile p(t) = (gamma + 1) t^gamma / T^(gamma + 1). The saved
averages of all checkpoints up to T are combined so that the sum of their profiles is closest to the wanted one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from selfe.checkpoint import state, verify
from selfe.errors import UserError
from selfe.training.ema import PowerFunction, gamma_of

Profile = tuple[float, int]  # gamma, T


@dataclass(frozen=True)
class Snapshot:
    """A power-function average in a checkpoint, and its share of the reconstructed one."""

    path: Path
    name: str  # of the track
    share: float


@dataclass(frozen=True)
class Reconstruction:
    """An average as a weighted sum of saved ones. Shares add up to 1 and may be negative."""

    snapshots: tuple[Snapshot, ...]
    error: float  # distance between the profiles, relative to the norm of the wanted one

    def read(self, name: str, shape: torch.Size) -> Tensor:
        """The average of a parameter, float32 on the host."""
        total = torch.zeros(shape, dtype=torch.float64)
        for snapshot in self.snapshots:
            saved = torch.empty(shape)
            state.load_tensors(snapshot.path, {name: saved}, snapshot.name)
            total += snapshot.share * saved.double()
        return total.float()


def plan(path: Path, tracks: Mapping[str, object], std: float) -> Reconstruction:
    """How the average of width `std` at the step of a checkpoint follows from it and the earlier ones beside it.

    Args:
        tracks: the averages of the run, by name.

    Raises:
        UserError: the run has no power-function track.
    """
    gammas = {name: track.gamma for name, track in tracks.items() if isinstance(track, PowerFunction)}
    if not gammas:
        raise UserError(
            f"{path}: the run has no average of selfe.training.ema.PowerFunction, from which others can be computed; "
            f"its averages are {', '.join(tracks)}"
        )

    # averages of this step and of earlier ones
    step = verify.read_step(path)
    averages: list[tuple[Path, str]] = []
    for checkpoint in filter(verify.is_complete, verify.list_checkpoints(path.parent)):
        if verify.read_step(checkpoint) <= step:
            stored = set(state.list_weights(checkpoint))
            averages += [(checkpoint, name) for name in gammas if name in stored]

    profiles = [(gammas[name], verify.read_step(checkpoint)) for checkpoint, name in averages]
    shares, error = fit(profiles, (gamma_of(std), step))
    snapshots = [Snapshot(*average, float(share)) for average, share in zip(averages, shares, strict=True)]
    return Reconstruction(tuple(snapshots), error)


def fit(profiles: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """Shares, with sum 1, whose weighted sum of profiles is closest to the wanted one, and the relative distance."""
    products = np.array([[inner_product(a, b) for b in profiles] for a in profiles])
    with_wanted = np.array([inner_product(profile, wanted) for profile in profiles])

    # least squares under the constraint, by a Lagrange multiplier; profiles that are nearly equal share
    count = len(profiles)
    system = np.ones((count + 1, count + 1))
    system[:count, :count], system[count, count] = products, 0
    shares = np.linalg.lstsq(system, np.append(with_wanted, 1), rcond=1e-12)[0][:count]

    norm = inner_product(wanted, wanted)
    distance = norm - 2 * shares @ with_wanted + shares @ products @ shares
    return shares, float(np.sqrt(max(distance, 0) / norm))


def inner_product(a: Profile, b: Profile) -> float:
    """The integral of p_a(t) p_b(t) over all t that both cover."""
    (gamma_a, end_a), (gamma_b, end_b) = sorted((a, b), key=lambda profile: profile[1])
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return scale * (end_a / end_b) ** gamma_b / end_b
