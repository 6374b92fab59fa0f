"""What to do next about an error, in the terms of the command."""

from __future__ import annotations

from collections.abc import Mapping

# Like turret.clients.hints.HINTS, for the command line. A reason that is not here has no hint.
# Braces may also name flags.
HINTS: Mapping[str, str] = {
    "ADAPTER_NOT_FOUND": "`turret adapters list` shows the registered adapters",
    "ADAPTER_EXISTS": "`turret adapters unload {adapter}` frees the name, `turret adapters replace`"
    " and `upload --replace` install other weights",
    "ADAPTER_CLASSIFIES": "use `turret classify` or `turret eval --classify`",
    "HEAD_MISSING": "use `turret generate` or `turret score` for text",
    "ADAPTER_PINNED": "run `turret adapters unpin {adapter}` first",
    "ADAPTER_BUSY": "--force ends these requests",
    "ADAPTER_MERGED": "run `turret adapters unmerge` first",
    "MERGE_ACTIVE": "run `turret adapters unmerge` first",
    "UNAUTHENTICATED": "pass a token of the server's --token-file with --token, --token-from or"
    " TURRET_TOKEN",
    "SERVICE_ELSEWHERE": "pass that address with --address or TURRET_ADDRESS",
    "SERVER_STARTING": "`turret health --wait 600` returns when the server is ready",
    "DEADLINE_EXCEEDED": "--timeout was {timeout}",
    "UNIMPLEMENTED": "check that {address} is a turret server of this version, and not a proxy",
    "NOT_REACHED": "`turret serve` starts a server; --address or TURRET_ADDRESS selects another",
    "NOT_GRPC": "pass the address of `turret serve --address` (port 50051 by default), not that of"
    " --http-address",
    "PEM_UNREADABLE": "--tls-ca, --tls-cert and --tls-key must be PEM files, and the key must be"
    " that of the certificate",
    "TLS_UNSUPPORTED": "leave out --tls, --tls-ca and TURRET_TLS_CA",
    "CERTIFICATE_UNTRUSTED": "pass the roots that signed it with --tls-ca",
    "CERTIFICATE_NAME": "pass the certificate's name with --tls-server-name",
    "CONNECTION_CLOSED": "a server with TLS needs --tls or --tls-ca; otherwise see the"
    " server's log",
    "CLIENT_CERTIFICATE": "a server with --tls-client-ca needs a --tls-cert and --tls-key that its"
    " roots signed; otherwise see the server's log",
    "CONNECTION_LOST": "run it again; if this repeats, see the server's log",
    "REQUEST_TOO_LARGE": "shorten the prompt, or spread several texts over several calls",
    "ANSWER_TOO_LARGE": "ask for less of it (--top-n, --logprobs), or for fewer texts in a call",
}
