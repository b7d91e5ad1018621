#!/usr/bin/env bash
# The first hour on a GPU: what holds on this machine, with figures beside what was predicted. docs/gpu.md tells what each row proves.
#   bash tests/gpu.sh             everything, under 40 minutes on one A100 or H100; started again, it goes on where it stopped
#   bash tests/gpu.sh --quick     the shorter steps, under 10 minutes
#   bash tests/gpu.sh --dry       the same code at tiny sizes on a CPU, minutes
#   bash tests/gpu.sh --help      all options
# Needs Python 3.11 or newer with torch (2.11 or newer, with CUDA), transformers, sentencepiece, safetensors, tqdm, Pillow and numpy; no network.
# Writes under $OUT alone (default out/gpu of this repository): report.md, report.json, log.txt, and what the steps need.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
OUT="${OUT:-$ROOT/out/gpu}"
case "$OUT" in /*) ;; *) OUT="$PWD/$OUT" ;; esac
export OUT
export PYTHONPATH="$ROOT:$ROOT/tests${PYTHONPATH:+:$PYTHONPATH}"
PYTHON="$(command -v python || command -v python3)" || { echo "gpu.sh: no python here: activate the environment that has torch" >&2; exit 2; }
cd "$ROOT"
exec "$PYTHON" -B -m gpu.run "$@"
