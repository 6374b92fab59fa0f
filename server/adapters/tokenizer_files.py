"""A tokenizer that an adapter brings, unread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """Files of a tokenizer, by name, as transformers may be given them.

    Attributes:
        files: ``tokenizer.json`` is among them.
        digest: SHA-256 over all of them as they were read, hex.
        bytes_disk: Size of all of them as they were read.
    """

    files: Mapping[str, bytes]
    digest: str
    bytes_disk: int
