"""Valid ranges and normal forms of sampling settings, shared by prompt files, the config, the demo and exports.

`selfe export` copies this file beside the diffusers pipeline, so it imports nothing but the standard library.
"""

import operator
import re

RANGES = {
    "num_steps": (1, 1000),
    "num_samples": (1, 100_000),  # images per prompt
    "first_sample": (0, 10**9),
    "seed": (0, 2**63 - 1),
    "cfg_scale": (0, 1000),
    "s_ratio": (0, 1),
    "eta": (0, 1),
}
MAX_PROMPT = 4000  # characters; T5 reads 512 tokens, and a JPEG's EXIF block is limited to 64 KB
MAX_PIXELS = 4096 * 4096
# no caption or prompt contains these on purpose; U+FEFF is a byte order mark inside the text
CONTROL = re.compile("[\x00-\x1f\x7f\u2028\u2029\ufeff\ud800-\udfff]")


def check_range(name: str, value: float, label: str | None = None) -> None:
    """Raise ValueError unless a number is finite and within the range of setting `name`; `label` names it otherwise."""
    low, high = RANGES[name]
    if not low <= value <= high:
        raise ValueError(f"{label or name}: {value} is not between {low} and {high}")


def check_interval(label: str, interval: "tuple[float, float] | None") -> None:
    """Raise ValueError unless the ends of an interval of guidance are in order and between 0 and 1; None is valid."""
    if interval is None:
        return
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"{label}: [{low}, {high}] is no interval between 0 and 1; give its lower end first")


def whole_number(label: str, value: object) -> int:
    """An integer of any library (numpy, torch) as int. Raises ValueError for other values, True and 2.0 included."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError as error:
        raise ValueError(f"{label}: expected an integer, got {type(value).__name__} {value!r}") from error


def real_number(label: str, value: object) -> float:
    """A number of any library as float. Raises ValueError for other values."""
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{label}: expected a number, got {type(value).__name__} {value!r}") from error


def normal_prompt(prompt: object) -> str:
    """A prompt as it is encoded and as it keys the noise: a str without spaces around it.

    Raises:
        ValueError: it is empty, too long, contains control characters, or is not a string.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"prompt: expected a string, got {type(prompt).__name__} {prompt!r}")
    text = str(prompt).strip()
    if not text:
        raise ValueError("prompt: must not be empty")
    check_text("prompt", text)
    return text


def check_text(label: str, text: str) -> None:
    """Raise ValueError if a prompt is too long or contains control characters."""
    if len(text) > MAX_PROMPT:
        raise ValueError(
            f"{label}: {len(text)} characters; at most {MAX_PROMPT}, of which the encoder reads 512 tokens"
        )
    if control := CONTROL.search(text):
        hint = " (for a table, name the file .tsv)" if control[0] == "\t" else ""
        raise ValueError(f"{label}: contains the control character U+{ord(control[0]):04X}{hint}; remove it")


def check_size(height: int, width: int) -> None:
    """Raise ValueError unless height and width are positive and an image has at most `MAX_PIXELS` pixels."""
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise ValueError(f"height {height} and width {width} must be positive and at most {MAX_PIXELS} pixels")


def check_multiple(label: str, side: int, multiple: int) -> None:
    """Raise ValueError unless a side of an image is a multiple of this many pixels."""
    if side % multiple:
        raise ValueError(f"{label}: {side} is not a multiple of {multiple}")
