#!/usr/bin/env bash
# Measurements and checks on a machine with one NVIDIA GPU, in stages of at most 3 minutes each.
#
#   benchmarks/gpu.sh fetch                 here: pack what the machine lacks into build/site.tar.xz (to be carried there)
#   benchmarks/gpu.sh [--tiny] [STAGE...]   there: needs Python 3.12, torch, triton and transformers 5; reaches no network
#
# Without STAGE all stages run in the order of this list:
#
#   parity          the published computation on the GPU, and three small jobs
#   command         the whole command with the time of each of its stages, first run and second run
#   rows            a tuning step, guided, injected and inversion steps, decoding: of ours and of the reference
#   memory          24 frames within 8 GB, and steps with gradient checkpointing
#   kernels         every kernel against torch's operations
#   profiles        the kernels that take most of a step
#   tests           pytest -m gpu
#   changes-edit, changes-tune, changes-inject      what each kernel brings to a step
#
# Results: benchmarks/results/<device>.json and .md, and benchmarks/results/gpu/<device>-<stage>.json; each is written
# after every measurement. A stage that fails or takes longer than its limit does not stop the others; the exit code is 1
# then. DEVICE=cpu with --tiny tries everything but the GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
STAGES=(parity command rows memory kernels profiles tests changes-edit changes-tune changes-inject)
LIMIT=175 # seconds
DEVICE_IS_SLOW=$([ "$DEVICE" = cpu ] && echo 1 || echo 0)

if [ "${1:-}" = fetch ]; then
    set -e
    rm -rf build/wheels build/site build/site.tar.xz
    # Of some packages there are wheels for older systems only, and pip takes a platform by its very name.
    # What torch, transformers and the machine's other packages need is there; the rest comes without it.
    "$PYTHON" -m pip download --quiet --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        --no-deps --dest build/wheels -c constraints.txt \
        diffusers accelerate peft av pydantic pydantic-core annotated-types typing-inspection typing-extensions
    for wheel in build/wheels/*.whl; do "$PYTHON" -m zipfile -e "$wheel" build/site; done
    XZ_OPT="-2 -T0" tar -C build/site -cJf build/site.tar.xz .
    rm -r build/wheels build/site
    ls -l build/site.tar.xz
    exit
fi

TINY=()
if [ "${1:-}" = --tiny ]; then
    TINY=(--tiny)
    shift
fi
if [ $# -gt 0 ]; then STAGES=("$@"); fi
export PYTHONPATH="$PWD/src:$PWD" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if ! "$PYTHON" -c 'import diffusers, av, pydantic' 2> /dev/null; then
    export PYTHONPATH="$PWD/build/site:$PYTHONPATH"
    [ -d build/site ] || { mkdir -p build/site && "$PYTHON" -m tarfile -e build/site.tar.xz build/site; } || exit
fi
python() { timeout $((DEVICE_IS_SLOW ? 8 * LIMIT : LIMIT)) "$PYTHON" -W ignore -m "$@"; }

small_jobs() {
    local out run how failed=0
    out=$(mktemp -d)
    for how in "bf16" "fp16 --validation-steps 5 --offload" "no --memory 8 --window 6"; do
        run="$out/${how%% *}"
        [ "$DEVICE" = cpu ] && how=${how/fp16/bf16}
        # shellcheck disable=SC2086  # words, not one
        LIMIT=35 python tuneavideo tune src/tuneavideo/miniature/clips/dog-jumping.mp4 --base miniature \
            --prompt "a dog is jumping on the grass" --edit "a panda is jumping on the grass" --max-train-steps 10 \
            --mixed-precision $how --out "$run" --json || failed=1
    done
    rm -rf "$out"
    return $failed
}

rows() { python benchmarks --set gpu --one-process --device "$DEVICE" ${TINY[@]+"${TINY[@]}"} "$@"; }
measure() { python benchmarks.gpu "$1" --device "$DEVICE" ${TINY[@]+"${TINY[@]}"}; }

stage() {
    local big=sd15-12x512 more=sd15-24x512 failed=0
    case $1 in
    parity)
        LIMIT=60 python benchmarks.parity --goldens tests/goldens --device "$DEVICE" || failed=1
        small_jobs || failed=1
        ;;
    rows)
        rows {tune,reference-tune,edit,reference-edit,inject,decode,reference-decode,invert}-$big-bf16 || failed=1
        ;;
    memory)
        LIMIT=90 measure memory || failed=1
        LIMIT=85 rows tune-$more-checkpointing-bf16 tune-$big-checkpointing-bf16 || failed=1
        ;;
    tests) python pytest -q -m gpu tests/test_gpu.py || failed=1 ;;
    command | kernels | profiles | changes-*) measure "$1" || failed=1 ;;
    *)
        echo "no stage is named $1" >&2
        failed=1
        ;;
    esac
    return $failed
}

failed=0
for each in "${STAGES[@]}"; do
    began=$SECONDS
    echo "== $each"
    stage "$each" || failed=1
    echo "== $each: $((SECONDS - began)) s"
done
exit $failed
