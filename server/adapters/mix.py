"""The adapters of one request, resolved: names became weights in memory or on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from turret.server.adapters.adapter import Adapter
from turret.server.adapters.head import Head
from turret.server.errors import TurretError


@dataclass(frozen=True, slots=True)
class HostResult:
    """The answer to ``Mix.ensure_host``.

    Attributes:
        mix: The mix that was waiting.
        error: Why it cannot be served, or None: then every member is resident and stays
            so until the mix is released.
        load_seconds: Per key of a member that was not resident, how long its read took.
    """

    mix: Mix
    error: TurretError | None = None
    load_seconds: Mapping[str, float] = field(default_factory=dict)


OnHost = Callable[[HostResult], None]


@dataclass(frozen=True, slots=True, eq=False)
class Mix:
    """The result of ``AdapterRegistry.acquire``; compared by identity, released once.

    Attributes:
        members: ``(adapter, weight)`` in the request's order. A member of weight 0 adds nothing but
            is like any other: reported, counted and resident.
    """

    members: tuple[tuple[Adapter, float], ...]
    _ensure_host: Callable[[Mix, OnHost], bool] | None = field(default=None, repr=False)

    @property
    def key(self) -> tuple[tuple[str, int, float], ...]:
        """``(uuid, generation, weight)`` per member: what a KV block's content depends on."""
        return tuple((a.uuid, a.generation, weight) for a, weight in self.members)

    @property
    def head(self) -> Head | None:
        """The classification head of the first member that has one."""
        return next((a.head for a, _ in self.members if a.head is not None), None)

    @property
    def is_base(self) -> bool:
        return not self.members

    def part(self, members: Iterable[tuple[Adapter, float]]) -> Mix:
        """A mix of only some of the members; holds no adapters and needs no release."""
        return Mix(tuple(members))

    def ensure_host(self, callback: OnHost) -> bool:
        """Asks for the operators of every member in host memory.

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
