"""Sampling in processes that start quickly: forks of a server that has imported everything."""

import os
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import mkdtemp

CONTEXT = get_context("forkserver")


def start(size: int, arguments: Sequence[str], env: dict[str, str] | None = None) -> list[BaseProcess]:
    """`python -m selfe.infer ARGUMENTS` on `size` processes; by default with random encoder weights."""
    store = str(Path(mkdtemp()) / "store")
    started = [
        CONTEXT.Process(target=work, args=(rank, size, store, list(arguments), env or {})) for rank in range(size)
    ]
    for process in started:
        process.start()
    return started


def work(rank: int, size: int, store: str, arguments: list[str], env: dict[str, str]) -> None:
    import torch

    from selfe import infer

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"SELFE_STORE": store, "TORCHELASTIC_RESTART_COUNT": "0", "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"SELFE_SKIP_PRETRAINED": "1"} | env
    infer.main(arguments)
    os._exit(0)  # not by the interpreter: gloo's threads may still free tensors, and it would abort
