"""Gives freed heap pages back to the operating system.

Reading an adapter frees as many bytes as it keeps, in pieces of some kilobytes between the ones
that stay; glibc would hold on to those pages for ever.
"""

from __future__ import annotations

import ctypes
import sys


def release_freed_memory() -> None:
    """Return what the C heap holds but does not use (glibc only; a few milliseconds)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
