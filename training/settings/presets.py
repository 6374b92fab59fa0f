"""Which linear modules a preset's name stands for, by architecture."""

from __future__ import annotations

from collections.abc import Sequence

from turret.server.models.decoding.arch import ROUTER, Experts, Projections
from turret.training.errors import ConfigError
from turret.training.settings.fit import ON_EXPERTS
from turret.training.settings.targets import PRESETS, check_names, is_targeted
from turret.training.words import say


def module_names(projections: Projections, preset: str) -> tuple[str, ...]:
    """The modules of a preset, by the last part of their path, in the layer's order.

    Args:
        projections: Of the base.
        preset: One of ``PRESETS``.
    """
    names: list[str] = []
    for group, slices in projections.linears().items():
        # A parameter, as transformers has it, and no linear module.
        if group == ROUTER:
            continue
        last = (path.rsplit(".", 1)[-1] for path, _, _ in slices)
        names += [name for name in last if is_targeted(name, group, (preset,))]
    if preset != "attention":
        names += expert_names(projections)
    return tuple(dict.fromkeys(names))


def expert_names(projections: Projections) -> tuple[str, ...]:
    """The modules of experts that can be trained, by the last part of their path."""
    return () if projections.experts is None else _target_names(projections.experts)


def _target_names(experts: Experts) -> tuple[str, ...]:
    """What adapters may target of experts, by the last part of each module's path.

    Empty where the server and PEFT look for them elsewhere than the model that is trained has them.
    """
    templates = [name for names in experts.modules.values() for name in names]
    if experts.path != experts.checkpoint_path or not all(t.startswith("{}.") for t in templates):
        return ()
    return tuple(template.removeprefix("{}.") for template in templates)


def expand_targets(projections: Projections, targets: Sequence[str]) -> tuple[str, ...]:
    """Module names for what the config says.

    Args:
        projections: Of the base.
        targets: One preset, or module names.

    Raises:
        ConfigError: A preset beside others, one without a module, or a name that the architecture
            lacks.
    """
    if len(targets) == 1 and targets[0] in PRESETS:
        found = module_names(projections, targets[0])
        if not found:
            text = say("NO_TARGETS", value=targets[0], model_type=projections.model_type)
            raise ConfigError.of("method.targets", text)
        return found
    check_names(projections.model_type, module_names(projections, "all-linear"), targets)
    return tuple(dict.fromkeys(targets))


def check_experts(method: str, projections: Projections, targets: Sequence[str]) -> None:
    """Refuse modules of experts to a method that the server does not take there.

    Args:
        method: Its name.
        projections: Of the base.
        targets: Of :func:`expand_targets`.

    Raises:
        ConfigError: Names the first such module.
    """
    named = [name for name in expert_names(projections) if name in targets]
    if named and method not in ON_EXPERTS:
        choices = ", ".join(ON_EXPERTS)
        text = say("EXPERTS_UNSUPPORTED_BY", module=named[0], method=method, choices=choices)
        raise ConfigError.of("method.targets", text)
