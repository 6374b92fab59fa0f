"""The most memory used so far."""

from __future__ import annotations

import resource
import sys

import torch


def peak_memory_bytes(device: str) -> int:
    """Peak of the device's allocator (CUDA), or of this process's resident memory (CPU)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
