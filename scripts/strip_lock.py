"""A uv.lock from stdin to stdout with names and versions only: no address or hash of any file, no registry.

uv finds such a lock stale, resolves again and keeps its versions. As a git clean filter (see `setup.sh`) it works on
every `git add`.
"""

import re
import sys

ARTIFACTS = re.compile(r"^(sdist = .*|wheels = \[\n(?:    .*\n)*\])\n", re.MULTILINE)
METADATA = re.compile(r"^\[package\.metadata.*?(?=^\[\[|\Z)", re.MULTILINE | re.DOTALL)


def strip(lock: str) -> str:
    lock = METADATA.sub("", ARTIFACTS.sub("", lock))
    lock = re.sub(r'registry = "[^"]*"', 'registry = "default"', lock)
    return re.sub(r"\n{3,}", "\n\n", lock).rstrip("\n") + "\n"


if __name__ == "__main__":
    sys.stdout.write(strip(sys.stdin.read()))
