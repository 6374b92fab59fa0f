#!/usr/bin/env bash
# The verdict about a GPU: five calls of at most ten minutes each, then a table of what was promised and measured.
#
#   bench/gpu.sh            all calls, one after the other
#   bench/gpu.sh 2 5        some calls
#   bench/gpu.sh --dry      all calls on a machine without a GPU, with toy shapes, the interpreter and fakes
#   bench/gpu.sh --only …   passed to bench/gpu.py, like --tune
#
# Call 1 compiles all kernels on all cores, and tests them. Call 2 measures what is promised. Call 3
# measures the rest. Call 4 looks for memory errors and races. Call 5 tests the whole server, with
# loads alongside captured steps. A command that fails does not stop the others. The exit status is
# 1 if a command failed, or if a figure is over one and a half times its promise.
#
# Calls 1 to 4 need Python 3.11 or newer (PYTHON=… chooses it) with torch, triton and numpy, and a C compiler; call 1
# also pytest, with xdist if possible. Call 5 needs all of `make setup`. Results go to $OUT (default: build/gpu), and
# compiled kernels to build/triton. Keep both between calls on a rented machine.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} OUT=${OUT:-build/gpu}
export PYTHONPATH=src:tests/support:bench${PYTHONPATH:+:$PYTHONPATH}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/triton}
dry="" calls=""
unset TRITON_INTERPRET
case " $* " in *" --dry "*) dry=--dry TRITON_INTERPRET=1 && export TRITON_INTERPRET ;; esac
for argument in "$@"; do
    case $argument in
        --dry) ;;
        [1-5]) calls+=" $argument" ;;
        *) exec "$PYTHON" bench/gpu.py "$@" ;;
    esac
done
if [ -z "$dry" ] && ! "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "no CUDA device here; --dry tries everything in the interpreter" >&2
    exit 2
fi
mkdir -p "$OUT"
{ git rev-parse HEAD; "$PYTHON" --version; "$PYTHON" -m pip list; nvidia-smi -q; } >"$OUT/machine.txt" 2>&1

# run NAME SECONDS COMMAND...: writes the output to NAME.txt, and the exit status and the time to NAME.exit.
run() {
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.txt" 2>&1
    code=$?
    echo "$code $((SECONDS - start))" >"$OUT/$name.exit"
    echo "$name: exit status $code after $((SECONDS - start)) s"
}
# has COMMAND...: whether a tool is installed.
has() { "$@" >/dev/null 2>&1; }
part() { run "$1" "$2" "$PYTHON" bench/gpu.py $dry --results "$OUT" --only "${@:3}"; }
call_1() {
    # These runs only serve to compile the kernels. They share the GPU, so their results are void.
    if [ -z "$dry" ]; then
        for name in $("$PYTHON" bench/gpu.py --list); do
            timeout 500 "$PYTHON" bench/gpu.py --results build/void --only "$name" >"$OUT/compile-$name.txt" 2>&1 &
        done
    fi
    local workers=() tests=(
        tests/engine/gpu/test_decode_graphs.py tests/adapters/device/test_uploads.py
        tests/models/weights/test_library_products.py tests/kernels/test_nf4_matmul.py
        tests/kernels/test_one_launch.py tests/kernels/test_paged_attention_triton.py
        tests/kernels/test_between.py tests/kernels/test_sample_rows.py
        tests/kernels/adapters/test_segmented.py tests/kernels/adapters/test_by_slot.py
        tests/kernels/adapters/test_fusion_gate.py tests/kernels/test_experts_triton.py
    )
    has "$PYTHON" -c 'import xdist' && workers=(-p xdist -n 6)
    if has "$PYTHON" -c 'import pytest'; then
        # Leave out the project's configuration and fixtures, which need the server's packages.
        run kernel-tests 500 "$PYTHON" -m pytest -q -c /dev/null --rootdir . --noconftest -p no:cacheprovider \
            --import-mode=importlib -W ignore::pytest.PytestUnknownMarkWarning -k "not reference and not torch_path" \
            ${dry:+--collect-only} "${workers[@]}" --junitxml="$OUT/kernel-tests.xml" --durations=25 "${tests[@]}"
    else
        run kernel-tests 5 bash -c 'exit 77'
    fi
    wait
    [ -d build/triton ] && tar -czf "$OUT/triton.tgz" -C build triton
}
call_2() {
    part decode 350 memory step wide-step
    part prefill 90 prefill
    part bits 120 bits
}
call_3() {
    part kernels 400 nf4 attention low-rank hadamard kronecker between sampling library
    if has ncu --version; then
        run ncu 150 ncu --clock-control none --set basic --section MemoryWorkloadAnalysis --section WarpStateStats -c 40 \
            -k "regex:nf4_matmul|nf4_rotate|expand|shrink|paged" --csv "$PYTHON" bench/gpu.py --results build/void --only one-step
    fi
}
call_4() {
    # torch's allocator would hide accesses between its blocks.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    local tool
    for tool in memcheck racecheck; do
        if [ -n "$dry" ]; then
            part "$tool" 120 one-step
        elif has compute-sanitizer --version; then
            run "$tool" 280 compute-sanitizer --tool "$tool" --error-exitcode 9 \
                "$PYTHON" bench/gpu.py --results build/void --only one-step
        else
            run "$tool" 5 bash -c 'exit 77'
        fi
    done
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
}
call_5() {
    if has "$PYTHON" -c 'import bitsandbytes, grpc, peft, pytest_asyncio'; then
        run server 550 "$PYTHON" -m pytest -q -m "" --soak-seconds "$([ -n "$dry" ] && echo 3 || echo 90)" \
            tests/server/test_gpu_server.py
    else
        run server 5 bash -c 'exit 77'
    fi
}

for call in ${calls:-1 2 3 4 5}; do
    "call_$call"
done
"$PYTHON" bench/gpu.py --verdict $dry --results "$OUT"
