"""A fault as gRPC says it: the rich status that a client receives."""

from __future__ import annotations

from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2

from turret.server.api.faults import Fault
from turret.server.errors import VIOLATION_COUNT

ERROR_DOMAIN = "turret"
DETAILS_KEY = "grpc-status-details-bin"

# Clients refuse response headers over 8 KiB. The message travels twice (percent-encoded on its own
# and in the details, which grow by a third in base64), so both are cut well below that.
MAX_MESSAGE_BYTES = 800
MAX_VIOLATION_BYTES = 3000
MAX_METADATA_BYTES = 600


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


def _bad_request(
    violations: tuple[tuple[str, str], ...], count: int
) -> error_details_pb2.BadRequest:
    """The fields at fault that fit; ``count`` are there in all."""
    detail = error_details_pb2.BadRequest()
    used = 0
    for index, (field, description) in enumerate(violations):
        field, description = _shortened(field, 200), _shortened(description, 400)
        used += len(field.encode()) + len(description.encode()) + 8
        if used > MAX_VIOLATION_BYTES:
            detail.field_violations.add(field="*", description=f"and {count - index} more")
            break
        detail.field_violations.add(field=field, description=description)
    return detail


def to_rich_status(fault: Fault) -> status_pb2.Status:
    """The ``google.rpc.Status`` of a fault, cut to what fits into the headers of an answer."""
    status = status_pb2.Status(
        code=fault.code.value, message=_shortened(fault.message, MAX_MESSAGE_BYTES)
    )
    info = error_details_pb2.ErrorInfo(reason=fault.reason, domain=ERROR_DOMAIN)
    room = MAX_METADATA_BYTES
    for key, value in fault.metadata.items():
        shown = _shortened(str(value), 200)
        room -= len(key) + len(shown.encode())
        if room < 0:
            break
        info.metadata[key] = shown
    status.details.add().Pack(info)
    if fault.violations:
        count = int(fault.metadata.get(VIOLATION_COUNT, len(fault.violations)))
        status.details.add().Pack(_bad_request(fault.violations, count))
    if fault.retry_after_seconds is not None:
        wait = duration_pb2.Duration()
        wait.FromNanoseconds(round(fault.retry_after_seconds * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=wait))
    return status
