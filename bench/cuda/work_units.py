"""The instructions of kernels per unit of their work, counted in the machine code of a loop."""

from __future__ import annotations

import re
from operator import attrgetter
from typing import Any

from cuda.compilations import Compilation
from cuda.sass import Loop, disassemble, loops

_LANES = 32
_OF_WEIGHTS = ("nf4_matmul_kernel", "nf4_rotate_kernel", "nf4_shrink_kernel", "nf4_experts_kernel")


def work(compilation: Compilation, compiled: Any) -> dict[str, Any]:
    """Instructions and memory wavefronts per unit of work, times the lanes of a warp.

    ``nf4_matmul``, ``nf4_rotate``, ``nf4_shrink``, ``nf4_experts``: per weight.
    ``segmented_shrink``: per rank and input feature.
    ``segmented_expand``: per rank and column, over a work item with one component of 16 ranks.
    ``paged_attention``: per key; also the number of groups of copies that may run while the loop
    multiplies. The result is empty for other kernels and targets.

    Args:
        compilation: The kernel's form.
        compiled: The compiled kernel for an NVIDIA target.
    """
    unit = _unit(compilation)
    if unit is None:
        return {}
    name, units, by = unit
    found = loops(disassemble(compiled.asm["cubin"]))
    # The innermost loop is the first to end.
    loop: Loop = found[0] if by is None else max(found, key=attrgetter(by))
    lanes = _LANES * dict(compilation.options)["num_warps"] / units
    result = {
        "unit": name,
        "instructions": round(loop.instructions * lanes, 2),
        "wavefronts": round(loop.wavefronts * lanes, 2),
    }
    if name == "key":
        result["copies_under_way"] = copies_under_way(compiled.asm["ptx"])
    return result


def _unit(compilation: Compilation) -> tuple[str, int, str | None] | None:
    """The name of the unit, the units per iteration, and the attribute that identifies the loop.

    The loop is the one with the largest value of the attribute, or the first loop if the attribute
    is None. The loop over a work list has the most instructions, and the loop over weights the most
    byte permutations (``picks``).
    """
    constants = dict(compilation.constants)
    kernel = compilation.function.__name__
    if kernel in _OF_WEIGHTS:
        return "weight", constants["BLOCK_N"] * constants.get("BLOCK", 64), "picks"
    if kernel == "segmented_shrink_kernel":
        return "rank and input", constants["BLOCK_R"] * constants["BLOCK_K"], None
    if kernel == "segmented_expand_kernel":
        return "rank and column", constants["BLOCK_R"] * constants["BLOCK_N"], "instructions"
    if kernel == "paged_attention_kernel":
        return "key", constants["TILE"], None
    return None


def copies_under_way(ptx: str) -> int:
    """The groups of asynchronous copies for which the first loop with products never waits.

    Zero means that each iteration waits for its own loads.
    """
    labels: dict[str, int] = {}
    lines = ptx.splitlines()
    for number, line in enumerate(lines):
        if label := re.match(r"(\$L\w+):", line):
            labels[label[1]] = number
        branch = re.search(r"\bbra(?:\.uni)?\s+(\$L\w+)", line)
        if branch and branch[1] in labels:
            body = "\n".join(lines[labels[branch[1]] : number])
            if "mma" in body:
                waits = re.findall(r"cp\.async\.wait_group\s+(\d+)", body)
                return min((int(wait) for wait in waits), default=0)
    return 0
