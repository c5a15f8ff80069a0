#!/usr/bin/env bash
# Parity checks, three small jobs and the ten rows that matter, on a machine with one NVIDIA GPU; at most 8 minutes.
#
#   benchmarks/gpu.sh fetch          here: pack what the machine lacks into build/site.tar.xz (to be carried there)
#   benchmarks/gpu.sh [--tiny]       there: needs Python 3.12, torch and transformers 5; reaches no network
#
# Writes benchmarks/results/<device>.json and .md after every row, and goes on after a failure, which its exit code
# tells. DEVICE=cpu with --tiny tries everything but the card.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}

if [ "${1:-}" = fetch ]; then
    set -e
    rm -rf build/wheels build/site build/site.tar.xz
    # Of some packages there are wheels for older systems only, and pip takes a platform by its very name.
    # What torch and transformers bring along is there; the rest comes without it.
    "$PYTHON" -m pip download --quiet --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        --no-deps --dest build/wheels -c constraints.txt \
        diffusers accelerate peft av einops pydantic pydantic-core annotated-types typing-inspection typing-extensions \
        psutil
    for wheel in build/wheels/*.whl; do "$PYTHON" -m zipfile -e "$wheel" build/site; done
    tar -C build/site -cJf build/site.tar.xz .
    ls -l build/site.tar.xz
    exit
fi

TINY=${1:-}
failed=0
if [ -f build/site.tar.xz ]; then
    rm -rf build/site && mkdir -p build/site && "$PYTHON" -m tarfile -e build/site.tar.xz build/site || exit
fi
export PYTHONPATH="$PWD/build/site:$PWD/src:$PWD" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
"$PYTHON" -c 'import torch, transformers, diffusers; print(torch.__version__, transformers.__version__, diffusers.__version__)' || exit
timeout 60 "$PYTHON" -W ignore -m benchmarks.parity --goldens tests/goldens --device "$DEVICE" || failed=1
out=$(mktemp -d)
for how in "bf16" "fp16 --validation-steps 5 --offload" "no --memory 8 --window 6"; do
    run="$out/${how%% *}"
    [ "$DEVICE" = cpu ] && how=${how/fp16/bf16}
    # shellcheck disable=SC2086  # words, not one
    timeout 30 "$PYTHON" -W ignore -m tuneavideo tune src/tuneavideo/miniature/clips/dog-jumping.mp4 --base miniature \
        --prompt "a dog is jumping on the grass" --edit "a panda is jumping on the grass" --max-train-steps 10 \
        --mixed-precision $how --out "$run" --json || failed=1
done
timeout 310 "$PYTHON" -W ignore -m benchmarks --set gpu --device "$DEVICE" $TINY || failed=1
exit $failed
