"""Whether a base has the modules that a config names, and a method its rank there."""

from __future__ import annotations

from collections.abc import Sequence

from turret.server.models.decoding.arch import Projections
from turret.training.settings.config import MethodConfig
from turret.training.settings.fit import METHOD_KEYS
from turret.training.settings.presets import check_experts, expand_targets
from turret.training.settings.ranks import check_rank, module_sizes

# Default targets of every method that has a rank.
_ALL = ("all-linear",)


def check_modules(
    method: str, projections: Projections, targets: Sequence[str], rank: int | None
) -> tuple[str, ...]:
    """Names of the modules that are adapted.

    Args:
        method: Its name.
        projections: Of the base.
        targets: As in ``method.targets``.
        rank: As in ``method.rank``; None for a method without one.

    Raises:
        ConfigError: The base lacks one, or the method cannot have it, or not at this rank.
    """
    names = expand_targets(projections, targets)
    check_experts(method, projections, names)
    if rank is not None:
        check_rank(method, tuple(module_sizes(projections, names)), rank)
    return names


def check_method(config: MethodConfig, projections: Projections) -> None:
    """:func:`check_modules` of a config as it is read, as far as it says something.

    Args:
        config: Names its method's keys alone.
        projections: Of the base.
    """
    has_modules = "targets" in METHOD_KEYS[config.name]
    if has_modules and (config.targets or config.rank) is not None:
        check_modules(config.name, projections, config.targets or _ALL, config.rank)
