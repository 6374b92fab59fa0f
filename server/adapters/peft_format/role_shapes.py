"""The tensors of one module against the shapes that config and base give them."""

from __future__ import annotations

from collections.abc import Mapping

from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.no_adapter import LEFT_OUT, SAVE_AGAIN
from turret.server.adapters.peft_format.module_checkpoint import BIAS, Roles


class Served(int):
    """A size that the base decides: a tensor of another one may be sound, but for another base."""


def check_roles(
    name: str, roles: Roles, shapes: Mapping[str, tuple[int, ...]], findings: Findings
) -> bool:
    """Whether every tensor is there and has its shape; else faults, or mismatches.

    Args:
        name: The module's path.
        roles: Its tensors. Those that ``shapes`` leaves out are faults.
        shapes: Shape by role. A size is ``Served`` where the base decides it; any other follows
            from the config or from another tensor.
        findings: Receives what is wrong.
    """
    is_good = True
    for role in roles.keys() - shapes.keys() - {BIAS}:
        findings.add(f"{name}.{role}", LEFT_OUT)
        is_good = False
    for role, shape in shapes.items():
        tensor = roles.get(role)
        if tensor is None:
            why = f"is missing; the module's other tensors are there: {SAVE_AGAIN}"
            findings.add(f"{name}.{role}", why)
            is_good = False
            continue
        sizes = zip(tensor.shape, shape, strict=False)
        of_base = tensor.ndim == len(shape) and all(
            found == wanted or isinstance(wanted, Served) for found, wanted in sizes
        )
        if not findings.check_shape(f"{name}.{role}", tensor, shape, of_base=of_base):
            is_good = False
    return is_good


def check_divides(name: str, size: int, by: int, what: str, findings: Findings) -> bool:
    """Whether a size of the base divides into equal parts; else a mismatch."""
    if size % by == 0:
        return True
    findings.mismatch(name, f"has {size} {what}, which {by} does not divide")
    return False
