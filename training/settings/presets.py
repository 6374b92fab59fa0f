"""Which linear modules a preset's name stands for, by architecture."""

from __future__ import annotations

from collections.abc import Sequence

from turret.server.models.decoding.arch import Arch
from turret.training.errors import ConfigError

_ATTENTION_GROUPS = ("qkv", "o")
PRESETS = ("attention", "mlp", "all-linear")


def module_names(arch: Arch, preset: str) -> tuple[str, ...]:
    """The modules of a preset, by the last part of their path, in the layer's order.

    Args:
        arch: Of the base.
        preset: One of ``PRESETS``.
    """
    names = []
    for group, slices in arch.linears().items():
        is_attention = group in _ATTENTION_GROUPS
        if preset == "all-linear" or is_attention == (preset == "attention"):
            names += [path.rsplit(".", 1)[-1] for path, _, _ in slices]
    return tuple(names)


def expand_targets(arch: Arch, targets: Sequence[str]) -> tuple[str, ...]:
    """Module names for what the config says.

    Args:
        arch: Of the base.
        targets: One preset, or module names.

    Raises:
        ConfigError: A preset beside others, or a name that the architecture lacks.
    """
    if len(targets) == 1 and targets[0] in PRESETS:
        return module_names(arch, targets[0])
    known = module_names(arch, "all-linear")
    for name in targets:
        if name in PRESETS:
            raise ConfigError.of("method.targets", f"{name!r} stands alone or not at all")
        if name not in known:
            raise ConfigError.of(
                "method.targets",
                f"{name!r} is no linear module of {arch.model_type}; there are {', '.join(known)}, "
                f"and the presets {', '.join(PRESETS)}",
            )
    return tuple(dict.fromkeys(targets))
