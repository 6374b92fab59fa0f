#!/usr/bin/env bash
# Everything there is to measure on a GPU, in one command under nine minutes: kernel tests on the
# device, then correctness and timings of every kernel and of whole decode steps.
# Needs Python 3.11 or newer with torch 2.11+ and triton 3.6+ (PYTHON=... chooses it); pytest and
# bitsandbytes are used if they are there. Further arguments go to bench/gpu.py.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH=src:tests/support${PYTHONPATH:+:$PYTHONPATH}

if "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    unset TRITON_INTERPRET
    if "$PYTHON" -c 'import pytest' 2>/dev/null; then
        # Without the project's configuration and fixtures, which need the server's packages.
        status=0
        timeout 200 "$PYTHON" -m pytest -q -c /dev/null --rootdir . --noconftest -p no:cacheprovider \
            --import-mode=importlib tests/kernels --ignore tests/kernels/test_aot.py \
            -W "ignore::pytest.PytestUnknownMarkWarning" || status=$?
        if [ "$status" = 124 ]; then
            echo "the kernel tests took over 200 s and were stopped; gpu.py checks every result"
        elif [ "$status" != 0 ]; then
            exit "$status"
        fi
    else
        echo "pytest is not installed: the kernel tests are skipped; gpu.py checks every result"
    fi
else
    export TRITON_INTERPRET=1
fi
exec "$PYTHON" bench/gpu.py "$@"
