"""The plan as text, at most 80 columns wide: a summary of four lines, then a table per topic."""

from __future__ import annotations

from collections.abc import Callable
from textwrap import wrap

from selfe import log

NAME, COLUMN, WIDTH = 29, 16, 80  # columns of text: row names, a phase, the page
PHASES_PER_TABLE = (WIDTH - NAME) // COLUMN


def text(plan: dict) -> str:
    """The text that `selfe plan` prints: one table per topic, with a column per phase."""
    lines = [*summary(plan), "", "Assumptions", *paragraphs(plan["assumptions"])]
    lines += ["", "Parameters"]
    lines += [f"  {name:<{NAME - 2}}{count / 1e6:>14,.3f} M" for name, count in plan["parameters"].items()]

    # a run may have more phases than columns fit on the page
    phases = plan["phases"]
    for first in range(0, len(phases), PHASES_PER_TABLE):
        lines += tables(phases[first : first + PHASES_PER_TABLE])

    lines += ["", *memory(plan["memory"]), "", *storage(plan["storage"])]
    if plan["warnings"]:
        lines += ["", "Warnings", *paragraphs(plan["warnings"])]
    return "\n".join(lines)


def summary(plan: dict) -> list[str]:
    """Four lines: the run, whether it can start, how long it takes, what it needs."""
    gpu, room, starts = plan["gpu"], plan["memory"], plan["can_start"]
    (own,) = (variant for variant in room["variants"] if variant["configured"])
    fits = "fits" if own["peak"] <= room["usable"] else "DOES NOT FIT"

    line = "starts: yes" if starts["on"] == plan["gpus"] else f"starts: NO, but with {starts['change']}"
    return [
        f"{plan['config']} on {plan['gpus']:,} x {gpu['name']} of {gpu['gib']} GiB"[:WIDTH],
        f"{line}; micro-batches of {' and '.join(map(str, starts['micro']))}"[:WIDTH],
        f"time: {time(plan['days'])}, {number(plan['gpu_hours'])} GPU-hours at {plan['mfu']:.0%} MFU",
        f"memory: {size(own['peak'])} of {size(room['usable'])} usable, {fits}; "
        f"checkpoint: {size(plan['storage']['checkpoint'])}",
    ]


def tables(phases: list[dict]) -> list[str]:
    """Step, operations, communication and time of these phases."""
    lines = [
        "",
        "Step, by phase",
        row("from step", phases, lambda phase: f"{phase['start']:,}"),
        row("images", phases, lambda phase: f"{phase['batch']:,}"),
        *(row("height x width" if i == 0 else "", phases, shape_number(i)) for i in range(most_shapes(phases))),
        row("image tokens", phases, lambda phase: f"{phase['image_tokens']:,}"),
        row("caption tokens", phases, lambda phase: f"{phase['text_tokens']:,}"),
        row("micro-batches per rank", phases, lambda phase: str(phase["micro_batches"])),
        "",
        "Network calls per rank and step",
    ]

    # rows that depend on the objective
    for part in names(phases, "calls"):
        lines.append(row(part, phases, lambda phase, part=part: str(phase["calls"].get(part, "-"))))

    lines += ["", "PFLOP per step, all ranks"]
    for part in names(phases, "flops"):
        lines.append(row(part, phases, lambda phase, part=part: peta(phase["flops"].get(part))))
    lines += [
        row("total without recomputation", phases, lambda phase: peta(phase["useful_flops"])),
        row("with cached encoders", phases, lambda phase: peta(phase["useful_flops_cached"])),
        row("share of encoders", phases, lambda phase: f"{phase['encoder_share']:.1%}"),
        "",
        "Communication per rank and step",
    ]
    for kind in names(phases, "traffic"):
        lines.append(row(kind, phases, lambda phase, kind=kind: size(phase["traffic"][kind])))

    return [
        *lines,
        "",
        "Time",
        row("steps", phases, lambda phase: f"{phase['end'] - phase['start']:,}"),
        row("GPU-hours", phases, lambda phase: number(phase["gpu_hours"])),
        row("  with cached encoders", phases, lambda phase: number(phase["gpu_hours_cached"])),
        row("time", phases, lambda phase: time(phase["days"])),
    ]


def time(days: float) -> str:
    """Days, or hours and minutes of less than a day."""
    return f"{number(days)} days" if days >= 1 else log.duration(days * 24 * 3600)


def most_shapes(phases: list[dict]) -> int:
    return max(len(phase["shapes"]) for phase in phases)


def shape_number(i: int) -> Callable[[dict], str]:
    """The i-th shape of a phase, or nothing."""
    return lambda phase: next(iter(list(phase["shapes"])[i:]), "")


def memory(room: dict) -> list[str]:
    parts = ("parameters", "gradients", "optimizer", "ema", "encoders", "unsharded")
    titles = {"unsharded": "unsharded, in flight"}

    lines = ["Memory of the rank with the largest share"]
    lines += [f"  {titles.get(part, part):<{NAME - 2}}{size(room[part]):>{COLUMN}}" for part in parts]

    # a row per activation checkpointing setting
    lines += [
        "",
        f"  {'trainer.':<26}{'activations':>13}{'peak':>12}{'largest':>13}{'that':>12}",
        f"  {'activation_checkpointing':<26}{'':>13}{'':>12}{'micro-batch':>13}{'divides':>12}",
    ]
    for variant in room["variants"]:
        every = variant["activation_checkpointing"]
        settings = {False: "false", True: "true: every block", "selective": "selective"}
        name = settings.get(every, f"{every}: one block of {every}")
        name += " *" * variant["configured"]
        sizes = f"{size(variant['activations']):>13}{size(variant['peak']):>12}"
        counts = f"{variant['largest_micro_batch']:>13}{variant['largest_that_divides']:>12}"
        lines.append(f"  {name:<26}{sizes}{counts}")
    return [*lines, f"  * as configured; {size(room['usable'])} usable"]


def storage(disk: dict) -> list[str]:
    lines = ["Disk", f"  {'checkpoint':<34}{size(disk['checkpoint']):>16}"]
    for shape, each in disk["latents_per_image"].items():
        lines.append(f"  {f'latents of an image, {shape}':<34}{size(each['cached']):>16}")
        if each["one_sample"] < each["cached"]:
            lines.append(f"  {'  with --one-sample':<34}{size(each['one_sample']):>16}")
    for shape, num_bytes in disk["features_per_image"].items():
        lines.append(f"  {f'features of an image, {shape}':<34}{size(num_bytes):>16}")
    return [
        *lines,
        f"  {'text, per token':<34}{size(disk['text_per_token']):>16}",
        f"  {'pooled text, per caption':<34}{size(disk['pooled_per_caption']):>16}",
    ]


def paragraphs(sentences: list[str]) -> list[str]:
    """A list item per sentence, wrapped to the page."""
    return [
        line for sentence in sentences for line in wrap(sentence, WIDTH, initial_indent="- ", subsequent_indent="  ")
    ]


def names(phases: list[dict], key: str) -> list[str]:
    """Keys of `phase[key]` over all phases, by first occurrence."""
    return list(dict.fromkeys(name for phase in phases for name in phase[key]))


def row(name: str, phases: list[dict], value: Callable[[dict], str]) -> str:
    return f"  {name:<{NAME - 2}}" + "".join(f"{value(phase):>{COLUMN}}" for phase in phases)


def peta(flops: int | None) -> str:
    return "-" if flops is None else f"{flops / 1e15:,.4g}"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def size(count: int) -> str:
    """Bytes in the largest binary unit that gives at least 1."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:,.4g} {unit}"
    return f"{count} B"
