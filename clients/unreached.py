"""Why no turret server was reached, and what to do: in a program's words, and in the command's."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass

# IPv6 hosts without brackets, of which no part is a port, are gRPC's to judge.
_HOST_PORT = re.compile(
    r"(dns:(//[^/]*/)?)?(?P<host>\[[^\]]*\]|[^:\[\]]+):(?P<port>[^:]*)", re.DOTALL
)
_NO_PORT = ": the port is missing"
# What stands before a colon without being a host.
_SCHEMES = ("unix", "unix-abstract", "dns", "ipv4", "ipv6", "vsock", "xds", "google-c2p")
_MAX_PORT = 65535
_PORT_DIGITS = re.compile(r"0*([0-9]{1,5})")


@dataclass(frozen=True, slots=True)
class _Cause:
    """One cause.

    Attributes:
        signs: Parts of what gRPC says.
        meaning: What it means of ``subject``.
        step: What to do about it.
        flags: The same with the flags of the command.
        subject: That which answers at the address.
    """

    signs: tuple[str, ...]
    meaning: str
    step: str
    flags: str
    subject: str = "what answers at"


# What gRPC also says of a connection that ends as soon as it is made, as one without TLS does to a
# server that wants it.
_CLOSED = "Socket closed"
# And of one that ends with its server, in the middle of a call.
_LOGGED = "the log of one that went away says why"
_BROKE = "the connection broke"
_AGAIN = "ask again; if it stays away, the server's log says why"
_CLOSES = _Cause(
    (_CLOSED,),
    "closes the connection",
    f"a server with TLS wants tls=Tls(...), {_LOGGED}",
    f"a server with TLS wants --tls or --tls-ca, {_LOGGED}",
)
# To who has given TLS already: a server that asks for a certificate says no more than that.
_WANTS_MORE = _Cause(
    (),
    _CLOSES.meaning,
    f"a server with --tls-client-ca wants Tls(certificate=..., key=...) too, {_LOGGED}",
    f"a server with --tls-client-ca wants --tls-cert and --tls-key too, {_LOGGED}",
)
_WANTS_ANOTHER = _Cause(
    (),
    _CLOSES.meaning,
    f"a server with --tls-client-ca wants a certificate= that one of those vouches for, {_LOGGED}",
    f"a server with --tls-client-ca wants a --tls-cert that one of those vouches for, {_LOGGED}",
)
_ANSWERED = (
    _Cause(
        ("Failed parsing HTTP/2", "http1.x server", "HTTP/1."),
        "does not speak gRPC",
        "the address is that of `turret serve --address` (port 50051 by default), not that of HTTP",
        "--address takes the address that `turret serve --address` has (port 50051 by default), not"
        " that of HTTP",
    ),
    _Cause(
        ("security handshaker",),
        "was asked nothing: a certificate or key that was given cannot be read",
        "ca, certificate and key are whole PEM files, and the key is the certificate's",
        "--tls-ca, --tls-cert and --tls-key take whole PEM files, and the key is the certificate's",
        subject="the server at",
    ),
    _Cause(
        ("WRONG_VERSION_NUMBER",),
        "speaks no TLS",
        "leave tls out",
        "leave --tls, --tls-ca and TURRET_TLS_CA out",
    ),
    _Cause(
        ("CERTIFICATE_VERIFY_FAILED",),
        "shows a certificate that the given roots do not vouch for",
        "Tls.from_files(ca=...) takes the PEM file of those that do",
        "--tls-ca names the PEM file of those that do",
    ),
    _Cause(
        ("Hostname Verification",),
        "shows a certificate for another name",
        "Tls(server_name=...) says for which",
        "--tls-server-name says for which",
    ),
    _CLOSES,
    _WANTS_MORE,
    _WANTS_ANOTHER,
)
_STARTS = "`turret serve` starts one"
_NOTHING = _Cause((), "", _STARTS, f"{_STARTS}, --address or TURRET_ADDRESS names another")


def why_unreached(place: str, said: str) -> str:
    """What it means, with what to do.

    Args:
        place: Where a server was looked for.
        said: gRPC's reason.
    """
    for cause in _ANSWERED:
        if any(sign in said for sign in cause.signs):
            return f"{cause.subject} {place} {cause.meaning}; {cause.step}"
    return f"no turret server answers at {place} ({said}); {_NOTHING.step}"


def is_of_what_answers(message: str) -> bool:
    """Whether a message of :func:`why_unreached` is of something that listens there."""
    return not is_broken(message) and any(message.endswith(cause.step) for cause in _ANSWERED)


def broken(said: str) -> str:
    """What a connection that was there and broke means, with what to do; ``said`` is gRPC's."""
    tls = f"; {_CLOSES.step}" if said == _CLOSED else ""
    return f"{_BROKE} ({said}); {_AGAIN}{tls}"


def over_tls(message: str, *, shows_certificate: bool) -> str:
    """A message of a connection that was closed, to who has given TLS."""
    if not message.endswith(_CLOSES.step):
        return message
    cause = _WANTS_ANOTHER if shows_certificate else _WANTS_MORE
    return message.removesuffix(_CLOSES.step) + cause.step


def is_broken(message: str) -> bool:
    """Whether a message is of :func:`broken`."""
    return message.startswith(_BROKE)


def in_flags(message: str, address: str) -> str:
    """The message of an unreached server as the command says it.

    Args:
        message: Of :func:`why_unreached`, or what gRPC says where nothing is known of it.
        address: As it was given.
    """
    if message.endswith(_AGAIN):
        return message
    causes = (*_ANSWERED, _NOTHING)
    if not any(message.endswith(cause.step) for cause in causes):
        message = why_unreached(address, message)
    found = next(cause for cause in causes if message.endswith(cause.step))
    return message.removesuffix(found.step) + found.flags


def address_problem(address: str, *, has_tls: bool) -> str:
    """What is wrong with an address at which there can be no server; empty where there may be one.

    Without a port gRPC takes 443, which is where servers with TLS may be. Of others with a colon,
    such as unix:PATH and dns:///NAME, gRPC knows best.
    """
    scheme, colon, rest = address.partition(":")
    is_scheme = colon and scheme in _SCHEMES
    if is_scheme and not rest.strip("/"):
        wanted = "a path, as unix:/run/turret.sock" if scheme == "unix" else "an address behind it"
        return f"{scheme}: needs {wanted}"
    if scheme.startswith("unix"):
        return ""
    problem = ""
    if any(each.isspace() or not each.isprintable() for each in address):
        problem = ": it holds a blank"
    elif rest.startswith("//") and not is_scheme:
        problem = f": leave {scheme}:// out"
    elif "," in address and not is_scheme:
        problem = ": a list of addresses begins with ipv4: or ipv6:"
    elif address.startswith("[]") or (colon and not scheme and ":" not in rest):
        problem = ": the host is missing"
    elif (found := _HOST_PORT.fullmatch(address)) and found["host"] not in _SCHEMES:
        problem = _port_problem(found["port"])
    elif not address or not (has_tls or colon):
        problem = _NO_PORT
    return f"{address!r} is not HOST:PORT{problem}" if problem else ""


def _port_problem(port: str) -> str:
    """What is wrong with what follows the last colon; empty where gRPC takes it."""
    if not port:
        return _NO_PORT
    digits = _PORT_DIGITS.fullmatch(port)
    # gRPC would dial what is left of a number's division by 65536.
    if (digits is not None and int(digits[1]) <= _MAX_PORT) or _is_service(port):
        return ""
    return f" with a port from 0 to {_MAX_PORT}"


def _is_service(port: str) -> bool:
    """Whether it is the name of a port, such as ``http``; gRPC knows two that no file need name."""
    if port in ("http", "https"):
        return True
    try:
        socket.getservbyname(port, "tcp")
    except (OSError, UnicodeError, ValueError):
        return False
    return True
