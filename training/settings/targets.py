"""Which modules a config may name, told by the family before torch is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from turret.server.basics.closest import closest
from turret.server.models.decoding.arch import MODULES, Projections
from turret.server.models.families import FAMILIES
from turret.server.models.sources.check import told_sizes
from turret.training.errors import ConfigError
from turret.training.words import say

PRESETS = ("attention", "mlp", "all-linear")
_ATTENTION_GROUPS = ("qkv", "o")


def told_projections(model: Path | None, model_type: str) -> Projections | None:
    """The modules of a model as its ``Arch`` has them; None where that takes torch to tell.

    Arguments are those of ``told_sizes``.
    """
    sizes = told_sizes(model, model_type)
    modules = FAMILIES[model_type].modules.get(model_type, MODULES)
    if sizes is None:
        return None
    return Projections(model_type=model_type, modules=modules, **sizes)


def is_targeted(name: str, group: str, targets: Sequence[str]) -> bool:
    """Whether a module is one of a config's.

    Args:
        name: Last part of its path.
        group: Its fused projection, a key of ``Arch.linears``.
        targets: One preset, or module names.
    """
    if len(targets) != 1 or targets[0] not in PRESETS:
        return name in targets
    return targets[0] == "all-linear" or (group in _ATTENTION_GROUPS) == (targets[0] == "attention")


def check_targets(model_type: str, targets: Sequence[str]) -> None:
    """Refuse what no dense model of a family has, where its config does not tell the rest.

    Args:
        model_type: Of the base, a key of ``FAMILIES``.
        targets: As :func:`check_names`.

    Raises:
        ConfigError: As :func:`check_names`.
    """
    family = FAMILIES[model_type]
    if family.experts is None:
        modules = family.modules.get(model_type, MODULES)
        known = [path.rpartition(".")[2] for paths in modules.values() for path in paths]
        check_names(model_type, known, targets)


def check_names(model_type: str, known: Sequence[str], targets: Sequence[str]) -> None:
    """Refuse names that are no modules.

    Args:
        model_type: Of the base.
        known: Its linear modules.
        targets: One preset, or module names.

    Raises:
        ConfigError: A preset beside others, or a name that the architecture lacks.
    """
    if len(targets) == 1 and targets[0] in PRESETS:
        return
    for name in targets:
        if name in PRESETS:
            raise ConfigError.of("method.targets", say("PRESET_NOT_ALONE", value=name))
        if name not in known:
            text = say(
                "UNKNOWN_TARGET",
                value=name,
                model_type=model_type,
                choices=", ".join(known),
                presets=", ".join(PRESETS),
                closest=closest(name, (*known, *PRESETS)),
            )
            raise ConfigError.of("method.targets", text)
