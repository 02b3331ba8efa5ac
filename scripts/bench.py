"""Measure, against a peer or a bound, and say in one JSON object whether it holds.

    .venv/bin/python scripts/bench.py data       the loader against Hugging Face's imagefolder
    .venv/bin/python scripts/bench.py manifest   opening ten million lines (Linux; 1.2 GB of temporary disk)
    .venv/bin/python scripts/bench.py cache      a step from the cache against one from pictures
    .venv/bin/python scripts/bench.py step       the denoiser, forward and backward, against diffusers' FLUX
    .venv/bin/python scripts/bench.py selfe      a step of Self-E against one of flow matching
    .venv/bin/python scripts/bench.py sample     guidance, and packed against padded sampling
    .venv/bin/python scripts/bench.py optim      the optimizer and the EMA against their plain forms
    .venv/bin/python scripts/bench.py save       what a save costs the steps beside it
    .venv/bin/python scripts/bench.py grow       time and memory over tokens, batch and width

One thread; CPU seconds, those of worker processes included; contenders take turns, medians count. Exit code 1 if a
bound is missed. The peers come by scripts/setup.sh --group bench.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from contextlib import redirect_stdout

import bench_data
import bench_growth
import bench_method
import bench_model
import bench_save
import torch
from measuring import keep_memory

from selfe import launch

VERBS = {name: getattr(bench_data, name) for name in ("data", "manifest", "cache")}
VERBS |= {"step": bench_model.step, "save": bench_save.save, "grow": bench_growth.grow}
VERBS |= {name: getattr(bench_method, name) for name in ("selfe", "sample", "optim")}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="the only form there is; accepted to be named")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_memory()
    with redirect_stdout(sys.stderr):  # what parts of selfe say on the way
        result = VERBS[options.verb](options.rounds)
    machine = {"machine": f"{platform.machine()}, {platform.system()}", "torch": torch.__version__}
    print(json.dumps({"verb": options.verb} | machine | result, indent=1))
    if not all(verdict["pass"] for verdict in result["verdicts"]):
        sys.exit(1)


if __name__ == "__main__":
    launch.worker(main)
