"""Conversion of merges between proto and domain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.protobuf import timestamp_pb2

from turret.server.adapters.fuse.combination import Combination
from turret.server.adapters.ref import AdapterRef
from turret.server.api.limits import MAX_WORD_CHARS
from turret.server.api.violations import Violations, adapter_refs
from turret.server.errors import InvalidRequestError
from turret.v1 import adapters_pb2

if TYPE_CHECKING:
    from turret.server.adapters.base import Precision
    from turret.server.adapters.fuse.result import FuseResult
    from turret.server.adapters.merge.state import MergeState


# Conversion of fusions between proto and domain.

_OPTIONAL = ("rank", "energy", "density", "seed")


def checked_fuse_request(
    request: adapters_pb2.FuseAdaptersRequest,
) -> tuple[str, tuple[AdapterRef, ...], Combination]:
    """The name of the result, its mix and its combination.

    Raises:
        InvalidRequestError: Lists every offending field.
    """
    violations = Violations()
    violations.check_name(request.name, "name")
    violations.check(len(request.adapters) > 0, "adapters", "EMPTY")
    refs = adapter_refs(request.adapters, violations)
    values: dict[str, Any] = {
        field: getattr(request, field) for field in _OPTIONAL if request.HasField(field)
    }
    # An empty string selects the default.
    for field, path in (("name", "combination"), ("majority_sign_method",) * 2):
        text = getattr(request, path)
        violations.check_chars(text, MAX_WORD_CHARS, path)
        if text and len(text) <= MAX_WORD_CHARS:
            values[field] = text
    combination = Combination()
    try:
        combination = Combination(**values)
    except InvalidRequestError as error:
        violations.found.extend(error.violations)
    violations.raise_if_any()
    return request.name, refs, combination


def fuse_response(
    result: FuseResult, adapter: adapters_pb2.Adapter
) -> adapters_pb2.FuseAdaptersResponse:
    """A ``FuseResult`` in the form of the API."""
    response = adapters_pb2.FuseAdaptersResponse(
        adapter=adapter, relative_error=result.relative_error
    )
    for each in result.modules:
        response.modules.add(module=each.module, relative_error=each.relative_error, rank=each.rank)
    return response


_Request = adapters_pb2.MergeAdaptersRequest
# None lets the merge choose.
_PRECISIONS: dict[int, Precision | None] = {
    _Request.PRECISION_UNSPECIFIED: None,
    _Request.AUTO: None,
    _Request.NF4: "NF4",
    _Request.BF16: "BF16",
}


def checked_merge_request(request: _Request) -> tuple[tuple[AdapterRef, ...], Precision | None]:
    """The mix, and the precision in which it is stored.

    Raises:
        InvalidRequestError: Lists every offending field.
    """
    violations = Violations()
    violations.check(len(request.adapters) > 0, "adapters", "EMPTY")
    refs = adapter_refs(request.adapters, violations)
    # A mix of zero weights would change nothing, yet block a merge that does.
    is_nothing = bool(refs) and all(ref.weight == 0 for ref in refs)
    violations.check(not is_nothing, "adapters", "NO_WEIGHT")
    violations.check_enum(request, "precision")
    violations.raise_if_any()
    return refs, _PRECISIONS[request.precision]


def merge_state_message(state: MergeState) -> adapters_pb2.MergeState:
    """The state in the form of the API."""
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
