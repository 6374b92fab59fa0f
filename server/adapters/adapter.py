"""One generation of a registered adapter: fixed identity, moving residency."""

from __future__ import annotations

from typing import Literal

from turret.server.adapters.facts import AdapterFacts
from turret.server.adapters.head import Head
from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.adapters.source import Source


class Adapter:
    """The weights that a name stood for at some time.

    The identity never changes. Everything else belongs to the registry and its leases and changes
    under their lock; reading single attributes without the lock is safe.

    Attributes:
        name: Registered name.
        uuid: Identifies the registration; all its generations have it.
        generation: From 1.
        key: Names this generation and no other, for as long as its uuid lives.
        facts: What reading its files found.
        source: Where its files are.
        operators: By module path; None while on disk. While a mix that was granted residency (see
            ``Mix.ensure_host``) holds the adapter, it stays as it is, unless the base changes.
        base_generation: The generation of the base weights that ``operators`` were computed from;
            None if they are the same on any.
        host_bytes_needed: Host memory that its operators take when resident.
        in_flight: Mixes that hold the adapter.
        holds: Those of them that were granted residency; an adapter with holds is not evicted.
        pinned: Never evicted.
        is_retired: A later generation has taken its place.
        bytes_device: Set by the code that copies the operators to a device.
    """

    # Thousands of adapters are registered, so instances have no dictionary.
    __slots__ = (
        "base_generation",
        "bytes_device",
        "facts",
        "generation",
        "holds",
        "host_bytes_needed",
        "in_flight",
        "is_retired",
        "key",
        "name",
        "operators",
        "pinned",
        "source",
        "uuid",
    )

    def __init__(
        self, name: str, uuid: str, generation: int, source: Source, facts: AdapterFacts
    ) -> None:
        self.name = name
        self.uuid = uuid
        self.generation = generation
        self.key = f"{uuid}.{generation}"
        self.facts = facts
        self.source = source
        self.operators: AdapterOperators | None = None
        self.base_generation: int | None = None
        self.host_bytes_needed = facts.bytes_host
        self.in_flight = 0
        self.holds = 0
        self.pinned = False
        self.is_retired = False
        self.bytes_device = 0

    def __repr__(self) -> str:
        return f"Adapter({self.name!r}, generation={self.generation}, uuid={self.uuid!r})"

    @property
    def digest(self) -> str:
        return self.facts.digest

    @property
    def num_soft_tokens(self) -> int:
        return self.facts.num_soft_tokens

    @property
    def num_prefix_positions(self) -> int:
        return self.facts.num_prefix_positions

    @property
    def invocation(self) -> tuple[int, ...]:
        return self.facts.invocation

    @property
    def first_pass(self) -> str:
        return self.facts.first_pass

    @property
    def head(self) -> Head | None:
        """Its classification head, without the weights."""
        facts = self.facts
        return Head(facts.labels, facts.problem_type) if facts.labels else None

    @property
    def is_resident(self) -> bool:
        return self.operators is not None

    @property
    def residency(self) -> Residency:
        if self.bytes_device:
            return "device"
        return "host" if self.is_resident else "disk"


Residency = Literal["disk", "host", "device"]
