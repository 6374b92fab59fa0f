"""Tokens of an answer become text, one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers.decoders import DecodeStream

from turret.server.basics import channels
from turret.server.basics.work import PANICS_ARE_ERRORS


class TokenStream:
    """Decodes one sequence token by token.

    Text appears only when complete: a character that spans several byte tokens comes with its last
    one, and word-initial spaces are right.

    Args:
        backend: The tokenizer.
        shown: Special tokens that are text, by their ids; the others are none.
    """

    def __init__(self, backend: Any, shown: Mapping[int, str]) -> None:
        self._backend = backend
        self._shown = shown
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that became certain (often one word, sometimes none)."""
        with PANICS_ARE_ERRORS:
            text = self._stream.step(self._backend, token_id) or ""
        return text + self._shown[token_id] if token_id in self._shown else text


class SaidStream(TokenStream):
    """Keeps only the messages meant for the user, for answers in channels.

    An answer that begins with no mark is text from its beginning, as one is that had to match
    something else.

    Args:
        backend: The tokenizer.
        marks: Special tokens of channels, by their ids.
    """

    def __init__(self, backend: Any, marks: Mapping[int, str]) -> None:
        super().__init__(backend, {})
        self._marks = marks
        # Text of the current message's header so far; None outside a header.
        self._header: str | None = None
        self._is_said = True

    def push(self, token_id: int) -> str:
        text, mark = super().push(token_id), self._marks.get(token_id)
        if mark == channels.MESSAGE:
            self._is_said = channels.Header.parse(self._header or "").is_said
            self._header = None
        elif mark in channels.ENDS:
            self._header = ""
        elif mark is not None:
            self._header = (self._header or "") + mark
        elif self._header is not None:
            self._header += text
        elif self._is_said:
            return text
        return ""
