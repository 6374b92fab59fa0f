"""Takes calls of tools from a growing answer, in each of the forms that models write them in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from turret.server.http.tools.call_reader import CallReader
from turret.server.http.tools.forms import FORMS
from turret.server.http.tools.named_reader import NamedReader
from turret.server.http.tools.pieces import Piece, Said, possible_start
from turret.server.http.tools.xml_reader import XmlReader

_Reader = CallReader | NamedReader | XmlReader
_READERS: dict[str, type[_Reader]] = {"json": CallReader, "named": NamedReader, "xml": XmlReader}
# The text that begins a call after its mark, by syntax. A name may begin with anything.
_OPENINGS = {"json": "{", "named": "", "xml": "<"}


class Calls:
    """Splits a growing text into the answer's text and calls of tools.

    What looks like a call and is none, or calls a tool that there is not, is something said.

    Args:
        form: How the model writes calls: a key of ``FORMS``.
        tools: Those there are, with their arguments' JSON schemas.
    """

    def __init__(self, form: str, tools: Mapping[str, Mapping[str, Any]]) -> None:
        self._form = FORMS[form]
        self._tools = tools
        self._held = ""
        # Text skipped as the beginning of a call, kept in case it turns out not to be one.
        self._skipped = ""
        self._reader: _Reader | None = None
        # begin: start of the answer; text; call: where a call may begin; after: behind a call.
        self._state = "begin" if self._form.is_bare else "text"
        self.count = 0

    def feed(self, text: str) -> list[Piece]:
        """The pieces that more text makes certain."""
        self._held += text
        pieces: list[Piece] = []
        while True:
            before = self._state, len(self._held), self._reader
            pieces += getattr(self, f"_in_{self._state}")()
            if before == (self._state, len(self._held), self._reader):
                return pieces

    def finish(self) -> list[Piece]:
        """The pieces that are left when the answer has ended."""
        held = self._skipped
        if self._reader is not None and not self._reader.is_begun:
            held += self._reader.held
        if self._reader is None:
            # A partial end mark after a call is not part of the text.
            is_end = self._state == "after" and self._form.end.startswith(self._held.strip())
            held += "" if is_end else self._held
        self._held = self._skipped = ""
        return [Said(held)] if held else []

    def _in_begin(self) -> list[Piece]:
        begun = self._held.lstrip()
        opening = "[" if self._form.is_list else "{"
        if begun.startswith(self._form.begin):
            self._to_call(len(self._held) - len(begun) + len(self._form.begin))
        elif begun.startswith(opening) and not self._form.begin.startswith(begun):
            self._to_call(len(self._held) - len(begun))
        elif begun and not self._form.begin.startswith(begun):
            self._state = "text"
        return []

    def _in_text(self) -> list[Piece]:
        said, found, _ = self._held.partition(self._form.begin)
        if found:
            self._held = self._held[len(said) :]
            self._to_call(len(found))
        else:
            size = len(said) - possible_start(said, self._form.begin)
            said, self._held = said[:size], said[size:]
        return [Said(said)] if said else []

    def _to_call(self, size: int) -> None:
        self._skipped, self._held = self._skipped + self._held[:size], self._held[size:]
        self._state = "call"

    def _in_call(self) -> list[Piece]:
        if self._reader is None:
            rest = self._held.lstrip()
            if self._form.is_list and not self.count and "[" not in self._after_mark():
                if rest.startswith("["):
                    self._to_call(len(self._held) - len(rest) + 1)
                elif rest:
                    return self._take_back("")
                return []
            if not rest:
                return []
            if not rest.startswith(_OPENINGS[self._form.syntax]):
                return self._take_back("")
            self._skipped += self._held[: len(self._held) - len(rest)]
            self._held = rest
            self._reader = _READERS[self._form.syntax](self.count, self._tools)
        reader, held, self._held = self._reader, self._held, ""
        pieces = reader.feed(held)
        if reader.is_begun:
            self._skipped = ""
        if reader.is_none:
            self._reader = None
            return self._take_back(reader.held)
        if reader.is_done:
            self._held, self._reader = reader.held, None
            self.count += 1
            self._state = "after"
        return pieces

    def _after_mark(self) -> str:
        return self._skipped.rpartition(self._form.begin)[2]

    def _take_back(self, read: str) -> list[Piece]:
        """Treat text that looked like a call as text of the answer."""
        said, self._skipped = self._skipped + read, ""
        self._state = "text"
        return [Said(said)] if said else []

    def _in_after(self) -> list[Piece]:
        form, rest = self._form, self._held.lstrip()
        if form.end:
            if rest.startswith(form.end):
                self._held, self._state = rest.removeprefix(form.end).lstrip(), "between"
            elif rest and not form.end.startswith(rest):
                self._state = "text"
            return []
        if rest and rest[0] in form.separators:
            self._held, self._state = rest[1:], "call"
        elif rest.startswith("{") and form.syntax == "json" and not form.is_list:
            self._held, self._state = rest, "call"
        elif rest.startswith("]") and form.is_list:
            self._held, self._state = rest[1:], "between"
        elif form.syntax == "named":
            self._state = "between"
        elif rest:
            self._state = "text"
        return []

    def _in_between(self) -> list[Piece]:
        """Drop blanks between calls, which are not text of the answer."""
        self._held = self._held.lstrip()
        if self._held:
            self._state = "text"
        return []
