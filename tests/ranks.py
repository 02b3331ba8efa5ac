"""Run a function on several gloo processes and bring back what rank 0 returned."""

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import start_processes

from selfe import dist


def on_ranks(size: int, function: Callable, *arguments: Any) -> Any:
    """`function(world, *arguments)` on `size` processes; a function of a test module, tensors and plain values only."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        path = Path(folder) / "result.pt"
        start_processes(_child, (size, port, path, function, arguments), nprocs=size, start_method="forkserver")
        return torch.load(path, weights_only=True)


def _child(rank: int, size: int, port: int, path: Path, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with dist.world() as world:
        result = function(world, *arguments)
        if world.is_main:
            torch.save(result, path)
    os._exit(
        0
    )  # gloo's threads may still let go of tensors, which an interpreter that shuts down answers with an abort
