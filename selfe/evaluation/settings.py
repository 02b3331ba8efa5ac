"""The section `evaluation` of a config, and what it has in common with `trainer.evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from selfe.evaluation.metrics import METRICS
from selfe.evaluation.tables import SUFFIXES
from selfe.io.sampling_limits import check_size
from selfe.protocols import Extractor
from selfe.types import MOST_SAMPLES, Split, check_range


@dataclass(frozen=True)
class MetricSettings:
    """Extractors, reference and metrics."""

    section: ClassVar[str] = "evaluation"  # the key path of these settings, for error messages

    extractors: dict[str, Extractor] = field(default_factory=dict)  # what computes features, by a name of your choice
    # real images: a folder, a manifest (.tsv, .csv, .jsonl), a pattern of tar shards, or a config with its data (.yaml)
    reference: Path | None = None
    base_dir: Path = Path()  # folder that relative image paths of the reference manifest start from
    # height and width to which reference images are resized and cropped; default: those of the generated images
    reference_size: tuple[int, int] | None = None
    # number of reference images, evenly spaced over it (of a config: the first); default: all
    reference_images: int | None = None
    reference_split: Split = "val"  # of a config's data
    metrics: tuple[str, ...] = ()  # see docs/evaluation.md; default: those that extractors and reference allow
    bootstrap: int = 100  # replicates of a 95 % interval; 0: no intervals
    # what a replicate draws: prompts with all their images, or images, if the prompts are all there are
    resample: Literal["prompts", "images"] = "prompts"
    max_features: int = 10_000  # images of a set of which all pairs are compared (all metrics but fd): bounds memory
    nearest_k: int = 5  # neighbours of precision, recall, density and coverage
    retrieval_k: tuple[int, ...] = (1, 5)  # ranks of retrieval@k

    def __post_init__(self):
        if not self.extractors:
            raise ValueError(
                "extractors: none is given; name one, for selfe evaluate with --extractor facebook/dinov2-base"
            )
        for name in self.metrics:
            if name not in METRICS:
                raise ValueError(f"metrics: no metric {name!r}; valid: {', '.join(METRICS)}")
        if self.reference_size is not None:
            check_size(*self.reference_size)

        check_range("reference_images", self.reference_images, 2, MOST_SAMPLES)
        check_range("bootstrap", self.bootstrap, 0, 100_000)
        check_range("max_features", self.max_features, 2, 1_000_000)
        check_range("nearest_k", self.nearest_k, 1, 1000)
        check_range("retrieval_k", self.retrieval_k, 1, 1_000_000)

    def record(self) -> dict[str, int]:
        """Settings on which numbers depend, besides extractors and images."""
        return {"max_features": self.max_features, "nearest_k": self.nearest_k}


@dataclass(frozen=True)
class EvaluationConfig(MetricSettings):
    """How the images of a sampling job are evaluated."""

    batch_size: int = 64  # images per call of an extractor
    feature_dir: Path | None = None  # folder that keeps features, may be shared by jobs; default: features/ of the job
    table: tuple[Path, ...] = ()  # files to which the table is written, Markdown (.md) or LaTeX (.tex)

    def __post_init__(self):
        super().__post_init__()
        for path in self.table:
            if path.suffix not in SUFFIXES:
                raise ValueError(f"table: {path}: the file must be .md (Markdown) or .tex (LaTeX)")
        check_range("batch_size", self.batch_size, 1, MOST_SAMPLES)
