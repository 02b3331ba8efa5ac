"""Options of the test command, and what several test files share."""

import gc
import multiprocessing
import os
import sys
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from hypothesis import settings

from selfe.backbones import mmdit
from selfe.distributed import collectives
from selfe.distributed.collectives import World

# many tests start programs, which import this package in half the time when bytecode is kept
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# the tests run in two processes, which start others: with more threads these would wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

settings.register_profile("selfe", deadline=None)  # no test depends on how fast the machine is
settings.load_profile("selfe")
# one process imports everything once, alone and without threads; ranks of the tests are forks of it
PARTS = "encoders.t5_clip", "encoders.flux_vae", "backbones.mmdit", "objectives.self_evaluation"  # which configs name
PRELOADED = "selfe.train", "selfe.infer", *(f"selfe.{part}" for part in PARTS)
PRELOADED += "pytest", "tests.helpers.train_processes", "tests.helpers.frozen"  # ranks import the test that starts them
multiprocessing.set_forkserver_preload([*PRELOADED])

# the files that take longest, which come first: the two processes of the tests then end at about the same time
LONGEST = (
    "test_adapt",
    "test_compile",
    "test_export",
    "test_flow_maps",
    "test_grad_guard",
    "test_infer",
    "test_interruptions",
    "test_launch",
    "test_miniature",
    "test_plan",
    "test_remote",
    "test_resume",
    "test_smoke",
    "test_training_aids",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_collection_finish():
    gc.freeze()  # as tests.helpers.frozen


def pytest_addoption(parser):
    parser.addoption("--kill-rounds", type=int, default=4, help="how often test_interruptions.py kills a run")
    parser.addoption("--compile", action="store_true", help="all blocks of the tests' own process are compiled")


@pytest.fixture
def traced(monkeypatch) -> None:
    """Compilation traces, forward and backward, without generating code, which takes most of the time."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.fixture(autouse=True)
def compiled(request, monkeypatch) -> None:
    if request.config.getoption("--compile"):
        request.getfixturevalue("traced")
        for block in (mmdit.DoubleBlock, mmdit.SingleBlock):
            forward = torch.compile(block.forward, dynamic=True)
            monkeypatch.setattr(block, "forward", forward)


@pytest.fixture
def alone(monkeypatch) -> Iterator[World]:
    """A process group of this process alone."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with collectives.process_group() as world:
        yield world
