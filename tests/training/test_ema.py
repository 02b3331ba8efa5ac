"""Averages after training, from the tracks of several checkpoints."""

from pathlib import Path

import numpy as np
import pytest

from selfe.errors import UserError
from selfe.training.ema import ConstantDecay, PowerFunction, gamma_of
from selfe.training.ema_reconstruction import fit, plan

STEPS = 2000
WALK = np.cumsum(np.random.default_rng(0).standard_normal(STEPS))  # a weight during training


def averages(std: float) -> np.ndarray:
    """The average after each step."""
    track, value, values = PowerFunction(std), 0.0, []
    for step in range(STEPS):
        decay = track.decay_at(step)
        value = decay * value + (1 - decay) * WALK[step]
        values.append(value)
    return np.array(values)


@pytest.fixture(scope="module")
def saved() -> tuple[list, list]:
    """Profiles and values of two tracks, every 100 steps."""
    ends = range(100, STEPS + 1, 100)
    tracks = {std: averages(std) for std in (0.05, 0.1)}
    pairs = [((gamma_of(std), end), values[end - 1]) for std, values in tracks.items() for end in ends]
    return tuple(map(list, zip(*pairs, strict=True)))


@pytest.mark.parametrize(("std", "bound"), [(0.07, 0.005), (0.14, 0.01), (0.2, 0.02), (0.03, 0.03)])
def test_an_average_of_another_width_follows_from_two_tracks(std, bound, saved):
    profiles, values = saved
    shares, error = fit(profiles, (gamma_of(std), STEPS))
    assert shares.sum() == pytest.approx(1)
    assert error < bound
    assert shares @ values == pytest.approx(averages(std)[-1], abs=0.05)


def test_a_saved_average_is_its_own_reconstruction(saved):
    profiles, values = saved
    shares, error = fit(profiles, (gamma_of(0.1), STEPS))
    assert error < 1e-6
    assert shares @ values == pytest.approx(averages(0.1)[-1], abs=1e-9)


def test_far_from_what_was_saved_the_error_is_large():
    _, error = fit([(gamma_of(std), STEPS) for std in (0.05, 0.1)], (gamma_of(0.25), STEPS))
    assert error > 0.5


def test_without_a_power_function_there_is_nothing_to_reconstruct_from():
    with pytest.raises(UserError, match=r"no average of selfe.training.ema.PowerFunction, .*; its averages are ema$"):
        plan(Path("run/checkpoints/step_00000001"), {"ema": ConstantDecay()}, 0.1)
