"""The folder of a pretrained model: a path, or a name below the cache folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selfe import packaged
from selfe.errors import UserError


def is_path(model: str) -> bool:
    """Whether a model is named by its path, and not by its name on the Hub."""
    return model.startswith((".", "~")) or Path(model).is_absolute()


def find_model(model: str, cache_dir: Path | None, key: str, remedy: str) -> Path:
    """The folder of a model: a path if it is absolute or starts with `.` or `~`, otherwise a name in the cache folder.

    Args:
        key: the key path of its name.
        remedy: what to do if a model of the Hub is not in the cache folder.

    Raises:
        UserError: there is no such folder.
    """
    if is_path(model):
        folder = Path(model).expanduser()
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; {key} names it")
        return folder

    if cache_dir is None:
        raise UserError(
            f"{model} is needed, but SELFE_CACHE_DIR is not set; set it to the directory of the weights"
            f"{packaged.remedy(model)}, or set SELFE_SKIP_PRETRAINED=1 for random weights"
        )
    folder = Path(cache_dir) / model
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; {remedy}, or set SELFE_SKIP_PRETRAINED=1 for random weights")
    return folder


def model_name(model: str) -> str:
    """What identifies a model in settings that are compared: its name, without the path to it."""
    return Path(model).name if is_path(model) else model


@contextmanager
def quiet(logger_name: str) -> Iterator[None]:
    """Without the warnings of a library, which lists tensors; what matters of them is an error of ours."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
