"""Fusions, proto to domain and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from turret.server.adapters.fuse.combination import Combination
from turret.server.adapters.ref import AdapterRef
from turret.server.api.limits import MAX_WORD_CHARS
from turret.server.api.mix import adapter_refs
from turret.server.api.violations import Violations
from turret.server.basics.adapter_name import no_adapter_name
from turret.server.errors import InvalidRequestError
from turret.v1 import adapters_pb2

if TYPE_CHECKING:
    from turret.server.adapters.fuse.result import FuseResult

_OPTIONAL = ("rank", "energy", "density", "seed")


def checked_fuse_request(
    request: adapters_pb2.FuseAdaptersRequest,
) -> tuple[str, tuple[AdapterRef, ...], Combination]:
    """Name of the result, mix and combination.

    Raises:
        InvalidRequestError: Lists every offending field.
    """
    violations = Violations()
    if why := no_adapter_name(request.name):
        violations.add("name", why)
    violations.check(len(request.adapters) > 0, "adapters", "at least one")
    refs = adapter_refs(request.adapters, violations)
    values: dict[str, Any] = {
        field: getattr(request, field) for field in _OPTIONAL if request.HasField(field)
    }
    # The empty string is the default of both.
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
    """A ``FuseResult``, as the API shows it."""
    response = adapters_pb2.FuseAdaptersResponse(
        adapter=adapter, relative_error=result.relative_error
    )
    for each in result.modules:
        response.modules.add(module=each.module, relative_error=each.relative_error, rank=each.rank)
    return response
