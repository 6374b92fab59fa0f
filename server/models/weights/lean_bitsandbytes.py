"""``bitsandbytes.functional``, imported in a tenth of its time.

bitsandbytes hands a few functions to ``torch.compile`` as it is imported, which imports torch's
compiler: seconds of processor time in every server's start. They are what it has for devices
without kernels of its own, and it calls them uncompiled where they do not compile.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator

import torch

__all__ = ["functional"]


def _as_it_is(function: Callable[..., object] | None = None, **_: object) -> object:
    """Replaces ``torch.compile``, both called directly and as a decorator with arguments."""
    return _as_it_is if function is None else function


@contextlib.contextmanager
def _nothing_compiled() -> Iterator[None]:
    compiles = functools.partial(setattr, torch, "compile", torch.compile)
    setattr(torch, "compile", _as_it_is)  # noqa: B010
    try:
        yield
    finally:
        compiles()


# bitsandbytes warns at import that an optional kernel of the hub is not installed.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
with _nothing_compiled():
    from bitsandbytes import functional
