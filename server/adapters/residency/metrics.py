"""What the registry reports, whoever counts it."""

from __future__ import annotations

from typing import Protocol


class AdapterMetrics(Protocol):
    """The part of the server's metrics that adapters feed."""

    def adapter_registered(self, name: str, tier: str = "disk") -> None: ...
    def adapter_residency(self, name: str, tier: str) -> None: ...
    def adapter_removed(self, name: str) -> None: ...
    def adapter_bytes(self, **counts: int) -> None: ...
    def adapter_load(self, stage: str, seconds: float) -> None: ...
    def adapter_loaded(self, result: str) -> None: ...
    def adapter_evicted(self, tier: str, reason: str) -> None: ...


class NoAdapterMetrics:
    """Counts nothing."""

    def adapter_registered(self, name: str, tier: str = "disk") -> None:
        pass

    def adapter_residency(self, name: str, tier: str) -> None:
        pass

    def adapter_removed(self, name: str) -> None:
        pass

    def adapter_bytes(self, **counts: int) -> None:
        pass

    def adapter_load(self, stage: str, seconds: float) -> None:
        pass

    def adapter_loaded(self, result: str) -> None:
        pass

    def adapter_evicted(self, tier: str, reason: str) -> None:
        pass
