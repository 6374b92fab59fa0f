"""Advice on errors, in the terms of a Python program or of the command."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Reason → hint. Braces take values of the error's metadata.
HINTS: Mapping[str, str] = {
    "ADAPTER_NOT_FOUND": "adapters.list() returns the registered adapters",
    "ADAPTER_EXISTS": "replace it with adapters.replace(), or remove it with adapters.unload()",
    "ADAPTER_CLASSIFIES": "call classify()",
    "ADAPTER_PINNED": "call adapters.unpin() first",
    "ADAPTER_BUSY": 'mode="force" ends these requests',
    "MERGE_ACTIVE": "call adapters.unmerge() first",
    "UNAUTHENTICATED": "pass a token of the server's --token-file as token=",
    "SERVICE_ELSEWHERE": "pass both address= and admin_address= to the client",
    "SERVER_STARTING": "pass a larger max_retries= to the client to wait for the server",
    "DEADLINE_EXCEEDED": "raise timeout=, which was {timeout}",
    "NOT_REACHED": "start one with `turret serve`",
    "NOT_GRPC": "use the address of `turret serve --address` (port 50051 by default), not that of"
    " --http-address",
    "CONNECTION_CLOSED": "pass tls=Tls(...) if the server has TLS",
    "REQUEST_TOO_LARGE": "shorten the prompt, or spread several inputs over several calls",
    "ANSWER_TOO_LARGE": "lower top_n or logprobs, or pass fewer inputs in a call",
}
# The same for the command line, where braces may also name flags. Reasons that are not listed have
# no hint.
COMMAND_HINTS: Mapping[str, str] = {
    "ADAPTER_NOT_FOUND": "`turret adapters list` shows the registered adapters",
    "ADAPTER_EXISTS": "replace it with `turret adapters replace` or `upload --replace`, or remove"
    " it with `turret adapters unload {adapter}`",
    "ADAPTER_CLASSIFIES": "use `turret classify` or `turret eval --classify`",
    "ADAPTER_PINNED": "run `turret adapters unpin {adapter}` first",
    "ADAPTER_BUSY": "--force ends these requests",
    "MERGE_ACTIVE": "run `turret adapters unmerge` first",
    "UNAUTHENTICATED": "pass a token of the server's --token-file with --token, --token-from or"
    " TURRET_TOKEN",
    "SERVICE_ELSEWHERE": "pass that address with --address or TURRET_ADDRESS",
    "SERVER_STARTING": "`turret health --wait 600` returns when the server is ready",
    "DEADLINE_EXCEEDED": "raise --timeout, which was {timeout}",
    "NOT_REACHED": "start one with `turret serve`",
    "NOT_GRPC": "pass the address of `turret serve --address` (port 50051 by default), not that of"
    " --http-address",
    "CONNECTION_CLOSED": "pass --tls or --tls-ca if the server has TLS",
    "REQUEST_TOO_LARGE": "shorten the prompt, or spread several texts over several calls",
    "ANSWER_TOO_LARGE": "lower --top-n or --logprobs, or pass fewer texts in a call",
}
# The message of an error with one of these keys already says what to do.
_ANSWERS = ("closest", "current_generation", "alias")


def hint_for(key: str, metadata: Mapping[str, str], hints: Mapping[str, str], **known: Any) -> str:
    """The next step; empty if none is certain.

    Args:
        key: The reason of an error, or the name of its status if it has none.
        metadata: The error's metadata.
        hints: The table for the interface: ``HINTS`` or ``COMMAND_HINTS``.
        known: More values for the braces of a hint.
    """
    if any(name in metadata for name in _ANSWERS):
        return ""
    try:
        given = {name: value for name, value in known.items() if value is not None}
        return hints.get(key, "").format_map({**given, **metadata})
    except KeyError:
        return ""
