"""Which program of a launch finishes what several of them have written in parts.

A program stores its part, then adds one to a counter. The addition releases what its program wrote
(the barrier puts the stores of all its threads before it) and acquires what the others released, so
whoever finds that it is the last may read every part. It reads them in their order, not in that of
the arrivals: the result does not depend on who is last. The counter is zero again afterwards, for
the next launch. Parts are read past the first-level cache (``cache_modifier=".cg"``).
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def is_last(
    counter_ptr,  # int32, zero before the launch
    arrivals,  # programs that add to it, each once
):
    """Whether all other programs have stored their parts."""
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == arrivals - 1
    if last:
        tl.store(counter_ptr, 0)
    return last
