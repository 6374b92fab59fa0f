"""Compiles every Triton kernel for GPUs that this machine lacks, and lists its resources.

The wrappers run on meta tensors of real models' shapes, with the launch replaced by a recorder, so
that the compiled kernels are those that the wrappers would launch. This needs no GPU.
``kernels/registers.json`` holds the results of several versions of Triton. This command replaces
the results of the installed version::

    python bench/aot.py --write kernels/registers.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import triton
from cuda.compilations import TARGETS, Compilation, recorded
from cuda.kernel_launches import LAUNCHES
from cuda.work_units import work
from triton import knobs
from triton.backends.compiler import GPUTarget


def resources(compiled: Any, target: GPUTarget) -> dict[str, int]:
    """Registers and shared memory per program, and spills to memory (registers or bytes)."""
    used = {"shared_bytes": int(compiled.metadata.shared)}
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        counts = {
            key: int(found.group(1))
            for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
            if (found := re.search(rf"\.{key}:\s+(\d+)", text)) is not None
        }
        used["registers"] = counts["vgpr_count"]
        used["spills"] = counts["vgpr_spill_count"]
        # Scalar registers are spilled to lanes of vector registers, not to memory.
        used["scalar_spills"] = counts["sgpr_spill_count"]
        return used
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used["registers"] = sum(int(n) for n in re.findall(r"REG:(\d+)", text))
    # No kernel has local arrays, so everything on the stack was spilled.
    used["spills"] = sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", text))
    return used


def table(only: str, report: Callable[[str], None]) -> dict[str, Any]:
    """Compile every kernel with ``only`` in its name, for all targets."""
    wanted = [c for c in recorded(LAUNCHES) if only in c.name()]
    rows = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for compilation, row in zip(wanted, pool.map(_row, wanted), strict=True):
            rows[compilation.name()] = row
            report(f"{compilation.name()}: {row}")
    return {"triton": triton.__version__, "kernels": rows}


def _row(compilation: Compilation) -> dict[str, dict[str, Any]]:
    row = {}
    for name, target in TARGETS.items():
        compiled = compilation.compile(target)
        row[name] = resources(compiled, target)
        if target.backend == "cuda":
            row[name].update(work(compilation, compiled))
    return row


def write(path: Path, result: dict[str, Any], only: str) -> None:
    """Put a version's results into the file, one line per kernel and target.

    Results of kernels without ``only`` in their names stay unchanged.
    """
    versions = json.loads(path.read_text()) if path.exists() else {}
    known = versions.get(result["triton"], {})
    rest = {name: targets for name, targets in known.items() if only not in name}
    versions[result["triton"]] = dict(sorted({**rest, **result["kernels"]}.items()))
    lines = []
    for version, kernels in sorted(versions.items()):
        rows = []
        for name, targets in kernels.items():
            inner = [f"   {json.dumps(k)}: {json.dumps(used)}" for k, used in targets.items()]
            rows.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(inner) + "\n  }")
        lines.append(f" {json.dumps(version)}: {{\n" + ",\n".join(rows) + "\n }")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every Triton kernel ahead of time.")
    parser.add_argument("--only", default="", help="compile only names that contain this")
    parser.add_argument("--write", type=Path, help="a file to put the results into")
    args = parser.parse_args()
    result = table(args.only, lambda line: print(line, file=sys.stderr))
    if args.write:
        write(args.write, result, args.only)
    else:
        json.dump(result, sys.stdout, indent=1)
        print()


if __name__ == "__main__":
    main()
