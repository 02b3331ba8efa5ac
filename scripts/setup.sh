#!/usr/bin/env bash
# Install into .venv what uv.lock lists: scripts/setup.sh [--dev] [--extra NAME] [--group NAME]. Needs Python >= 3.10
# and pip; installs uv if it is missing.
set -euo pipefail
exec python3 "$(dirname "${BASH_SOURCE[0]}")/setup.py" "$@"
