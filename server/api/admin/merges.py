"""Merges, proto to domain and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf import timestamp_pb2

from turret.server.adapters.ref import AdapterRef
from turret.server.api.mix import adapter_refs
from turret.server.api.violations import Violations
from turret.v1 import adapters_pb2

if TYPE_CHECKING:
    from turret.server.adapters.base import Precision
    from turret.server.adapters.merge.state import MergeState

_Request = adapters_pb2.MergeAdaptersRequest
# None leaves the choice to the merge.
_PRECISIONS: dict[int, Precision | None] = {
    _Request.PRECISION_UNSPECIFIED: None,
    _Request.AUTO: None,
    _Request.NF4: "NF4",
    _Request.BF16: "BF16",
}


def checked_merge_request(request: _Request) -> tuple[tuple[AdapterRef, ...], Precision | None]:
    """The mix and how it is stored.

    Raises:
        InvalidRequestError: Lists every offending field.
    """
    violations = Violations()
    violations.check(len(request.adapters) > 0, "adapters", "at least one")
    refs = adapter_refs(request.adapters, violations)
    # It would change nothing, and be in the way of one that does.
    is_nothing = bool(refs) and all(ref.weight == 0 for ref in refs)
    violations.check(not is_nothing, "adapters", "must have a weight other than 0 among them")
    violations.check(request.precision in _PRECISIONS, "precision", "is no value of Precision")
    violations.raise_if_any()
    return refs, _PRECISIONS[request.precision]


def merge_state_message(state: MergeState) -> adapters_pb2.MergeState:
    """The state, as the API shows it."""
    message = adapters_pb2.MergeState(base_generation=state.base_generation)
    merge = state.merge
    if merge is None:
        return message
    message.active = True
    for member in merge.adapters:
        message.adapters.add(
            name=member.name,
            uuid=member.uuid,
            generation=member.generation,
            weight=member.weight,
        )
    message.precision = _Request.NF4 if merge.precision == "NF4" else _Request.BF16
    stamp = timestamp_pb2.Timestamp()
    stamp.FromNanoseconds(round(merge.time * 1e9))
    message.merge_time.CopyFrom(stamp)
    message.relative_error = merge.report.relative_error
    message.update_error = merge.report.update_error
    for path, error in merge.report.modules:
        message.modules.add(module=path, relative_error=error)
    return message
