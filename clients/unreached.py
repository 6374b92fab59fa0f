"""The reasons why gRPC reached no turret server."""

from __future__ import annotations

import re

import grpc

from turret.clients.words import say

# gRPC reports its own failures only as text. The patterns from here to cause_of() match that text,
# never a message of turret's.
_FAILED = re.compile(
    r"failed to connect to all addresses; last error: [A-Z_]+: (?:ipv[46]:)?(?P<place>.*?):"
    r" (?:Failed to connect to remote host: )?(?P<why>.*)",
    re.DOTALL,
)
_UNRESOLVED = re.compile(r"errors resolving (?P<place>\S+): \[")
_TOO_LARGE = re.compile(
    r"(?P<end>SERVER: |CLIENT: )?Received message larger than max \((\d+) vs\. (\d+)\)"
)
# Messages for calls that the caller itself ended.
_OWN_DOING = re.compile("Locally cancelled|Channel closed|Channel is closed")
# Messages for a server, or a proxy in front of it, that vanished without a status. The last one is
# HAProxy's, for a server that is gone.
_LOST = re.compile(
    "RST_STREAM|Stream removed|GOAWAY|Connection reset|Socket closed|http2 header with status: 500"
)
# Failures of a connection to something that listens: pattern → reason.
_ANSWERED = {
    r"Failed parsing HTTP/2|http1\.x server|HTTP/1\.": "NOT_GRPC",
    "handshake|Hostname Verification": "TLS_FAILED",
    # A server with TLS closes the connections of clients without TLS or without a required
    # certificate.
    "Socket closed": "CONNECTION_CLOSED",
}
# Reasons for calls that no turret server accepted: something else listens at the address, nothing
# does, or the connection or the answer was interrupted.
UNREACHED = frozenset((*_ANSWERED.values(), "NOT_REACHED", "CONNECTION_LOST", "ANSWER_CUT"))


def cause_of(code: grpc.StatusCode, said: str) -> tuple[grpc.StatusCode, str, str]:
    """Status, reason and message for a failure that no turret server has described.

    Args:
        code: The code that gRPC reports.
        said: gRPC's own message.
    """
    status = grpc.StatusCode
    if found := _TOO_LARGE.search(said):
        sizes = {"size": found[2], "most": found[3]}
        if found["end"] == "CLIENT: ":
            return status.INVALID_ARGUMENT, "ANSWER_TOO_LARGE", say("ANSWER_TOO_LARGE", **sizes)
        return status.INVALID_ARGUMENT, "REQUEST_TOO_LARGE", say("REQUEST_ABOVE_LIMIT", **sizes)
    if code is status.DEADLINE_EXCEEDED:
        return code, "", say("NOT_IN_TIME")
    if code is status.CANCELLED:
        is_lost = _OWN_DOING.search(said) is None
    else:
        is_vague = code in (status.INTERNAL, status.UNKNOWN, status.UNAVAILABLE)
        is_lost = is_vague and _LOST.search(said) is not None
    failed = _FAILED.fullmatch(said) if code is status.UNAVAILABLE else None
    if is_lost and failed is None:
        return status.UNAVAILABLE, "CONNECTION_LOST", say("CONNECTION_LOST", why=said)
    if code is not status.UNAVAILABLE:
        return code, "", say("NOT_OFFERED") if code is status.UNIMPLEMENTED else said
    if failed is not None:
        place = failed["place"].replace("%5B", "[").replace("%5D", "]")
        for pattern, reason in _ANSWERED.items():
            if re.search(pattern, failed["why"]):
                return code, reason, say(reason, place=place, why=failed["why"])
        return code, "NOT_REACHED", say("NOT_REACHED", place=place, why=failed["why"])
    if found := _UNRESOLVED.match(said):
        return code, "NOT_REACHED", say("NOT_RESOLVED", place=found["place"])
    return code, "NOT_REACHED", say("NOT_ANSWERED", why=said)
