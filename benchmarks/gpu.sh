#!/usr/bin/env bash
# Parity checks and the ten rows that matter, on a machine with one NVIDIA GPU; at most 8 minutes.
#
#   benchmarks/gpu.sh fetch          here: put the wheels that the machine lacks into build/wheels
#   benchmarks/gpu.sh [--tiny]       there: needs Python 3.12, torch and transformers 5; reaches no network
#
# Writes benchmarks/results/<device>.json and .md. DEVICE=cpu with --tiny tries everything but the card.
set -euo pipefail
cd "$(dirname "$0")/.."
WHEELS=${WHEELS:-build/wheels}
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}

if [ "${1:-}" = fetch ]; then
    # What torch and transformers bring along is there; the rest comes without them.
    "$PYTHON" -m pip download --quiet --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
        --no-deps --dest "$WHEELS" -c constraints.txt \
        diffusers accelerate peft av einops pydantic pydantic-core annotated-types typing-inspection tyro typeguard \
        docstring-parser importlib-metadata zipp psutil
    ls -1 "$WHEELS"
    exit
fi

TINY=${1:-}
if [ -d "$WHEELS" ]; then
    "$PYTHON" -m venv --system-site-packages build/gpu
    build/gpu/bin/pip install --quiet --no-deps --no-index "$WHEELS"/*.whl
    PYTHON=build/gpu/bin/python
fi
export PYTHONPATH="$PWD/src:$PWD" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
"$PYTHON" -c 'import torch, transformers, diffusers; print(torch.__version__, transformers.__version__, diffusers.__version__)'
timeout 120 "$PYTHON" -W ignore -m benchmarks.parity --goldens tests/goldens
timeout 360 "$PYTHON" -W ignore -m benchmarks --set gpu --device "$DEVICE" $TINY
