"""Reduce a uv.lock, from stdin to stdout, to names and versions: no file addresses, no hashes, no registry.

Run by hand after `uv lock`, before the lock is committed:

    python3 scripts/strip_lock.py < uv.lock > stripped && mv stripped uv.lock

`scripts/setup.py` installs from such a lock with `uv export --frozen`.
"""

import re
import sys

ARTIFACTS = re.compile(r"^(sdist = .*|wheels = \[\n(?:    .*\n)*\])\n", re.MULTILINE)
METADATA = re.compile(r"^\[package\.metadata.*?(?=^\[\[|\Z)", re.MULTILINE | re.DOTALL)


def strip(lock: str) -> str:
    """The text of a lock file without anything that depends on a registry."""
    lock = METADATA.sub("", ARTIFACTS.sub("", lock))
    lock = re.sub(r'registry = "[^"]*"', 'registry = "default"', lock)
    return re.sub(r"\n{3,}", "\n\n", lock).rstrip("\n") + "\n"


if __name__ == "__main__":
    sys.stdout.write(strip(sys.stdin.read()))
