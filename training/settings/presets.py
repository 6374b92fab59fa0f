"""Which linear modules a preset's name stands for, by architecture."""

from __future__ import annotations

from collections.abc import Sequence

from turret.server.models.decoding.arch import ROUTER, Arch
from turret.training.errors import ConfigError
from turret.training.mixture import target_names
from turret.training.settings.targets import PRESETS, check_names, is_targeted


def module_names(arch: Arch, preset: str) -> tuple[str, ...]:
    """The modules of a preset, by the last part of their path, in the layer's order.

    Args:
        arch: Of the base.
        preset: One of ``PRESETS``.
    """
    names: list[str] = []
    for group, slices in arch.linears().items():
        # A parameter, as transformers has it, and no linear module.
        if group == ROUTER:
            continue
        last = (path.rsplit(".", 1)[-1] for path, _, _ in slices)
        names += [name for name in last if is_targeted(name, group, (preset,))]
    if preset != "attention":
        names += expert_names(arch)
    return tuple(dict.fromkeys(names))


def expert_names(arch: Arch) -> tuple[str, ...]:
    """The modules of experts that can be trained, by the last part of their path."""
    return () if arch.experts is None else target_names(arch.experts)


def expand_targets(arch: Arch, targets: Sequence[str]) -> tuple[str, ...]:
    """Module names for what the config says.

    Args:
        arch: Of the base.
        targets: One preset, or module names.

    Raises:
        ConfigError: A preset beside others, one without a module, or a name that the architecture
            lacks.
    """
    if len(targets) == 1 and targets[0] in PRESETS:
        found = module_names(arch, targets[0])
        if not found:
            why = f"{arch.model_type} has no module to train here; attention has"
            raise ConfigError.of("method.targets", why)
        return found
    check_names(arch.model_type, module_names(arch, "all-linear"), targets)
    return tuple(dict.fromkeys(targets))
