"""Options of the test command, and what several test files share."""

import multiprocessing
from collections.abc import Iterator

import pytest
from hypothesis import settings

from selfe import dist
from selfe.dist import World

settings.register_profile("selfe", deadline=None)  # no test depends on how fast the machine is
settings.load_profile("selfe")
# one process imports everything once, alone and without threads; ranks of the tests are forks of it
multiprocessing.set_forkserver_preload(
    ["selfe.train", "selfe.encoders.t5_clip", "selfe.encoders.flux_vae", "selfe.objectives.self_evaluation"]
)


def pytest_addoption(parser):
    parser.addoption("--kill-rounds", type=int, default=4, help="how often test_interruptions.py kills a run")


@pytest.fixture
def alone(monkeypatch) -> Iterator[World]:
    """A process group of this process alone."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with dist.world() as world:
        yield world
