"""The plan as text."""

from __future__ import annotations


def text(plan: dict) -> str:
    """The text that `selfe plan` prints: one section per topic, one column per phase."""
    gpu, phases = plan["gpu"], plan["phases"]
    lines = [
        f"{plan['config']} on {plan['gpus']} x {gpu['name']} ({gpu['gib']} GiB, {gpu['peak_tflops']} TFLOP/s peak, "
        f"MFU {plan['mfu']:.0%})",
        *(f"assumed: {line}" for line in plan["assumptions"]),
        "",
        "Parameters",
        *(f"  {name:<34}{count / 1e6:>14,.3f} M" for name, count in plan["parameters"].items()),
        "",
        "Step, by phase",
        row("from step", phases, lambda phase: f"{phase['start']:,}"),
        row("images", phases, lambda phase: f"{phase['batch']:,}"),
        row("height x width", phases, lambda phase: " ".join(phase["pictures"])),
        row("image tokens", phases, lambda phase: f"{phase['picture_tokens']:,}"),
        row("caption tokens", phases, lambda phase: f"{phase['text_tokens']:,}"),
        row("micro-batches per rank", phases, lambda phase: str(phase["micro_batches"])),
    ]

    # rows that depend on the objective
    for part in names(phases, "calls"):
        lines.append(row(f"network calls: {part}", phases, lambda phase, part=part: str(phase["calls"].get(part, "-"))))

    lines += ["", "PFLOP per step, all ranks"]
    for part in names(phases, "flops"):
        lines.append(row(part, phases, lambda phase, part=part: peta(phase["flops"].get(part))))
    lines += [
        row("total without recomputation", phases, lambda phase: peta(phase["useful_flops"])),
        row("with cached encoder outputs", phases, lambda phase: peta(phase["useful_flops_cached"])),
        row("share of encoders", phases, lambda phase: f"{phase['encoder_share']:.1%}"),
        "",
        "Communication per rank and step",
    ]
    for kind in names(phases, "traffic"):
        lines.append(row(kind, phases, lambda phase, kind=kind: size(phase["traffic"][kind])))

    lines += [
        "",
        "Time",
        row("steps", phases, lambda phase: f"{phase['end'] - phase['start']:,}"),
        row("GPU-hours", phases, lambda phase: number(phase["gpu_hours"])),
        row("GPU-hours with cached outputs", phases, lambda phase: number(phase["gpu_hours_cached"])),
        row("days", phases, lambda phase: number(phase["days"])),
        f"  total: {number(plan['days'])} days, {number(plan['gpu_hours'])} GPU-hours",
        "",
        *memory(plan["memory"]),
        "",
        *storage(plan["storage"]),
    ]
    lines += ["", *(f"warning: {line}" for line in plan["warnings"])] if plan["warnings"] else []
    return "\n".join(lines)


def memory(room: dict) -> list[str]:
    parts = ("parameters", "gradients", "optimizer", "ema", "encoders", "whole")
    names = {"whole": "unsharded parameters, gradients"}

    lines = ["Memory of the rank with the largest share"]
    lines += [f"  {names.get(part, part):<34}{size(room[part]):>16}" for part in parts]

    # a row per activation checkpointing setting
    head = ("activations", "peak, total", "largest micro-batch", "largest that divides")
    lines += [f"  {'activation checkpointing':<26}" + "".join(f"{name:>24}" for name in head)]
    for variant in room["variants"]:
        every = variant["activation_checkpointing"]
        name = {False: "off", True: "every block", "selective": "selective"}.get(every, f"one block of {every}")
        name += " *" * variant["configured"]
        values = [size(variant[key]) for key in ("activations", "peak")]
        values += [str(variant[key]) for key in ("largest_micro_batch", "largest_that_divides")]
        lines.append(f"  {name:<26}" + "".join(f"{value:>24}" for value in values))
    return [*lines, f"  * as configured; {size(room['usable'])} usable"]


def storage(disk: dict) -> list[str]:
    lines = ["Disk", f"  {'checkpoint':<34}{size(disk['checkpoint']):>16}"]
    for shape, each in disk["latents_per_picture"].items():
        lines.append(f"  {f'latents of an image, {shape}':<34}{size(each['cached']):>16}")
        if each["one_sample"] < each["cached"]:
            lines.append(f"  {'  with --one-sample':<34}{size(each['one_sample']):>16}")
    return [
        *lines,
        f"  {'text, per token':<34}{size(disk['text_per_token']):>16}",
        f"  {'pooled text, per caption':<34}{size(disk['pooled_per_caption']):>16}",
    ]


def names(phases: list[dict], key: str) -> list[str]:
    """Keys of `phase[key]` over all phases, by first occurrence."""
    return list(dict.fromkeys(name for phase in phases for name in phase[key]))


def row(name: str, phases: list[dict], value) -> str:
    return f"  {name:<34}" + "".join(f"{value(phase):>20}" for phase in phases)


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
