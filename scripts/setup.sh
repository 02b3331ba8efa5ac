#!/usr/bin/env bash
# Bring .venv up to date with uv.lock; arguments go to `uv sync`. Needs git, Python >= 3.10 and pip; fetches uv if it is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

uv=uv
if ! uv --version >/dev/null 2>&1; then
  uv=.uv/bin/uv
  if [ ! -x "$uv" ]; then
    echo "selfe: installing uv into .uv" >&2
    python3 -m pip install --quiet --disable-pip-version-check --target .uv uv
  fi
fi

# uv writes addresses and hashes of files into uv.lock; what git sees of it is names and versions
if [ -e .git ]; then
  git config --local filter.version-only.clean "python3 scripts/strip_lock.py"
fi

[ -x .venv/bin/python ] || echo "selfe: installing into .venv (once; several GB with the GPU libraries)" >&2
unset VIRTUAL_ENV
if ! UV_PROJECT_ENVIRONMENT=.venv "$uv" sync --quiet "$@"; then
  [ -x .venv/bin/python ] || exit 1
  echo "selfe: warning: could not bring .venv up to date (see above); going on with it as it is" >&2
fi

# the same names and versions: let git see that nothing has changed, although the file's size has
if [ -e .git ] && git diff --quiet -- uv.lock; then
  git add -- uv.lock
fi
