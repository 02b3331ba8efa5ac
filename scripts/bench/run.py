"""Benchmarks against a peer or a bound. Prints one JSON object with the values and whether each bound holds.

    .venv/bin/python scripts/bench/run.py data       the loader against Hugging Face's imagefolder
    .venv/bin/python scripts/bench/run.py manifest   opening ten million lines (Linux; 1.2 GB of temporary disk)
    .venv/bin/python scripts/bench/run.py cache      a step from the cache against one from images
    .venv/bin/python scripts/bench/run.py step       the denoiser, forward and backward, against diffusers' FLUX
    .venv/bin/python scripts/bench/run.py selfe      a step of Self-E against one of flow matching
    .venv/bin/python scripts/bench/run.py sample     guidance, and packed against padded sampling
    .venv/bin/python scripts/bench/run.py optim      the optimizer and the EMA against their plain forms
    .venv/bin/python scripts/bench/run.py save       what an asynchronous checkpoint costs the training loop
    .venv/bin/python scripts/bench/run.py evaluate   memory of an evaluation over the number of images (Linux)
    .venv/bin/python scripts/bench/run.py grow       time and memory over tokens, batch size and width

Single-threaded, in CPU seconds including worker processes; contenders are interleaved, and medians are reported. Exit
code 1 if a bound is missed. Install the peers with scripts/setup.sh --group bench.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from contextlib import redirect_stdout

import data as bench_data
import evaluation
import growth
import method
import model
import save as bench_save
import torch
from measure import keep_memory

from selfe import launch
from selfe.device import choose_precision, device_name

VERBS = {name: getattr(bench_data, name) for name in ("data", "manifest", "cache")}
VERBS |= {"step": model.step, "save": bench_save.save, "grow": growth.grow, "evaluate": evaluation.evaluate}
VERBS |= {name: getattr(method, name) for name in ("selfe", "sample", "optim")}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    keep_memory()
    with redirect_stdout(sys.stderr):  # keep stdout for the JSON object
        result = VERBS[options.verb](options.rounds)

    cpu = torch.device("cpu")
    machine = {"machine": f"{platform.machine()}, {platform.system()}", "torch": torch.__version__}
    machine |= {"cpu": device_name(cpu), "precision auto": choose_precision("auto", cpu)}
    print(json.dumps({"verb": options.verb} | machine | result, indent=1))
    if not all(check["pass"] for check in result["checks"]):
        sys.exit(1)


if __name__ == "__main__":
    launch.worker(lambda: main(sys.argv[1:]))
