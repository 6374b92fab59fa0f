"""The reasons why gRPC reached no turret server, and the check of addresses."""

from __future__ import annotations

import re
import socket

import grpc

from turret.clients.words import Text, say

# Leave IPv6 hosts without brackets, in which no part is a port, to gRPC.
_HOST_PORT = re.compile(
    r"(dns:(//[^/]*/)?)?(?P<host>\[[^\]]*\]|[^:\[\]]+):(?P<port>[^:]*)", re.DOTALL
)
# Schemes of addresses, which are not hosts.
_SCHEMES = ("unix", "unix-abstract", "dns", "ipv4", "ipv6", "vsock", "xds", "google-c2p")
_MAX_PORT = 65535
_PORT_DIGITS = re.compile(r"0*([0-9]{1,5})")

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
    "security handshaker": "PEM_UNREADABLE",
    "WRONG_VERSION_NUMBER": "TLS_UNSUPPORTED",
    "CERTIFICATE_VERIFY_FAILED": "CERTIFICATE_UNTRUSTED",
    "Hostname Verification": "CERTIFICATE_NAME",
    # A server with TLS closes the connections of clients without TLS or without a required
    # certificate.
    "Socket closed": "CONNECTION_CLOSED",
}
# Reasons for calls that no turret server accepted. For those in ANSWERED, something else listens at
# the address. UNREACHED also includes those where nothing listens, or where the connection or the
# answer was interrupted.
ANSWERED = frozenset(("CLIENT_CERTIFICATE", *_ANSWERED.values()))
UNREACHED = ANSWERED | {"NOT_REACHED", "CONNECTION_LOST", "ANSWER_CUT"}


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
        return code, "", said
    if failed is not None:
        place = failed["place"].replace("%5B", "[").replace("%5D", "]")
        for pattern, reason in _ANSWERED.items():
            if re.search(pattern, failed["why"]):
                return code, reason, say(reason, place=place)
        return code, "NOT_REACHED", say("NOT_REACHED", place=place, why=failed["why"])
    if found := _UNRESOLVED.match(said):
        return code, "NOT_REACHED", say("NOT_RESOLVED", place=found["place"])
    return code, "NOT_REACHED", say("NOT_ANSWERED", why=said)


def address_problem(address: str, *, has_tls: bool) -> Text | None:
    """The reason why no server can be at an address; None if one can.

    Without a port, gRPC uses 443, where servers with TLS may listen. gRPC itself checks other forms
    with a colon, such as dns:///NAME.
    """
    scheme, colon, rest = address.partition(":")
    is_scheme = colon and scheme in _SCHEMES
    if is_scheme and not rest.strip("/"):
        is_path = scheme == "unix"
        return say("SCHEME_WITHOUT_PATH" if is_path else "SCHEME_WITHOUT_ADDRESS", scheme=scheme)
    if scheme.startswith("unix"):
        return None
    if any(each.isspace() or not each.isprintable() for each in address):
        return say("ADDRESS_WITH_SPACE", value=address)
    if rest.startswith("//") and not is_scheme:
        return say("ADDRESS_WITH_SCHEME", value=address, scheme=f"{scheme}://")
    if "," in address and not is_scheme:
        return say("ADDRESS_LIST", value=address)
    if address.startswith("[]") or (colon and not scheme and ":" not in rest):
        return say("ADDRESS_WITHOUT_HOST", value=address)
    if (found := _HOST_PORT.fullmatch(address)) and found["host"] not in _SCHEMES:
        return _port_problem(address, found["port"])
    if not address or not (has_tls or colon):
        return say("ADDRESS_WITHOUT_PORT", value=address)
    return None


def _port_problem(address: str, port: str) -> Text | None:
    """The fault in the port after the last colon; None if gRPC accepts it."""
    if not port:
        return say("ADDRESS_WITHOUT_PORT", value=address)
    digits = _PORT_DIGITS.fullmatch(port)
    # gRPC would use a larger number modulo 65536.
    if (digits is not None and int(digits[1]) <= _MAX_PORT) or _is_service(port):
        return None
    return say("PORT_NOT_IN_RANGE", value=address, most=_MAX_PORT)


def _is_service(port: str) -> bool:
    """Whether a text names a port, such as ``http``. gRPC knows two names without a file."""
    if port in ("http", "https"):
        return True
    try:
        socket.getservbyname(port, "tcp")
    except (OSError, UnicodeError, ValueError):
        return False
    return True
