"""Panics of libraries in Rust, which no ``except Exception`` catches."""

from __future__ import annotations

import contextlib
from types import TracebackType


class _PanicsAreErrors(contextlib.ContextDecorator):
    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Each library has a class of its own, and exports none.
        if kind is not None and kind.__name__ == "PanicException":
            raise RuntimeError(f"panic: {error}") from error


# Makes a RuntimeError of one, as a context or a decorator: a thread would end of the panic itself.
PANICS_ARE_ERRORS = _PanicsAreErrors()
