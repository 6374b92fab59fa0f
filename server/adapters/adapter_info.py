"""What clients may know of a registered adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from turret.server.adapters.adapter import Residency

State = Literal["LOADING", "ACTIVE", "DELETING"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """A snapshot; it does not follow later changes.

    Attributes:
        name: Registered name.
        uuid: Of this registration; a name loaded again after an unload has another one.
        generation: From 1; a replacement under the same registration is the next one.
        digest: SHA-256 over config and weights, hex.
        method: ``lora``, ``dora``, …
        ranks: Distinct ranks, ascending.
        target_modules: Distinct module names (last path component), ascending.
        bytes_disk: Size of the checkpoint's files.
        bytes_host: Bytes of operators held in host memory now.
        bytes_device: Bytes held on the device now.
        residency: The fastest tier that holds it now.
        pinned: Never evicted, never unloaded.
        in_flight: Requests that hold it.
        last_used_time: Unix seconds of the last request, or None.
        base_model: The base its config names, or "".
        warnings: What an operator should know.
        state: ``DELETING`` refuses new requests.
    """

    name: str
    uuid: str
    generation: int
    digest: str
    method: str
    ranks: tuple[int, ...]
    target_modules: tuple[str, ...]
    bytes_disk: int
    bytes_host: int
    bytes_device: int
    residency: Residency
    pinned: bool
    in_flight: int
    last_used_time: float | None
    base_model: str
    warnings: tuple[str, ...]
    state: State
