"""Text files of users: the characters and encodings that are not text, and what is left of the quotes of CSV."""

from __future__ import annotations

from pathlib import Path

from selfe.errors import UserError
from selfe.io import sampling_limits

BOM = b"\xef\xbb\xbf"
CONTROL = sampling_limits.CONTROL  # one pattern for captions and prompts
# first bytes of files that are often mistaken for UTF-8 text, and how to convert them
UTF_16 = "the file is UTF-16; save it as UTF-8, for instance with iconv -f UTF-16 -t UTF-8"
MAGIC = {
    b"\xff\xfe\x00\x00": "the file is UTF-32; save it as UTF-8",
    b"\xff\xfe": UTF_16,
    b"\xfe\xff": UTF_16,
    b"\x1f\x8b": "the file is compressed with gzip; run gunzip on it",
    b"PK\x03\x04": "the file is a zip archive or a spreadsheet; export it as a UTF-8 text file",
    b"PAR1": "the file is a Parquet table; export it as a UTF-8 text file",
}


def check_encoding(path: Path) -> None:
    """Raise UserError with the cause if the first bytes of a file show that it is not UTF-8 text."""
    with path.open("rb") as file:
        head = file.read(256)

    for magic, cause in MAGIC.items():
        if head.startswith(magic):
            raise UserError(f"{path}: {cause}")

    # without a byte order mark, every second byte of Latin letters is zero
    if len(head) >= 8 and (not any(head[::2]) or not any(head[1::2])):
        raise UserError(f"{path}: {UTF_16}")


def in_csv_quotes(field: str) -> bool:
    """Whether a field is enclosed in quotes, with those inside doubled, as CSV writers do."""
    return len(field) > 1 and field[0] == field[-1] == '"' and '"' not in field[1:-1].replace('""', "")
