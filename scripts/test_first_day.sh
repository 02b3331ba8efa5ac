#!/usr/bin/env bash
# The first day of a newcomer, unattended, in a fresh clone: ./scripts/test_first_day.sh [FOLDER]. Prints seconds by step.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=${1:-$(mktemp -d)}
mkdir -p "$folder"
export SELFE_SKIP_PRETRAINED=1

step() { # step NAME COMMAND...
  local name=$1 start=$SECONDS
  shift
  "$@" >"$folder/$name.log" 2>&1 || {
    echo "failed: $name; see $folder/$name.log"
    exit 1
  }
  echo "$((SECONDS - start)) s  $name"
}

# forty images of one's own with captions beside them: the bundled ones, and some of them mirrored
photographs() {
  mkdir -p photographs
  .venv/bin/python - <<'END'
from itertools import cycle, islice
from pathlib import Path

from PIL import Image, ImageOps

source = Path("debug_data/t2i_smoke")
lines = (source / "manifest.tsv").read_text().splitlines()
for number, line in enumerate(islice(cycle(lines), 40)):
    path, caption = line.split("\t")
    image = Image.open(source / path).convert("RGB")
    mirrored = number >= len(lines)
    (ImageOps.mirror(image) if mirrored else image).save(f"photographs/{number}.png")
    Path(f"photographs/{number}.txt").write_text(caption + ", mirrored" * mirrored)
END
}

# start the demo, wait for its page, stop it
demo() {
  .venv/bin/selfe demo runs/photographs/checkpoints --port 8765 &
  local process=$!
  trap 'kill "$process"; trap - RETURN' RETURN
  for _ in $(seq 120); do
    if curl --silent --fail http://127.0.0.1:8765/ >demo.html; then
      grep -q gradio demo.html
      return
    fi
    kill -0 "$process" || return 1
    sleep 1
  done
  return 1
}

started=$SECONDS
step clone git clone --quiet "$repository" "$folder/selfe"
cd "$folder/selfe"
step set-up ./scripts/setup.sh --extra demo
step smoke-train ./run.sh configs/debug/selfe_smoke.yaml 1
step smoke-infer ./infer.sh configs/debug/selfe_smoke.yaml 1
step quick-start-train ./run.sh configs/mini/quick_start.yaml 1
step quick-start-infer ./infer.sh configs/mini/quick_start.yaml 1
step photographs photographs
step make-manifest .venv/bin/selfe make-manifest photographs --out photographs.tsv
step check-data .venv/bin/selfe check-data photographs.tsv --base-dir photographs
step train ./run.sh configs/debug/selfe_smoke.yaml 1 trainer.output_dir=runs/photographs trainer.max_steps=20 \
  data.params.train_manifest=photographs.tsv data.params.base_dir=photographs data.params.val_manifest=null
step report .venv/bin/selfe report runs/selfe_smoke runs/photographs --out report.html
step infer ./infer.sh configs/debug/selfe_smoke.yaml 1 inferencer.ckpt_dir=runs/photographs/checkpoints \
  inferencer.output_dir=runs/photographs/images
step gallery .venv/bin/selfe gallery runs/selfe_smoke/images runs/photographs/images --output compare.html
step demo demo
for file in report.html compare.html runs/quick_start/images/gallery.html runs/quick_start/samples/step_00001000.png; do
  test -s "$file"
done
echo "$((SECONDS - started)) s in all, in $folder"
