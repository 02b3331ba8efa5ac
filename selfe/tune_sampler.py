"""Sampler search: `python -m selfe.tune_sampler CONFIG SEARCH [key=value ...]`, started by `selfe tune-sampler`.

For each number of steps, which stands for as many calls of the denoiser, sampling settings are tried one after the
other on the same prompts and the same noise, and the best ones are written as a preset. Every process generates its
share of the images of a candidate. Candidates that an earlier start has measured are not measured again.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from torch import nn

from selfe import compare, config, errors, infer, launch, log
from selfe.checkpoint.weights import find_weights
from selfe.device import choose_precision
from selfe.distributed import collectives
from selfe.distributed.collectives import World
from selfe.encoders.remembered_text import RememberedText
from selfe.errors import UserError
from selfe.evaluation import results
from selfe.evaluation.metrics import CATEGORY_MEAN, METRICS
from selfe.evaluation.settings import EvaluationConfig, MetricSettings
from selfe.inference import presets
from selfe.inference.presets import Preset
from selfe.inference.prompts import SamplingDefaults, sampler_name, sweep
from selfe.io import image_encode
from selfe.io.folder_lock import FolderLock
from selfe.io.sampling_limits import check_interval, check_range
from selfe.protocols import Sampler
from selfe.samplers.adams_bashforth import AdamsBashforth
from selfe.samplers.cost import calls_of, steps_within
from selfe.samplers.guidance import Interval, is_inside
from selfe.samplers.heun import Heun
from selfe.samplers.renoise import Renoise
from selfe.system import System
from selfe.training.evaluation import Evaluator, TrainingEvaluation, cell_of

# those whose steps are worth their calls; Euler is Renoise without fresh noise
SAMPLERS = {"renoise": Renoise, "heun": Heun, "adams_bashforth": AdamsBashforth}


@dataclass(frozen=True)
class Candidate:
    """Sampling settings for a number of calls of the denoiser; all candidates for a number cost the same."""

    cfg_scale: float
    s_ratio: float
    eta: float  # of Renoise
    guidance_interval: Interval | None
    sampler: str = "renoise"

    def __post_init__(self):
        for name in ("cfg_scale", "s_ratio", "eta"):
            check_range(name, getattr(self, name))
        check_interval("guidance_interval", self.guidance_interval)
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler: {self.sampler!r}; valid: {', '.join(SAMPLERS)}")

    def built(self) -> Sampler:
        """The sampler with its parameters."""
        return Renoise(self.eta) if self.sampler == "renoise" else SAMPLERS[self.sampler]()

    def normal(self, num_calls: int) -> Candidate:
        """Equal for candidates that generate the same images in `num_calls` calls of the denoiser."""
        chosen = self
        if self.sampler != "renoise":
            # of an ODE: s = t and no fresh noise
            chosen = replace(self, s_ratio=SAMPLERS[self.sampler].s_ratio, eta=0.0)
        num_steps = steps_within(chosen.built(), num_calls)
        if num_steps == 1:
            # a step to the data has no fresh noise, and is that of Euler
            chosen = replace(chosen, sampler="renoise", eta=0.0)

        interval = chosen.guidance_interval
        guided = [is_inside(1 - k / num_steps, interval) for k in calls_of(chosen.built(), num_steps)]
        scale = chosen.cfg_scale if any(guided) else 1.0
        return replace(chosen, cfg_scale=scale, guidance_interval=None if scale == 1 or all(guided) else interval)

    def uses(self, num_calls: int) -> bool:
        """Whether the sampler takes several steps in so many calls; with one, it is that of Euler."""
        return self.sampler == "renoise" or steps_within(self.built(), num_calls) > 1

    def settings(self, defaults: SamplingDefaults, num_calls: int) -> SamplingDefaults:
        """The sampling settings of its images."""
        values = {name: value for name, value in vars(self).items() if name not in ("eta", "sampler")}
        sampler = self.built()
        return replace(defaults, **values, num_steps=steps_within(sampler, num_calls), sampler=sampler)


@dataclass(frozen=True)
class Search:
    """What is searched for."""

    metric: str  # EXTRACTOR/METRIC
    budget: int  # images, over all numbers of steps and all starts
    num_images: int  # images of a candidate
    num_steps: tuple[int, ...]
    grid: dict[str, list]  # the values to try of each setting, in the order in which settings are varied
    out: str  # the preset file

    @property
    def most_candidates(self) -> int:
        """Candidates for each number of steps."""
        return self.budget // (self.num_images * len(self.num_steps))

    @classmethod
    def parse(cls, text: str) -> Search:
        """From JSON. Raises UserError for values out of range."""
        values = json.loads(text)
        intervals = values["grid"]["guidance_interval"]
        values["grid"]["guidance_interval"] = [interval and tuple(interval) for interval in intervals]
        search = cls(**values | {"num_steps": tuple(values["num_steps"])})
        try:
            for count in search.num_steps:
                check_range("num_steps", count, "--steps")
            for name, options in search.grid.items():
                for option in options:
                    neutral = {"cfg_scale": 1.0, "s_ratio": 0.0, "eta": 0.0, "guidance_interval": None}
                    Candidate(**neutral | {name: option})
        except ValueError as error:
            raise UserError(str(error)) from error
        if search.most_candidates < 1:
            raise UserError(
                f"--budget: {search.budget} images are less than a candidate of {search.num_images} images for each of "
                f"{len(search.num_steps)} numbers of steps; give at least {search.num_images * len(search.num_steps)}"
            )
        return search


@dataclass(frozen=True)
class SearchEvaluation(TrainingEvaluation):
    """The images of a candidate and how they are measured."""

    section: ClassVar[str] = "evaluation"
    images_key: ClassVar[str] = "--images"
    prompts_key: ClassVar[str] = "inferencer.defaults.prompt_file"


def coordinate_search(
    num_steps: int,
    start: Candidate,
    grid: Mapping[str, list],
    most: int,
    measure: Callable[[Candidate], float],
    is_better: Callable[[float, float], bool],
    is_valid: Callable[[Candidate], bool] = lambda candidate: True,
) -> tuple[Candidate, float, int]:
    """Vary one setting after the other, keep the best value of each, and repeat until nothing changes.

    Args:
        most: candidates that may be measured.
        is_valid: whether a candidate can be sampled with; `start` has to be valid.

    Returns:
        The best candidate, its value, and how many candidates were measured.
    """
    values: dict[Candidate, float] = {}
    best = start.normal(num_steps)
    values[best] = measure(best)
    while True:
        before = best
        for name, options in grid.items():
            for option in options:
                varied = replace(best, **{name: option})
                candidate = varied.normal(num_steps)
                if not varied.uses(num_steps) or not is_valid(candidate):
                    continue
                if candidate not in values:
                    if len(values) == most:
                        return best, values[best], most
                    values[candidate] = measure(candidate)
                if is_better(values[candidate], values[best]):
                    best = candidate
        if best == before:
            return best, values[best], len(values)


def metric_of(value: str) -> str:
    """The metric that a value belongs to: `retrieval` of retrieval@1; other names are scores of the extractor."""
    if value.endswith(f"/{CATEGORY_MEAN}"):
        return CATEGORY_MEAN
    name = value.partition("/")[0]
    if name.startswith("retrieval@"):
        return "retrieval"
    return name if name in METRICS else "scores"


class Measurements:
    """Values of candidates, each in a line of a file as soon as it is known."""

    def __init__(self, path: Path, identity: str, world: World):
        self.path, self.identity, self.world = path, identity, world
        lines = []
        if world.is_main and path.is_file():
            # a line that was not complete when the search was killed is left out
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        lines = collectives.broadcast(lines, world)
        self.values = {line["candidate"]: line["value"] for line in lines if line["identity"] == identity}

    def value(self, num_steps: int, candidate: Candidate, measure: Callable[[], float]) -> float:
        """The value of a candidate, measured if it is not known."""
        name = json.dumps({"num_steps": num_steps} | asdict(candidate), sort_keys=True)
        if name not in self.values:
            self.values[name] = measure()
            if self.world.is_main:
                line = {"identity": self.identity, "candidate": name, "value": self.values[name]}
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
        return self.values[name]


def run(
    system: System,
    net: nn.Module,
    weights: dict[str, Any],
    system_settings: dict[str, Any],
    cfg: SearchEvaluation,
    search: Search,
    world: World,
) -> None:
    """Search for each number of steps, and write the preset. Raises UserError.

    Args:
        net: the denoiser.
        weights: kind, step and fingerprint of its weights, and its precision.
        system_settings: what else decides the images (`compare.describe_system`).
    """
    out = Path(search.out)
    folder = out.with_name(f"{out.stem}_search")
    evaluator = Evaluator(cfg, system, folder, world)
    evaluator.prepare()
    extractor, _, metric = search.metric.partition("/")
    valid = [key.removeprefix("eval/").rpartition("/")[0] for key in evaluator.keys]
    if search.metric not in valid:
        names = list(dict.fromkeys([*valid, *(f"{extractor}/{name}" for name in METRICS)]))
        raise UserError(f"--metric: {search.metric!r} is not measured{config.suggest(search.metric, names)}")

    # what decides the values, besides the candidate
    defaults = cfg.sampling()
    images = cell_of(evaluator.specs[0], {}, folder).record()
    constant = evaluator.constant[extractor]
    record = {"weights": weights, "images": images, "extractor": evaluator.records[extractor]}
    record |= {"reference": constant.reference.digest() if constant.reference else None, "settings": cfg.record()}
    identity = digest([search.metric, record, system_settings])
    measurements = Measurements(folder / "candidates.jsonl", identity, world)

    def measured(num_steps: int, candidate: Candidate) -> float:
        def measure() -> float:
            groups = evaluator.plan(candidate.settings(defaults, num_steps), weights["kind"])
            evaluation = evaluator.evaluate(net, groups, {name: weights[name] for name in ("step", "fingerprint")})
            number = None
            if evaluation is not None:
                number = {value[1:3]: value.value for value in evaluation.values}[extractor, metric]
            return collectives.broadcast(number, world)

        value = measurements.value(num_steps, candidate, measure)
        if world.is_main:
            steps = log.count(num_steps, "step", "steps")
            log.print_line(f"{steps}: {search.metric} {value:.5g} with {described(candidate)}")
        return value

    sampler = sampler_name(defaults.sampler)
    sampler = sampler if sampler in SAMPLERS else "renoise"
    start = Candidate(defaults.cfg_scale, defaults.s_ratio, getattr(defaults.sampler, "eta", 0.0), None, sampler)
    chosen, counts = {}, {}
    for num_steps in search.num_steps:
        best, value, counts[num_steps] = coordinate_search(
            num_steps,
            start,
            search.grid,
            search.most_candidates,
            partial(measured, num_steps),
            partial(results.is_better, metric),
            partial(suits, system),
        )
        chosen[num_steps] = Preset(best.cfg_scale, best.s_ratio, best.guidance_interval, best.built(), value)
    if world.is_main:
        write(out, search, chosen, counts, record)
        for num_steps, preset in chosen.items():
            start_value = measurements.value(num_steps, start.normal(num_steps), lambda: 0.0)
            steps = log.count(num_steps, "step", "steps")
            log.print_line(f"{steps}: {search.metric} {preset.value:.5g}, from {start_value:.5g} at the start")
        log.print_line(f"{out}: use it with inferencer.defaults.preset={out}")


def suits(system: System, candidate: Candidate) -> bool:
    """Whether the model of an objective can be sampled with these settings."""
    try:
        system.check_sampling(candidate.built(), candidate.s_ratio)
    except UserError:
        return False
    return True


def digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def described(candidate: Candidate) -> str:
    return ", ".join(f"{name} {value}" for name, value in vars(candidate).items() if value is not None)


def write(out: Path, search: Search, chosen: dict[int, Preset], counts: dict[int, int], record: dict) -> None:
    """Write the preset file: what was measured, and the settings by number of steps."""
    content = {
        "metric": search.metric,
        "candidates": counts,
        "images": search.num_images,
        "record": record,
        "presets": {
            num_steps: presets.described(
                preset, {"module": compare.class_path(preset.sampler), "params": preset.sampler.output_settings()}
            )
            for num_steps, preset in chosen.items()
        },
    }
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    image_encode.write(out, f"# Written by selfe tune-sampler; see docs/sampling.md.\n{text}".encode())


def evaluation_of(evaluation: EvaluationConfig, inferencer: infer.Inferencer, search: Search) -> SearchEvaluation:
    """The images of candidates, from the sections of a config. Raises UserError."""
    given = {field.name: getattr(evaluation, field.name) for field in fields(MetricSettings)}
    defaults = inferencer.defaults
    extractor, _, value = search.metric.partition("/")
    if extractor not in evaluation.extractors:
        valid = ", ".join(f"{name}/fd" for name in evaluation.extractors)
        raise UserError(f"--metric: {search.metric!r} is not EXTRACTOR/METRIC, such as {valid}")
    given |= {"extractors": {extractor: evaluation.extractors[extractor]}, "metrics": (metric_of(value),)}
    given |= {"num_images": search.num_images, "num_samples": defaults.num_samples, "bootstrap": 0}
    single = {name: sweep(getattr(defaults, name))[0] for name in ("cfg_scale", "s_ratio")}
    try:
        return SearchEvaluation(
            **given,
            **single,
            prompt_file=defaults.prompt_file,
            seed=defaults.seed,
            size=(defaults.height, defaults.width),
            num_steps=search.num_steps,
            sampler=defaults.sampler,
            batch_size=inferencer.batch_size,
        )
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"evaluation: {error}") from error


def main(arguments: list[str]) -> None:
    """CONFIG SEARCH [key=value ...]; SEARCH: a `Search` as JSON."""
    path, text, *overrides = arguments
    search = Search.parse(text)
    settings = config.load(path, overrides)
    with torch.device("meta"):
        system = config.build(settings, "system")
    inferencer, evaluation = config.build(settings, "inferencer"), config.build(settings, "evaluation")
    if inferencer.weights == "both":
        raise UserError("inferencer.weights: both; a search is about one kind of weights, set ema or live")
    cfg = evaluation_of(evaluation, inferencer, search)

    # long timeout: as in `infer`
    with collectives.process_group(timeout_minutes=24 * 60) as world:
        chosen = collectives.broadcast(choose_precision(inferencer.precision, world.device), world)
        inferencer = replace(inferencer, precision=chosen)
        checkpoint = find_weights(Path(inferencer.ckpt_dir)) if world.is_main else None
        checkpoint = collectives.broadcast(checkpoint, world)
        if world.is_main:
            inferencer.check_run(checkpoint, settings)
        nets, facts = inferencer.load(checkpoint, system.backbone, world.device)
        system.text_encoder = RememberedText(system.text_encoder)
        system.load_encoders(world.device)

        kind = inferencer.weights
        weights = {"kind": kind, "step": facts["step"], "fingerprint": facts[f"{kind}_fingerprint"]}
        weights |= {"precision": chosen}
        system_settings = compare.describe_system(settings["system"])
        folder = Path(search.out).with_name(f"{Path(search.out).stem}_search")
        lock = FolderLock(folder, "--out", partial(launch.end, 1))
        with errors.writing_to(folder), collectives.on_main(lock, world):
            run(system, nets[kind], weights, system_settings, cfg, search, world)


if __name__ == "__main__":
    launch.worker(lambda: main(sys.argv[1:]))
