#!/usr/bin/env bash
# Download, convert and, if asked, quantize a model of the hub:
#   bash scripts/prepare.sh <hub name> [download_dir] [int8|int4|fp8]
set -euo pipefail

repo_id=${1:?usage: bash scripts/prepare.sh <hub name> [download_dir] [int8|int4|fp8]}
download_dir=${2:-checkpoints}
mode=${3:-}
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}

"$python" "$root/scripts/download.py" --repo_id "$repo_id" --download_dir "$download_dir"
"$python" "$root/scripts/convert_hf_checkpoint.py" --checkpoint_dir "$download_dir/$repo_id"
if [ -n "$mode" ]; then
    "$python" "$root/quantize.py" --checkpoint_path "$download_dir/$repo_id/model.pth" --mode "$mode"
fi
