#!/usr/bin/env bash
# The tests: ./scripts/test.sh [pytest options]. Installs missing packages into .venv first; on CI also the browser that
# some tests drive, into the system.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ "${CI:-}" = true ] && ! command -v chromedriver >/dev/null && command -v apt-get >/dev/null; then
  as_root=$([ "$(id -u)" = 0 ] || echo "sudo -n")
  install="apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y chromium chromium-driver"
  if ! $as_root timeout 300 sh -c "$install" >/dev/null 2>&1; then
    echo "selfe: warning: no browser: could not install chromium and chromium-driver; tests that drive one are skipped" >&2
  fi
fi
scripts/setup.sh --dev
exec .venv/bin/python -m pytest "$@"
