"""The combinations of updates for the RPC ``FuseAdapters``: their names, and the settings of each.

``exact`` is the weighted sum of the members' updates, ``Σ w_k ΔW_k``, and ``svd`` approximates this
sum. The others are the combinations of PEFT's ``add_weighted_adapter``, under PEFT's names. This
file does not need torch, so that requests can be checked before torch is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

from turret.server.adapters.adapter import AdapterInfo
from turret.server.adapters.checkpoint import Finding, refuse_all
from turret.server.adapters.peft_format.config_rules import invalid
from turret.server.words import say


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """A report on one module of a fusion's result.

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
    """The result of a fusion.

    Attributes:
        record: The new adapter, which is registered.
        relative_error: The relative error of all modules together.
        modules: A report on each module, in the base model's order.
    """

    record: AdapterInfo
    relative_error: float
    modules: tuple[ModuleReport, ...]


# Combinations that concatenate the factors, which keeps the whole sum.
CONCATENATED = frozenset({"exact", "cat"})
# Combinations that combine all A and, separately, all B; the product of the results is the update.
ON_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
# Combinations of whole updates, whose result an SVD truncates.
ON_UPDATES = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
NAMES = ("exact", "cat", *ON_FACTORS, *ON_UPDATES)
SIGN_METHODS = ("total", "frequency")
MAX_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """The requested combination. Settings that are None were not given.

    Attributes:
        name: One of ``NAMES``.
        rank: The maximum rank of a module in the result, at least 1.
        energy: Share of the sum of squared singular values to keep, in (0, 1]; excludes ``rank``.
        density: Share of the entries that pruning keeps, in (0, 1].
        majority_sign_method: How TIES elects a sign: ``total`` (the default) or ``frequency``.
        seed: Seeds DARE's random pruning; 0 by default.

    Raises:
        InvalidRequestError: A value is missing, out of range, in conflict with another one, or
            belongs to another combination. The error lists all such values.
    """

    name: str = "exact"
    rank: int | None = None
    energy: float | None = None
    density: float | None = None
    majority_sign_method: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        found = [("combination", invalid(self.name, f"one of {', '.join(NAMES)}"))]
        if self.name in NAMES:
            found = [*self._misplaced(), *self._out_of_range()]
        refuse_all(found)

    @property
    def is_concatenated(self) -> bool:
        return self.name in CONCATENATED

    @property
    def is_on_updates(self) -> bool:
        return self.name in ON_UPDATES

    @property
    def prunes_at_random(self) -> bool:
        """Whether it is DARE (arXiv 2311.03099).

        DARE drops entries at random and scales up the others.
        """
        return self.name.startswith("dare")

    @property
    def prunes(self) -> bool:
        return self.prunes_at_random or self.name.startswith(("ties", "magnitude_prune"))

    @property
    def elects_signs(self) -> bool:
        """Whether it is TIES (arXiv 2306.01708), which ignores entries whose sign is outvoted."""
        return "ties" in self.name

    def _misplaced(self) -> list[Finding]:
        found = []
        for field, belongs, owners in (
            ("rank", self.is_on_updates, "the svd combinations"),
            ("energy", self.is_on_updates, "the svd combinations"),
            ("density", self.prunes, "ties, dare and magnitude_prune combinations"),
            ("majority_sign_method", self.elects_signs, "ties combinations"),
            ("seed", self.prunes_at_random, "dare combinations"),
        ):
            if not belongs and getattr(self, field) is not None:
                found.append((field, say("WRONG_COMBINATION", owners=owners, found=self.name)))
        if self.rank is not None and self.energy is not None:
            found.append(("energy", say("CONFLICTS_WITH", other="rank")))
        if self.prunes and self.density is None:
            found.append(("density", say("REQUIRED")))
        return found

    def _out_of_range(self) -> list[Finding]:
        found = []
        if self.rank is not None and self.rank < 1:
            found.append(("rank", invalid(self.rank, "at least 1")))
        for field in ("energy", "density"):
            share = getattr(self, field)
            if share is not None and not 0.0 < share <= 1.0:
                found.append((field, invalid(share, "greater than 0 and at most 1")))
        if self.majority_sign_method not in (None, *SIGN_METHODS):
            why = invalid(self.majority_sign_method, f"one of {', '.join(SIGN_METHODS)}")
            found.append(("majority_sign_method", why))
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            found.append(("seed", invalid(self.seed, "an unsigned 64-bit integer")))
        return found
