"""What clients may know of a registered adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from turret.server.adapters.adapter import Residency
from turret.server.adapters.facts import AdapterFacts

State = Literal["LOADING", "ACTIVE", "DELETING"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """A snapshot; it does not follow later changes.

    Attributes:
        name: Registered name.
        uuid: Identifies this registration; a name loaded again after an unload has another one.
        generation: From 1; a replacement under the same registration is the next one.
        facts: What reading its files found.
        bytes_host: Bytes of operators held in host memory now.
        bytes_device: Bytes held on the device now.
        residency: The fastest tier that holds it now.
        pinned: Never evicted, never unloaded.
        in_flight: Requests that hold it.
        last_used_time: Unix seconds of the last request, or None.
        state: ``DELETING`` refuses new requests.
        source: The path that it was loaded from, with the hub's commit; "" if it was uploaded.
    """

    name: str
    uuid: str
    generation: int
    facts: AdapterFacts
    bytes_host: int
    bytes_device: int
    residency: Residency
    pinned: bool
    in_flight: int
    last_used_time: float | None
    state: State
    source: str = ""
