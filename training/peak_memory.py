"""The memory of this process, or of its device."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch


def peak_memory_bytes(device: str) -> int:
    """Peak of the device's allocator (CUDA), or of this process's resident memory (CPU)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def resident_bytes() -> int:
    """Resident memory of this process; its peak if the system does not report the current value."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return peak_memory_bytes("cpu")
    return int(statm.read_text().split()[1]) * resource.getpagesize()
