#!/usr/bin/env bash
# Download the frozen encoders: scripts/cache_pretrained_only.sh --cache-dir DIR [--hf-token TOKEN] [--flux-vae-only].
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$here/scripts/setup.sh"
export HF_HUB_DISABLE_TELEMETRY=1
exec "$here/.venv/bin/python" -m selfe cache-pretrained "$@"
