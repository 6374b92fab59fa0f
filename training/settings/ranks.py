"""How high a rank can be: on the modules that a method adapts, and on a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from turret.server.config import AdapterConfig
from turret.server.models.decoding.arch import Arch

# What a server allows that nothing was said to.
SERVED_RANK = AdapterConfig().max_rank


def module_sizes(arch: Arch, targets: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Last part of the path, outputs and inputs of each kind of module that is adapted.

    Args:
        arch: Of the base.
        targets: Module names, as ``expand_targets`` gives them.
    """
    for slices in arch.linears().values():
        for path, out, inner in slices:
            name = path.rpartition(".")[2]
            if name in targets:
                yield name, out, inner
    if arch.experts is None:
        return
    for projection, (_, out, inner) in arch.expert_linears().items():
        templates = arch.experts.modules[projection]
        for name in (template.removeprefix("{}.") for template in templates):
            if name in targets:
                yield name, out // len(templates), inner


def over_both_sides(arch: Arch, targets: Sequence[str], rank: int) -> str | None:
    """What is wrong with the rank of an update ``B A``, whose rank is at most the weight's."""
    name, out, inner = min(module_sizes(arch, targets), key=lambda size: min(size[1:]))
    if rank <= min(out, inner):
        return None
    return (
        f"at most {min(out, inner)} on these modules: {name} has {inner} inputs and {out} outputs,"
        " and no update of it has a higher rank"
    )


def over_inputs(arch: Arch, targets: Sequence[str], rank: int) -> str | None:
    """What is wrong with a rank that counts parts or directions of a module's inputs."""
    name, _, inner = min(module_sizes(arch, targets), key=lambda size: size[2])
    if rank <= inner:
        return None
    return f"at most {inner} on these modules, which is how many inputs {name} has"
