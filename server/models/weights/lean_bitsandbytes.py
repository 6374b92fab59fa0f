"""``bitsandbytes.functional``, imported in a tenth of its time.

bitsandbytes imports torch's compiler, which takes seconds of processor time and 70 MiB. It hands a
few functions to ``torch.compile`` when it is imported; those are for devices without kernels of its
own, and are called uncompiled where they do not compile. Later, the first call of each of its
operators would import the compiler in order to keep the operator out of it. A server that runs out
of memory during that import could not call the operator until it restarts.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

import torch

__all__ = ["functional"]


def _as_it_is(function: Callable[..., object] | None = None, **_: object) -> object:
    """Replaces both functions of torch, called directly and as a decorator with arguments."""
    return _as_it_is if function is None else function


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    replaced = {name: getattr(torch, name) for name in ("compile", "_disable_dynamo")}
    for name in replaced:
        setattr(torch, name, _as_it_is)
    try:
        yield
    finally:
        for name, function in replaced.items():
            setattr(torch, name, function)


# bitsandbytes warns at import that an optional kernel of the hub is not installed.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
with _without_compiler():
    from bitsandbytes import functional
