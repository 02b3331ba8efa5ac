#!/usr/bin/env bash
# Train: ./run.sh CONFIG [NGPUS] [key=value ...]. Installs missing packages into .venv first. Options: --help.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$here/scripts/setup.sh"
exec "$here/.venv/bin/python" -m selfe train "$@"
