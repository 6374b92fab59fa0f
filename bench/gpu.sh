#!/usr/bin/env bash
# Everything there is to measure on a GPU, in one command under nine minutes: correctness and timings
# of every kernel and of whole decode steps, then the tests of the Triton kernels, of real CUDA
# graphs and of copies beside a busy stream. Every part runs, whatever became of the others; rows are written as they come.
# The exit status is not 0 if any part failed.
# Needs Python 3.11 or newer with torch 2.11+ and triton 3.6+ (PYTHON=... chooses it); pytest and
# bitsandbytes are used if they are there. Arguments go to bench/gpu.py; with --only or --tune no
# tests are run.
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
"$PYTHON" bench/gpu.py "$@"
status=$?
case " $* " in *" --only"* | *" --tune "* | *" --dry-run "*) exit "$status" ;; esac
$has_gpu || exit "$status"
if ! "$PYTHON" -c 'import pytest' 2>/dev/null; then
    echo "pytest is not installed: the kernel tests are skipped; gpu.py checked every result"
    exit "$status"
fi
# The Triton kernels alone: what torch's own products do with batches is the CPU's affair. Without the
# project's configuration and fixtures, which need the server's packages.
timeout 200 "$PYTHON" -m pytest -q -c /dev/null --rootdir . --noconftest -p no:cacheprovider \
    --import-mode=importlib -W "ignore::pytest.PytestUnknownMarkWarning" \
    -k "not reference and not torch_path" \
    tests/engine/test_decode_graphs.py tests/adapters/device/test_uploads.py \
    tests/kernels/test_nf4_matmul.py tests/kernels/test_segmented.py \
    tests/kernels/test_paged_attention_triton.py tests/kernels/test_between.py \
    tests/kernels/test_by_slot.py tests/kernels/test_fusion_gate.py tests/kernels/test_input_gain.py \
    tests/kernels/test_sample_rows.py
tested=$?
if [ "$tested" = 124 ]; then
    echo "the kernel tests took over 200 s and were stopped"
elif [ "$tested" != 0 ]; then
    status=1
fi
exit "$status"
