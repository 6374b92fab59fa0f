#!/usr/bin/env bash
# Everything there is to measure on a GPU, in one command under nine minutes: the tests of the Triton
# kernels, of library products, of real CUDA graphs and of copies beside a busy stream; one step under
# compute-sanitizer; then correctness and timings of every kernel and of whole decode steps. Every
# part runs, whatever became of the others; rows are written as they come. The exit status is not 0
# if any part failed.
# Needs Python 3.11 or newer with torch 2.11+, triton 3.6+ and numpy (PYTHON=... chooses it) and a C
# compiler, which triton calls; pytest (and xdist) and compute-sanitizer are used if they are there.
# Arguments go to bench/gpu.py; with --only or --tune nothing else is run.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH=src:tests/support${PYTHONPATH:+:$PYTHONPATH}

has_gpu=false
if "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    has_gpu=true
    unset TRITON_INTERPRET
else
    export TRITON_INTERPRET=1
fi
case " $* " in *" --only"* | *" --tune "* | *" --dry-run "*) exec "$PYTHON" bench/gpu.py "$@" ;; esac
status=0
# Kernels are compiled by many processes at once where that can be.
workers=()
"$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-p xdist -n 8)
if $has_gpu && "$PYTHON" -c 'import pytest' 2>/dev/null; then
    # The Triton kernels alone: what torch's own products do with batches is the CPU's affair. Without
    # the project's configuration and fixtures, which need the server's packages.
    timeout 120 "$PYTHON" -m pytest -q "${workers[@]}" -c /dev/null --rootdir . --noconftest \
        -p no:cacheprovider \
        --import-mode=importlib -W "ignore::pytest.PytestUnknownMarkWarning" \
        -k "not reference and not torch_path" \
        tests/engine/gpu/test_decode_graphs.py tests/adapters/device/test_uploads.py \
        tests/models/weights/test_library_products.py tests/kernels/test_nf4_matmul.py \
        tests/kernels/test_one_launch.py tests/kernels/test_paged_attention_triton.py \
        tests/kernels/test_between.py tests/kernels/test_sample_rows.py \
        tests/kernels/adapters/test_segmented.py tests/kernels/adapters/test_by_slot.py \
        tests/kernels/adapters/test_fusion_gate.py tests/kernels/test_experts_triton.py
    tested=$?
    if [ "$tested" = 124 ]; then
        echo "the kernel tests took over 120 s and were stopped"
    elif [ "$tested" != 0 ]; then
        status=1
    fi
elif $has_gpu; then
    echo "pytest is not installed: the kernel tests are skipped; gpu.py checks every result"
fi
if $has_gpu && command -v compute-sanitizer >/dev/null; then
    # The last lines hold its verdict.
    timeout 60 compute-sanitizer --tool memcheck --error-exitcode 9 \
        "$PYTHON" bench/gpu.py --only "one step" 2>&1 | tail -n 5
    checked=${PIPESTATUS[0]}
    if [ "$checked" = 124 ]; then
        echo "compute-sanitizer took over 60 s and was stopped"
    elif [ "$checked" != 0 ]; then
        status=1
    fi
fi
# What the time is up for has its rows in the file.
timeout --kill-after=5 $((530 - SECONDS)) \
    "$PYTHON" bench/gpu.py --budget-seconds $((420 - SECONDS)) "$@" || status=$?
if [ "$status" = 124 ]; then
    echo "nine minutes are up: the rows so far are in the file"
fi
exit "$status"
