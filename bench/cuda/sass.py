"""Instructions in a compiled kernel's loops, counted in the machine code (SASS) of its cubin."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from triton import knobs

_MEMORY = ("LDG", "STG", "LDS", "STS", "LDGSTS", "LDSM", "STSM", "ATOMS", "ATOMG")
_BARRIER = "BAR"


@dataclass(frozen=True, slots=True)
class Loop:
    """The instructions from a label to the branch back to it.

    Attributes:
        instructions: The number of instructions that a warp issues per iteration; inner loops count
            once.
        wavefronts: The passes through the load-store unit per iteration: one for 4 bytes per lane,
            more for wider accesses. Bank conflicts and scattered addresses are ignored.
        barriers: The number of barriers, at which all warps of the program wait.
        products: The number of tensor-core instructions.
        picks: The number of instructions that select bytes of registers; a table of codes needs
            many.
    """

    instructions: int
    wavefronts: int
    barriers: int
    products: int
    picks: int


def disassemble(cubin: bytes) -> str:
    """The machine code of a cubin as text."""
    nvdisasm = Path(knobs.nvidia.cuobjdump.path).with_name("nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [str(nvdisasm), "-c", file.name], check=True, capture_output=True, text=True
        )
    return done.stdout


def loops(sass: str) -> list[Loop]:
    """All loops, in the order of their branches back: an inner one before its outer one."""
    operations: list[str] = []
    labels: dict[str, int] = {}
    found: list[Loop] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(operations)
        elif statement := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            text = re.sub(r"^@!?U?P\w+\s+", "", statement[1])
            operations.append(text.split()[0])
            target = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", text)
            # Skip the branch to itself that pads the end of the code.
            if target and len(operations) - labels.get(target[1], len(operations)) > 1:
                found.append(_loop(operations[labels[target[1]] :]))
    return found


def _loop(operations: list[str]) -> Loop:
    names = [operation.split(".") for operation in operations]
    return Loop(
        len(operations),
        sum(_wavefronts(parts) for parts in names if parts[0] in _MEMORY),
        sum(parts[0] == _BARRIER for parts in names),
        sum(parts[0] in ("HMMA", "HGMMA") for parts in names),
        sum(parts[0] == "PRMT" for parts in names),
    )


def _wavefronts(parts: list[str]) -> int:
    if parts[0] in ("LDSM", "STSM"):
        return int(parts[-1]) if parts[-1].isdigit() else 1
    return 4 if "128" in parts else 2 if "64" in parts else 1
