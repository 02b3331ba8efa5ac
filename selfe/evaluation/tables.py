"""Evaluations as tables: plain text, Markdown and LaTeX; a row per sampling setting."""

from __future__ import annotations

from collections.abc import Sequence

from selfe.evaluation import results
from selfe.evaluation.results import Evaluation, Value

SUFFIXES = (".md", ".tex")
SETTINGS = {
    "model": "model",
    "weights": "weights",
    "cfg_scale": "guidance",
    "guidance_interval": "guidance interval",
    "s_ratio": "s ratio",
    "sampler": "sampler",
    "num_steps": "steps",
    "nfe": "NFE",
}
ALWAYS = ("num_steps", "nfe")  # columns that are shown even if all rows are equal


def plain(evaluations: Sequence[Evaluation]) -> str:
    """Aligned columns, without intervals, for a console."""
    head, rows = cells(evaluations, intervals=False)
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    return "\n".join([*lines, *notes(evaluations)])


def written(evaluations: Sequence[Evaluation], suffix: str) -> str:
    """The table of a file with this suffix, `.md` or `.tex`."""
    return latex(evaluations) if suffix == ".tex" else markdown(evaluations)


def markdown(evaluations: Sequence[Evaluation]) -> str:
    """Values with their 95 % intervals."""
    head, rows = cells(evaluations, intervals=True)
    lines = [f"| {' | '.join(text.replace('|', '&#124;') for text in row)} |" for row in (head, *rows)]
    lines.insert(1, f"|{' --- |' * len(head)}")
    return "\n".join([*lines, "", *(f"{note}  " for note in notes(evaluations))]).rstrip() + "\n"


def latex(evaluations: Sequence[Evaluation]) -> str:
    """A `tabular` for the package booktabs."""
    head, rows = cells(evaluations, intervals=True)
    lines = [" & ".join(map(escaped, row)) + r" \\" for row in (head, *rows)]
    return (
        "\n".join(
            [
                *(f"% {note}" for note in notes(evaluations)),
                rf"\begin{{tabular}}{{{'r' * len(head)}}}",
                r"\toprule",
                lines[0],
                r"\midrule",
                *lines[1:],
                r"\bottomrule",
                r"\end{tabular}",
            ]
        )
        + "\n"
    )


def escaped(text: str) -> str:
    for character in "&%$#_{}":
        text = text.replace(character, f"\\{character}")
    return text


def cells(evaluations: Sequence[Evaluation], intervals: bool) -> tuple[list[str], list[list[str]]]:
    """Names of the columns, and the rows. Settings that are the same everywhere are left out."""
    columns = list(dict.fromkeys(column for evaluation in evaluations for column in evaluation.columns))
    several = len({extractor for extractor, _ in columns}) > 1

    # settings
    described = []
    for evaluation in evaluations:
        for cell in evaluation.cells:
            settings = cell["settings"] | {"model": evaluation.folder, "nfe": results.nfe(cell["settings"])}
            settings["sampler"] = results.sampler_label(cell["settings"])
            described.append([results.setting_text(settings.get(name, "")) for name in SETTINGS])
    kept = [
        place for place, name in enumerate(SETTINGS) if name in ALWAYS or len({row[place] for row in described}) > 1
    ]

    # values
    rows, described_rows = [], iter(described)
    for evaluation in evaluations:
        table = evaluation.table()
        for number in range(len(evaluation.cells)):
            values = [table.get((number, *column)) for column in columns]
            row = next(described_rows)
            rows.append([*(row[place] for place in kept), *(value_text(value, intervals) for value in values)])

    names = list(SETTINGS.values())
    head = [f"{metric} ({extractor})" if several else metric for extractor, metric in columns]
    return [*(names[place] for place in kept), *head], rows


def value_text(value: Value | None, intervals: bool) -> str:
    """Four digits; the interval with the same number of decimals."""
    if value is None:
        return ""
    if not intervals or value.low is None:
        return number_text(value.value)
    return f"{number_text(value.value)} [{number_text(value.low)}, {number_text(value.high)}]"


def number_text(value: float) -> str:
    return f"{value:.3e}" if value and abs(value) < 1e-3 else f"{value:.4g}"


def notes(evaluations: Sequence[Evaluation]) -> list[str]:
    """What the numbers are about, and warnings where they are not comparable."""
    lines = []
    for evaluation in evaluations:
        images = sorted({cell["count"] for cell in evaluation.cells})
        of = f"{images[0]:,}" if len(images) == 1 else f"{images[0]:,} to {images[-1]:,}"
        reference = evaluation.reference
        against = f", {reference['count']:,} reference images {reference['images']}" if reference else ""
        lines.append(f"{of} images per row{against}")
    warnings = [results.warning(*entry) for entry in results.differences(evaluations).items()]
    return [*dict.fromkeys(lines), *warnings]
