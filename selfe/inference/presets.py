"""Presets: the sampling settings for each number of steps, in a YAML file that `selfe tune-sampler` writes.

presets:
  1: {cfg_scale: 1.5, s_ratio: 0.75, sampler: {module: selfe.samplers.renoise.Renoise, params: {eta: 0.0}}}
  4: {cfg_scale: 2.0, s_ratio: 0.0, guidance_interval: [0.0, 0.75]}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml

from selfe import config
from selfe.errors import UserError
from selfe.io.sampling_limits import check_interval, check_range
from selfe.protocols import Sampler
from selfe.samplers.cost import check_sampler
from selfe.samplers.guidance import Interval
from selfe.samplers.renoise import Renoise


@dataclass(frozen=True)
class Preset:
    """The sampling settings for a number of steps, and the value of the metric for which they were chosen."""

    cfg_scale: float
    s_ratio: float
    guidance_interval: tuple[float, float] | None = None
    sampler: Sampler = Renoise()  # noqa: RUF009 - stateless
    value: float | None = None

    def __post_init__(self):
        check_range("cfg_scale", self.cfg_scale)
        check_range("s_ratio", self.s_ratio)
        check_interval("guidance_interval", self.guidance_interval)
        check_sampler(self.sampler, self.s_ratio)


def read(path: Path) -> Mapping[int, Preset]:
    """The presets of a file by number of steps. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path}: no such preset file; selfe tune-sampler writes it")
    return read_version(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def read_version(path: Path, modified: int) -> Mapping[int, Preset]:
    """As `read`, once for each version of a file."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        described = content["presets"]
        numbers = {int(count): values for count, values in described.items()}
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: not a preset file; it has a mapping `presets` of numbers of steps to sampling settings"
        ) from error

    # a preset comes with weights of others, and importing a module runs its code
    if foreign := config.foreign_modules(described):
        raise UserError(f"{path}: names {foreign[0]}, which is not part of selfe; presets have its samplers only")
    if not numbers:
        raise UserError(f"{path}: has no presets; give one for at least one number of steps")
    try:
        for count in numbers:
            check_range("num_steps", count)
        return {count: config.call(Preset, values, f"presets.{count}", build=True) for count, values in numbers.items()}
    except (config.Problem, ValueError) as error:
        raise UserError(f"{path}: {error}") from error


def nearest(presets: Mapping[int, Preset], num_steps: int) -> Preset:
    """The preset of this number of steps; otherwise of the number nearest by ratio, of two the smaller one."""
    return presets[min(presets, key=lambda count: (abs(math.log(count / num_steps)), count))]


def described(preset: Preset, sampler: dict) -> dict:
    """A preset in YAML types; `sampler`: {module, params}."""
    interval: Interval | None = preset.guidance_interval
    values = {"cfg_scale": preset.cfg_scale, "s_ratio": preset.s_ratio}
    values["guidance_interval"] = None if interval is None else list(interval)
    return values | {"sampler": sampler, "value": preset.value}
