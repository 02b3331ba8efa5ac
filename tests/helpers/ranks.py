"""Run a function on several gloo processes and return the result of rank 0."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import start_processes

from selfe.distributed import collectives


def on_ranks(size: int, function: Callable, *arguments: Any) -> Any:
    """`function(world, *arguments)` on `size` processes; a function of a test module, tensors and plain values only."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.pt"
        start_processes(_child, (size, path, function, arguments), nprocs=size, start_method="forkserver")
        return torch.load(path, weights_only=True)


def _child(rank: int, size: int, path: Path, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"SELFE_STORE": str(path.with_name("store")), "TORCHELASTIC_RESTART_COUNT": "0"}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with collectives.process_group() as world:
        result = function(world, *arguments)
        if world.is_main:
            torch.save(result, path)
    os._exit(0)  # not by the interpreter: gloo's threads may still free tensors, and it would abort
