#!/usr/bin/env bash
# Run tests with another version of torch, in an environment of its own: ./scripts/test_torch.sh 2.11 [pytest options].
# Without options: the tests that start few processes. All other packages are those of uv.lock.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=${1:?usage: scripts/test_torch.sh VERSION [pytest options]}
shift
scripts/setup.sh --dev
PATH="$PWD/.uv/bin:$PATH"
venv=".venv-torch-$version"

if [ ! -e "$venv/.complete" ]; then
  uv venv --quiet --allow-existing "$venv"
  uv pip install --quiet --python "$venv/bin/python" "torch==$version.*"
  uv export --frozen --quiet --no-hashes --no-emit-project --all-extras --prune torch |
    uv pip install --quiet --python "$venv/bin/python" --no-deps -r -
  uv pip install --quiet --python "$venv/bin/python" --no-deps --editable .
  touch "$venv/.complete"
fi

[ "$#" -gt 0 ] || set -- tests/method tests/data tests/checkpoint
exec "$venv/bin/python" -m pytest "$@"
