"""What an adapter may be called."""

from __future__ import annotations

import re

# What the base model is called over HTTP, whatever its own name.
BASE = "base"
# By RPC and by --preload.
ADAPTER_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,126}[a-z0-9])?")
# The same, for who reads no regular expressions.
_RULE = (
    "must be at most 128 lower-case letters, digits, '.', '_' and '-', with a letter or digit at"
    " either end"
)
_SHOWN_CHARS = 40


def no_adapter_name(name: str) -> str:
    """What is wrong with what was given as an adapter's name; empty if nothing is."""
    if ADAPTER_NAME.fullmatch(name):
        return ""
    if not name:
        return f"is empty; a name {_RULE}"
    shown = name if len(name) <= _SHOWN_CHARS else f"{name[:_SHOWN_CHARS]}..."
    return f"{shown!r} is no adapter name: {_RULE}"
