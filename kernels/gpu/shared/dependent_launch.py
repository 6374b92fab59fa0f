"""Launches whose programs may begin before the launch before has ended (``launch_pdl``).

A kernel that is ever launched so calls ``wait_for_launches`` first, on every path, and touches
nothing before: what it reads may not be written yet, and what it writes may still be in use by a
launch before. Whoever waits for it then knows that everything before it has ended as well.
Otherwise the calls are compiled away, and the launch waits as a whole. CUDA Programming Guide,
"Programmatic Dependent Launch and Synchronization".
"""

# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

# The unused result is there because Triton's inline assembly needs one.
_FETCH = tl.constexpr("prefetch.global.L2 [$1];\nmov.b32 $0, 0;")


def is_early(_semantic: Any = None) -> bool:
    """Whether the kernel that is compiled is launched with ``launch_pdl``; the interpreter's never.

    An option of the compiler, as ``tl.extra.cuda.num_warps`` has it: no argument of every kernel.
    """
    return _semantic is not None and bool(getattr(_semantic.builder.options, "launch_pdl", False))


# Mark it as Triton marks its own builtin functions.
is_early.__triton_builtin__ = True  # type: ignore[attr-defined]


@triton.jit
def wait_for_launches():
    """Let the next launch begin and wait until all launches before have ended."""
    if is_early():
        # The next launch waits here too; until then it only occupies free room on the device.
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def fetch(ptr):
    """Prefetch these addresses into the L2 cache, one instruction per thread and address."""
    address = ptr.to(tl.int64)
    tl.inline_asm_elementwise(_FETCH, "=r,l", [address], tl.int32, is_pure=False, pack=1)
