"""Files of JSON lines that a training run appends to while they are read."""

from __future__ import annotations

import json
import os
from pathlib import Path

from selfe.errors import UserError


class JsonLines:
    """Reads what was added to a file since the last call of `read_new`.

    The last line of a running job may be incomplete; it is read once its line feed is there.
    """

    def __init__(self, path: Path):
        self.path = path
        self.inode, self.offset, self.count = 0, 0, 0  # of the file read so far: inode, bytes and lines

    def read_new(self) -> tuple[bool, list[dict]]:
        """Whether the file was replaced by another one, and its new lines.

        A resumed run replaces the file by one without the steps that it repeats; it is then read from the start.

        Raises:
            UserError: a complete line is not a JSON object.
        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            replaced = self.offset > 0
            self.inode, self.offset, self.count = 0, 0, 0
            return replaced, []

        with file:
            status = os.fstat(file.fileno())
            replaced = self.offset > 0 and (status.st_ino != self.inode or status.st_size < self.offset)
            if replaced:
                self.offset, self.count = 0, 0
            self.inode = status.st_ino
            file.seek(self.offset)

            # only a line feed ends a line: prompts and commands may contain other line separators of Unicode
            lines, offset = [], self.offset
            for text in file:
                if not text.endswith(b"\n"):
                    break
                lines.append(self.parse(text, self.count + len(lines) + 1))
                offset += len(text)

        self.offset = offset
        self.count += len(lines)
        return replaced, lines

    def parse(self, text: bytes, number: int) -> dict:
        try:
            line = json.loads(text)
        except ValueError as error:
            raise UserError(f"{self.path}: line {number} is not JSON ({error}); remove the line") from error
        if not isinstance(line, dict):
            raise UserError(f"{self.path}: line {number} is not a JSON object; remove the line")
        return line
