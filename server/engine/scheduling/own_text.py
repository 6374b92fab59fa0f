"""Text as the engine sees it: a tokenizer's, the base's or that of an adapter with its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class TextStream(Protocol):
    """Decodes token by token (``server/models/tokenizer.py``)."""

    def push(self, token_id: int) -> str: ...


class Text(Protocol):
    """What the engine needs of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_token_ids(self) -> frozenset[int]: ...
    def stream(self, call_marks: bool = False, said_only: bool = False) -> TextStream: ...
    def token_text(self, token_id: int) -> str: ...


@dataclass(frozen=True, slots=True)
class OwnText:
    """The tokenizer that a request's tokens are of, where that is an adapter's.

    Attributes:
        digest: Of its files (``AdapterFacts.tokenizer``).
        text: The tokenizer.
    """

    digest: str
    text: Text
