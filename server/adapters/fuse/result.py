"""What a fusion made, and how far it is from the exact sum."""

from __future__ import annotations

from dataclasses import dataclass

from turret.server.adapters.adapter_info import AdapterInfo


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One module of the result.

    Attributes:
        module: Full path in the base.
        relative_error: ``‖ΔW_out − Σ w_k ΔW_k‖ / ‖Σ w_k ΔW_k‖``, Frobenius.
        rank: The rank of the result.
    """

    module: str
    relative_error: float
    rank: int


@dataclass(frozen=True, slots=True)
class FuseResult:
    """A registered result.

    Attributes:
        record: The new adapter.
        relative_error: The same as a module's, over all modules together.
        modules: In the base model's order.
    """

    record: AdapterInfo
    relative_error: float
    modules: tuple[ModuleReport, ...]
