"""What is merged into the base, and what that did to it."""

from __future__ import annotations

from dataclasses import dataclass

from turret.server.adapters.base import Precision


@dataclass(frozen=True, slots=True)
class MergedAdapter:
    """A member of the mix, as it was called when it was merged."""

    name: str
    uuid: str
    generation: int
    weight: float


@dataclass(frozen=True, slots=True)
class MergeReport:
    """How far the stored weights are from the exact ones.

    Attributes:
        relative_error: ``‖stored − exact‖ / ‖exact‖``, Frobenius norms over all changed modules,
            where ``exact = W + Σ w_k ΔW_k`` in fp32 and ``stored`` is what is multiplied.
        update_error: ``‖stored − exact‖ / ‖exact − W‖``: the error as a share of the change. At 1,
            the mix is lost in the rounding. 0 where nothing was to change.
        modules: ``relative_error`` of each changed module, by path, in the base's order.
    """

    relative_error: float
    update_error: float
    modules: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """A merge that took effect.

    Attributes:
        adapters: The mix, in the request's order.
        precision: How the merged weights are stored.
        time: Unix seconds.
        report: How far the stored weights are from the exact ones.
    """

    adapters: tuple[MergedAdapter, ...]
    precision: Precision
    time: float
    report: MergeReport


@dataclass(frozen=True, slots=True)
class MergeState:
    """The base's generation, and the merge that it is the result of, or None."""

    base_generation: int
    merge: Merge | None = None
