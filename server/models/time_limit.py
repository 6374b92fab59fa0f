"""An end for Python code that others wrote: chat templates of adapters."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def limited_to(seconds: float) -> Iterator[None]:
    """Have this thread's Python code raise TimeoutError once it runs for longer.

    It is looked at with every line, so that loops end; a single call into C is not interrupted.
    """
    end = time.monotonic() + seconds

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > end:
            raise TimeoutError(f"takes longer than {seconds:.0f} seconds")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
