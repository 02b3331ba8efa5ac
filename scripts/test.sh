#!/usr/bin/env bash
# The tests: ./scripts/test.sh [pytest options]. Installs what is missing into this folder first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
exec .venv/bin/python -m pytest "$@"
