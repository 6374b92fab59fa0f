"""The torch formulations keep bits even if libraries use their paths for other processors.

Each case is a separate process, because a library reads its variables only once. These paths are
known to change bits: MKL on its path for Intel processors multiplies 8 rows of 192 inputs, and 15
of 576, in a different order from 16, and with AVX2, most numbers of rows have different orders.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# MKL calls these functions of its own, which a process may override.
_INTEL = (
    "int mkl_serv_intel_cpu_true(void) { return 1; }\nint mkl_serv_intel_cpu(void) { return 1; }"
)

CASES = {
    "as it is": {},
    "torch without vectors": {"ATEN_CPU_CAPABILITY": "default"},
    "torch and oneDNN with AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "oneDNN with AVX-512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "MKL as on any processor": {"MKL_CBWR": "COMPATIBLE"},
    "MKL as on Intel": {"LD_PRELOAD": "intel.so"},
    "MKL as on Intel with AVX2": {"LD_PRELOAD": "intel.so", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}

# Each run tests one path for other vendors and one with fewer instructions; `make long` tests all
# of them. The script runs the operations that the guarantee depends on, and prints the clearest
# violation by the libraries first.
EACH_TIME = ("MKL as on any processor", "torch and oneDNN with AVX2")
SCRIPT = """
import torch
import torch.nn.functional as F
from turret.kernels.rows import row_rms_norm
from turret.kernels.rows import row_exp_
from turret.kernels.rows import row_addmm_, row_linear
from turret.kernels.rows import row_silu
from turret.kernels.rows import table_product
from turret.kernels.rows import cancelling, choices
from turret.server.adapters.operators.hadamard import Hadamard

torch.set_num_threads(1)

def same(compute, x):
    alone = torch.cat([compute(x[i : i + 1]) for i in range(len(x))])
    for first, last in ((0, 2), (0, 8), (3, 12), (1, 40), (0, 40), (33, 40)):
        assert torch.equal(compute(x[first:last]), alone[first:last]), (compute, first, last)

x, w = cancelling(40, 96, 576, torch.float32)
whole = F.linear(x, w)
print("broken", sum(not torch.equal(F.linear(x[:n], w), whole[:n]) for n in range(1, 40)))
for dtype in (torch.float32, torch.bfloat16):
    for inner in (64, 192, 576):
        x, w = cancelling(40, 96, inner, dtype)
        same(lambda rows: row_linear(rows, w), x)
    v, b = torch.randn(40, 16).to(dtype), torch.randn(16, 192).to(dtype)
    def updated(rows):
        y = torch.zeros(len(rows), 192, dtype=dtype)
        row_addmm_(y, rows, b)
        return y
    same(updated, v)
    weight = torch.ones(100, dtype=dtype)
    same(lambda rows: row_rms_norm(rows, weight, 1e-6), torch.randn(40, 100).to(dtype))
    same(row_silu, torch.randn(40, 100).to(dtype))
same(lambda rows: row_exp_(rows.clone()), torch.randn(40, 7))
table = torch.randn(1, 100, 48)
same(lambda rows: table_product(rows, table), torch.randn(40, 12, 100))
hadamard = Hadamard(
    torch.randn(70, 4), torch.randn(4, 100), torch.randn(70, 4), torch.randn(4, 100)
)
def added(rows):
    y = torch.zeros(len(rows), 70)
    hadamard.add(y, rows, None, 1.0)
    return y
same(added, torch.randn(40, 100))
print(choices())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="libraries are exchanged as Linux does")
@pytest.mark.parametrize(
    "case",
    [case if case in EACH_TIME else pytest.param(case, marks=pytest.mark.long) for case in CASES],
)
def test_bits_are_kept(case: str, tmp_path: Path) -> None:
    variables = dict(CASES[case])
    if "LD_PRELOAD" in variables:
        if shutil.which("cc") is None or not torch.backends.mkl.is_available():
            pytest.skip("there is no C compiler, or no MKL")
        library = tmp_path / variables["LD_PRELOAD"]
        (tmp_path / "intel.c").write_text(_INTEL)
        command = ["cc", "-shared", "-fPIC", str(tmp_path / "intel.c"), "-o", str(library)]
        subprocess.run(command, check=True)
        variables["LD_PRELOAD"] = str(library)
    paths = [path for path in sys.path if path]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={
            **os.environ,
            **variables,
            "TURRET_NATIVE": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(paths),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    if "Intel" in case:
        assert int(result.stdout.split()[1]) > 3, "MKL was not led onto another path"
