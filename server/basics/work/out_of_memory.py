"""Which errors say that there was no memory."""

from __future__ import annotations

import torch

# Torch's allocator has a type for it. The driver, where it loads a kernel or instantiates a graph,
# a library that makes a handle, Triton, and torch on a CPU say so in words.
_WORDS = ("out of memory", "alloc_failed", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether something may succeed once memory is free again."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _WORDS)
