"""The one table from error class to gRPC status, and the rich status a client receives."""

from __future__ import annotations

from typing import NamedTuple

import grpc
from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from turret.server import errors

ERROR_DOMAIN = "turret"
DETAILS_KEY = "grpc-status-details-bin"

# Clients refuse response headers over 8 KiB. The message travels twice (percent-encoded on its own
# and in the details, which grow by a third in base64), so both are cut well below that.
MAX_MESSAGE_BYTES = 800
MAX_VIOLATION_BYTES = 3000
MAX_METADATA_BYTES = 600


class Row(NamedTuple):
    """The status code of an error class, and how long a client should wait before a retry."""

    code: grpc.StatusCode
    # None: a retry of the same call fails the same way, unless the error itself says otherwise.
    retry_after_seconds: float | None = None


_Code = grpc.StatusCode

TABLE: dict[type[errors.TurretError], Row] = {
    errors.TurretError: Row(_Code.INTERNAL),
    errors.InvalidRequestError: Row(_Code.INVALID_ARGUMENT),
    errors.PromptTooLongError: Row(_Code.INVALID_ARGUMENT),
    errors.AdapterError: Row(_Code.FAILED_PRECONDITION),
    errors.AdapterNotFoundError: Row(_Code.NOT_FOUND),
    errors.AdapterExistsError: Row(_Code.ALREADY_EXISTS),
    errors.AdapterCheckpointError: Row(_Code.INVALID_ARGUMENT),
    # Nothing is wrong with the call: the server's files are.
    errors.AdapterChangedError: Row(_Code.FAILED_PRECONDITION),
    errors.AdapterMismatchError: Row(_Code.FAILED_PRECONDITION),
    errors.AdapterComponentError: Row(_Code.FAILED_PRECONDITION),
    errors.AdapterInUseError: Row(_Code.FAILED_PRECONDITION),
    errors.AdapterUnloadedError: Row(_Code.ABORTED),
    errors.StateDirRequiredError: Row(_Code.FAILED_PRECONDITION),
    errors.MergeActiveError: Row(_Code.FAILED_PRECONDITION),
    errors.NotMergedError: Row(_Code.FAILED_PRECONDITION),
    errors.ResourceError: Row(_Code.RESOURCE_EXHAUSTED, 1.0),
    errors.QueueFullError: Row(_Code.RESOURCE_EXHAUSTED, 1.0),
    # A rank or size over its limit stays over it; what frees up by itself says so in the error.
    errors.BudgetExceededError: Row(_Code.RESOURCE_EXHAUSTED),
    errors.StorageFullError: Row(_Code.RESOURCE_EXHAUSTED),
    errors.UnauthenticatedError: Row(_Code.UNAUTHENTICATED),
    errors.PermissionDeniedError: Row(_Code.PERMISSION_DENIED),
    errors.UnavailableError: Row(_Code.UNAVAILABLE, 1.0),
    errors.DeadlineExceededError: Row(_Code.DEADLINE_EXCEEDED),
}


def row_of(error: BaseException) -> Row:
    """The row of the nearest class in the table; INTERNAL for what turret did not raise."""
    for kind in type(error).__mro__:
        if kind in TABLE:
            return TABLE[kind]
    return Row(grpc.StatusCode.INTERNAL)


def _shortened(text: str, limit: int) -> str:
    """``text`` as valid UTF-8 of at most about ``limit`` bytes on the wire.

    gRPC percent-encodes everything but printable ASCII, which triples it.
    """
    text = text.encode("utf-8", "replace").decode()
    cost = 0
    for index, character in enumerate(text):
        cost += 1 if " " <= character <= "~" else 3 * len(character.encode())
        if cost > limit:
            return text[:index] + "..."
    return text


def _bad_request(violations: tuple[tuple[str, str], ...]) -> error_details_pb2.BadRequest:
    detail = error_details_pb2.BadRequest()
    used = 0
    for index, (field, description) in enumerate(violations):
        field, description = _shortened(field, 200), _shortened(description, 400)
        used += len(field.encode()) + len(description.encode()) + 8
        if used > MAX_VIOLATION_BYTES:
            rest = len(violations) - index
            detail.field_violations.add(field="*", description=f"and {rest} more")
            break
        detail.field_violations.add(field=field, description=description)
    return detail


def to_rich_status(error: BaseException) -> status_pb2.Status:
    """The ``google.rpc.Status`` of an error.

    What turret did not raise on purpose becomes INTERNAL "internal error": its text may hold
    anything, so it stays in the log.
    """
    row = row_of(error)
    if row.code is grpc.StatusCode.INTERNAL or not isinstance(error, errors.TurretError):
        status = status_pb2.Status(code=code_pb2.INTERNAL, message="internal error")
        status.details.add().Pack(
            error_details_pb2.ErrorInfo(reason="INTERNAL", domain=ERROR_DOMAIN)
        )
        return status
    status = status_pb2.Status(
        code=row.code.value[0], message=_shortened(error.message, MAX_MESSAGE_BYTES)
    )
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN)
    room = MAX_METADATA_BYTES
    for key, value in error.metadata.items():
        shown = _shortened(str(value), 200)
        room -= len(key) + len(shown.encode())
        if room < 0:
            break
        info.metadata[key] = shown
    status.details.add().Pack(info)
    if error.violations:
        status.details.add().Pack(_bad_request(error.violations))
    delay = error.retry_after_seconds
    delay = row.retry_after_seconds if delay is None else delay
    if delay is not None:
        wait = duration_pb2.Duration()
        wait.FromNanoseconds(round(delay * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=wait))
    return status
