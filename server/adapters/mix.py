"""The adapters of one request, resolved: names became weights in memory or on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from turret.server.adapters.adapter import Adapter
from turret.server.errors import TurretError


class MixRef(Protocol):
    """One member of a mix as a request names it; ``generation`` None means the newest."""

    @property
    def name(self) -> str: ...
    @property
    def generation(self) -> int | None: ...
    @property
    def weight(self) -> float: ...


@dataclass(frozen=True, slots=True)
class HostResult:
    """The answer to ``Mix.ensure_host``.

    Attributes:
        mix: The mix that was waiting.
        error: Why it cannot be served, or None: then every component is resident and stays
            so until the mix is released.
        load_seconds: Per key of a component that was not resident, how long its read took.
    """

    mix: Mix
    error: TurretError | None = None
    load_seconds: Mapping[str, float] = field(default_factory=dict)


OnHost = Callable[[HostResult], None]


@dataclass(frozen=True, slots=True, eq=False)
class Mix:
    """What ``AdapterRegistry.acquire`` returns; compared by identity, released once.

    Attributes:
        components: ``(adapter, weight)`` in the request's order. A component of weight 0 adds
            nothing but is a member like any other: reported, counted and resident.
    """

    components: tuple[tuple[Adapter, float], ...]
    _ensure_host: Callable[[Mix, OnHost], bool] | None = field(default=None, repr=False)

    @property
    def key(self) -> tuple[tuple[str, int, float], ...]:
        """``(uuid, generation, weight)`` per component: what a KV block's content depends on."""
        return tuple((a.uuid, a.generation, weight) for a, weight in self.components)

    @property
    def is_base(self) -> bool:
        return not self.components

    def ensure_host(self, callback: OnHost) -> bool:
        """Asks for the operators of every component in host memory.

        Returns:
            True if they are there now and stay until release; the callback is not called. False
            if they are being read or wait for room: the callback is called once, from whichever
            thread finishes the work and perhaps under the registry's lock, so it must only hand the
            result over; never after release.

        Raises:
            BudgetExceededError: They can never be resident together.
        """
        return self._ensure_host is None or self._ensure_host(self, callback)


BASE_MIX = Mix(())
