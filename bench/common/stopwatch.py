"""Measures the parts of a step in the running process."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Recorded = dict[str, float]


@dataclass(frozen=True, slots=True)
class Part:
    """A measured function, as ``module:name`` or ``module:Class.method``, and its part."""

    target: str
    name: str

    def locate(self) -> tuple[Any, str]:
        """Find the object with the function, and the name of its attribute.

        Raises:
            AttributeError: The function does not exist.
        """
        module, _, path = self.target.partition(":")
        owner: Any = importlib.import_module(module)
        *holders, attribute = path.split(".")
        for holder in holders:
            owner = getattr(owner, holder)
        getattr(owner, attribute)
        return owner, attribute


@dataclass(slots=True)
class Stopwatch:
    """Sums the time of every part, without that of the parts inside it.

    It supports one thread, and devices that compute before a call returns (the CPU).
    """

    sums: Recorded = field(default_factory=dict)
    _inner: list[float] = field(default_factory=list)

    def take(self) -> Recorded:
        """The sums since the last call, in seconds."""
        taken, self.sums = self.sums, {}
        return taken

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time added to ``name``."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.perf_counter() - start
                own = spent - self._inner.pop()
                self.sums[name] = self.sums.get(name, 0.0) + own
                if self._inner:
                    self._inner[-1] += spent

        return run

    @contextmanager
    def watching(self, parts: Sequence[Part]) -> Iterator[None]:
        """Measure these functions while the block runs.

        Raises:
            AttributeError: A function does not exist; in this case, none stays changed.
        """
        places = [(*part.locate(), part.name) for part in parts]
        originals = [
            (owner, attribute, getattr(owner, attribute)) for owner, attribute, _ in places
        ]
        try:
            for (owner, attribute, name), (_, _, function) in zip(places, originals, strict=True):
                setattr(owner, attribute, self.timed(name, function))
            yield
        finally:
            for owner, attribute, function in originals:
                setattr(owner, attribute, function)
