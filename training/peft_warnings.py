"""PEFT calls transformers by names that transformers has deprecated; users can do nothing then."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_DEPRECATED = ("is_gradient_checkpointing", "past_key_values")


@contextmanager
def without_peft_warnings() -> Iterator[None]:
    """Hide those warnings within the block."""
    with warnings.catch_warnings():
        for name in _DEPRECATED:
            warnings.filterwarnings("ignore", f".*{name}.*", FutureWarning)
        yield
