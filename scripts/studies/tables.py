"""Tables and plots of the studies' pages."""

from __future__ import annotations

from types import ModuleType

from selfe.errors import UserError


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines])


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def pyplot() -> ModuleType:
    """`matplotlib.pyplot`, drawing to files. Imported here, so that `--help` works without it.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("matplotlib is not installed; run scripts/setup.sh --dev") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt
