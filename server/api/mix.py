"""The adapters that a request runs on, proto to domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from turret.server.adapters.ref import AdapterRef
from turret.server.api.limits import MAX_MIX_MEMBERS
from turret.server.api.violations import Violations
from turret.server.basics.adapter_name import no_adapter_name
from turret.v1 import adapters_pb2


def adapter_refs(
    weights: Sequence[adapters_pb2.AdapterWeight], violations: Violations
) -> tuple[AdapterRef, ...]:
    """The members of a mix, in the order of the message."""
    if len(weights) > MAX_MIX_MEMBERS:
        violations.add("adapters", f"at most {MAX_MIX_MEMBERS} members, not {len(weights)}")
        return ()
    refs: list[AdapterRef] = []
    seen: set[str] = set()
    for index, member in enumerate(weights):
        path = f"adapters[{index}]"
        if why := no_adapter_name(member.name):
            violations.add(f"{path}.name", why)
        elif member.name in seen:
            violations.add(f"{path}.name", f"{member.name!r} occurs twice")
        seen.add(member.name)
        values: dict[str, Any] = {"name": member.name}
        for name in ("generation", "weight"):
            if member.HasField(name):
                values[name] = getattr(member, name)
        refs.append(violations.build(AdapterRef, values, path))
    return tuple(refs)
