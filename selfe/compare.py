"""What decides an image besides the denoiser's weights: the settings that each part declares, and their comparison.

A checkpoint fits every system whose tensors have the same shapes. Settings that no shape shows, such as the base of the
rotary embedding or random instead of pretrained encoders, are therefore compared by name: by a resumed run and by
sampling with the run's config.yaml, and by training from a feature cache with the settings it was built with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from selfe import config
from selfe.errors import UserError

PARTS = ("backbone", "text_encoder", "autoencoder")  # of a system; the objective only matters in training

# the optimizer of a trainer that names none
ADAMW = {"module": "selfe.optimizers.adamw.AdamW"}

# rounding and memory only: a run and the sampling from it may differ in these
NUMERICS = ("params.dtype", "params.decode_pixels")

# parts that read a cache of another part's output, by the parameter that holds the other part
CACHED = {
    "selfe.encoders.cached_text.CachedText": "encoder",
    "selfe.encoders.remembered_text.RememberedText": "encoder",
    "selfe.encoders.cached_latents.CachedLatents": "autoencoder",
}


def describe(name: str, part: Any) -> dict[str, Any]:
    """The class of a part and its `output_settings`, by key path, in YAML types. `name`: the key path of the part."""
    return {f"{name}.module": class_path(part)} | flat(config.plain(part.output_settings()), f"{name}.params")


def class_path(part: Any) -> str:
    """`module.Class` of a part, which identifies it where its parameters alone would not."""
    return f"{type(part).__module__}.{type(part).__qualname__}"


def describe_system(system: dict) -> dict[str, Any]:
    """`describe` of the parts of a config's `system` that sampling uses. Builds them without weights."""
    described: dict[str, Any] = {}
    for name in PARTS:
        with torch.device("meta"):
            part = config.build_part(system[name], f"system.{name}")
        described |= describe(f"system.{name}", part)
    return described


def uncached(system: dict) -> dict:
    """A config's `system` with parts that read a feature cache replaced by the parts whose output is cached."""
    system = dict(system)
    for name in PARTS:
        while (inner := CACHED.get(system[name]["module"])) is not None:
            system[name] = system[name]["params"][inner]
    return system


def config_beside(checkpoint: Path) -> Path | None:
    """The config.yaml of the run that a checkpoint belongs to, in RUN/ or RUN/checkpoints/; None if there is none.

    An exported folder holds its own.
    """
    for path in (checkpoint.absolute(), checkpoint.resolve()):
        for folder in (path, *path.parents[:2]):
            if (folder / "config.yaml").is_file():
                return folder / "config.yaml"
    return None


def check_run(run: Path, settings: dict, allowed: Sequence[str], section: str) -> None:
    """Compare the system of `settings` with that of a run's config.yaml, before anything is loaded.

    A run that trains on (`section` is "trainer") is also compared by the state that its optimizer keeps and by the
    averages of its weights.

    Args:
        run: the run's config.yaml. A module that it names is imported only if it is part of this package, or if
            `settings` names it too.
        allowed: key paths that may differ, the value of `allow_changes` in `section`.

    Raises:
        UserError: a setting differs; the message has both values of each.
    """
    tree = config.resolve(run)
    if "system" not in tree:
        raise UserError(f"{run}: has no section system; give the config.yaml that training saved")
    here, there = uncached(settings["system"]), uncached(tree["system"])

    # parts of different classes have different settings, so only the classes are compared
    changed = {}
    for name in PARTS:
        modules = there[name]["module"], here[name]["module"]
        if modules[0] != modules[1]:
            changed[f"system.{name}.module"] = modules
            there[name] = here[name]

    train_here, train_there = (trainer_parts(trees, section) for trees in (settings, tree))
    modules = [parts["optimizer"]["module"] for parts in (train_there, train_here)]
    if modules[0] != modules[1]:
        changed["trainer.optimizer.module"] = tuple(modules)
        train_there["optimizer"] = train_here["optimizer"]

    # inside of parts
    named_there = [train_there, *(there[name] for name in PARTS)]
    foreign = set(config.foreign_modules(named_there)) - set(config.modules([here, train_here]))
    if foreign:
        raise UserError(f"{run}: names {min(foreign)}, which is not part of selfe and which this config does not name")

    try:
        described = describe_system(there) | describe_trainer(train_there)
    except UserError as error:
        raise UserError(f"{run}: {error}") from error
    changed |= differences(described, describe_system(here) | describe_trainer(train_here))

    changed = {key: pair for key, pair in changed.items() if key not in allowed and not key.endswith(NUMERICS)}
    if changed:
        values = "; ".join(f"{key} was {before}, is now {now}" for key, (before, now) in changed.items())
        if any(key.endswith("skip_pretrained") for key in changed):
            values += " (true: random encoders; see SELFE_SKIP_PRETRAINED)"
        what = "system" if any(key.startswith("system.") for key in changed) else "trainer"
        raise UserError(
            f"{run}: the {what} differs from the run's: {values}; use the run's values, or allow the change with "
            f"{section}.allow_changes=[{','.join(changed)}]"
        )


def trainer_parts(tree: dict, section: str) -> dict[str, Any]:
    """The parts of a config's `trainer` on which the content of its checkpoints depends; defaults in other sections."""
    trainer = tree.get("trainer", {}) if section == "trainer" else {}
    return {"optimizer": trainer.get("optimizer") or ADAMW, "ema": trainer.get("ema") or []}


def describe_trainer(parts: dict[str, Any]) -> dict[str, Any]:
    """`describe` of the optimizer, and the names of the averages of the weights."""
    described = describe("trainer.optimizer", config.build_part(parts["optimizer"], "trainer.optimizer"))
    tracks = [config.build_part(track, f"trainer.ema[{i}]") for i, track in enumerate(parts["ema"])]
    return described | {"trainer.ema": ["ema", *(track.name for track in tracks[1:])]}


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Both values of every key that differs; that of a missing key is `(none)`."""
    keys = dict.fromkeys([*before, *after])
    pairs = {key: (before.get(key, "(none)"), after.get(key, "(none)")) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{path}.{key}" if path else key)
    return leaves
