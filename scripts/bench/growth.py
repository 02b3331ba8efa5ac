"""Benchmark of scaling: forward and backward of the denoiser over tokens, batch size and width."""

from __future__ import annotations

from measure import at_most, flops, peak_bytes, take_turns
from model import WIDTH, denoiser, ideal, inputs, turn

CAPTION = 22  # tokens
AXES = {  # axis: {value on the axis: (image side in patches, batch, width)}
    "tokens": {side**2: (side, 8, WIDTH) for side in (4, 8, 12, 16, 24, 32)},  # per image
    "batch": {batch: (12, batch, WIDTH) for batch in (1, 2, 4, 8, 16, 32)},
    "width": {width: (12, 4, width) for width in (128, 256, 384, 512, 768, 1024)},
}


def grow(rounds: int) -> dict:
    """CPU milliseconds, GFLOP, and peak MB of activations and gradients, without activation checkpointing."""
    figures, checks = {}, []
    for axis, places in AXES.items():
        works, least = {}, {}
        for number, (side, batch, width) in places.items():
            shapes = [(side, side)] * batch, [CAPTION] * batch
            works[number] = turn(denoiser(width=width), [inputs(*shapes)], autocast=False)
            least[number] = ideal(*shapes, width=width)

        # FLOPs and memory once each, time in interleaved rounds
        counted = {number: flops(work) for number, work in works.items()}
        memory = {number: peak_bytes(work) for number, work in works.items()}
        seconds = take_turns(works, rounds)

        figures[axis] = {
            str(number): {
                "CPU milliseconds": round(1000 * seconds[number], 1),
                "GFLOP": round(counted[number] / 1e9, 3),
                "peak MB": round(memory[number] / 1e6, 1),
            }
            for number in works
        }

        # packed sequences must not cost more than their true lengths
        worst = max(counted[number] / least[number] for number in works)
        checks.append(at_most(f"{axis}: executed / ideal FLOPs", worst, 1.005))
    return {"figures": figures, "checks": checks}
