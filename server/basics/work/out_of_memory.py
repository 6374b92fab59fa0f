"""Which errors say that there was no memory."""

from __future__ import annotations

import errno
import sys

from turret.server.errors import OutOfMemoryError, TurretError

# Torch's allocator has a type for it. The driver, where it loads a kernel or instantiates a graph,
# a library that makes a handle, Triton, torch on a CPU, and Python where it starts a thread say so
# in words.
_WORDS = ("out of memory", "alloc_failed", "can't allocate memory", "can't start new thread")
# A fork fails with the second one where a limit of processes is reached.
_NUMBERS = (errno.ENOMEM, errno.EAGAIN)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether something may succeed once memory is free again."""
    if isinstance(error, OSError):
        return error.errno in _NUMBERS
    # Without torch nobody has raised its error.
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _WORDS)


def told_of(error: BaseException, otherwise: str) -> TurretError:
    """What a caller is told of an error: that there was no memory, or ``otherwise``."""
    if isinstance(error, TurretError):
        return error
    if is_out_of_memory(error):
        return OutOfMemoryError("the server has no memory for this call")
    return TurretError(otherwise)
