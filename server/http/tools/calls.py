"""Finds tool calls in a streamed answer, in each of the formats that models use."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from turret.server.basics.codes import CHANNEL
from turret.server.words import Text


@dataclass(frozen=True, slots=True)
class Said:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """Text of the reasoning before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """The beginning of a tool call: the answer's ``index``-th, counted from 0.

    ``call_id`` is empty unless the model wrote an id; ``reader.py`` then creates one.
    """

    index: int
    name: str
    call_id: str = ""


@dataclass(frozen=True, slots=True)
class CallGrown:
    """The next piece of a call's arguments, which are JSON."""

    index: int
    text: str


AnswerPiece = Said | Thought | CallBegun | CallGrown


def possible_start(text: str, mark: str) -> int:
    """The number of characters at the end of ``text`` that may begin ``mark``."""
    for size in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:size]):
            return size
    return 0


@dataclass(frozen=True, slots=True)
class Form:
    """How a model writes calls.

    Attributes:
        begin: The mark before the first call of an answer, or before each one.
        end: The mark after a call, if there is one.
        separators: Characters that may separate two calls.
        is_bare: Whether an answer may begin with a call without ``begin``.
        is_list: Whether calls are entries of a JSON list.
        parameters: The name of the field with the arguments.
        syntax: The syntax of a call: ``{"name": ..., "arguments": {...}}`` (json), a name and then
            the arguments (named), ``<function=NAME>`` with a ``<parameter=NAME>`` for each (xml),
            or a message to the tool (channels; see ``server/basics/codes.py``).
    """

    begin: str
    end: str = ""
    separators: str = ""
    is_bare: bool = False
    is_list: bool = False
    parameters: str = "arguments"
    syntax: Literal["json", "named", "xml", "channels"] = "json"


FORMS = {
    "hermes": Form("<tool_call>", "</tool_call>"),
    # Qwen3-Coder and later Qwen models.
    "xml": Form("<tool_call>", "</tool_call>", syntax="xml"),
    "llama3": Form("<|python_tag|>", separators=";", is_bare=True, parameters="parameters"),
    "mistral": Form("[TOOL_CALLS]", separators=",", is_bare=True, is_list=True),
    # Mistral's tokenizers, since version 11, write a mark before each call instead of a list.
    "mistral11": Form("[TOOL_CALLS]", syntax="named"),
    # gpt-oss: a call ends the answer.
    "harmony": Form(CHANNEL, syntax="channels"),
}
# Marks of ``mistral11``: before the id of a call, and before its arguments.
CALL_ID, ARGUMENTS = "[CALL_ID]", "[ARGS]"


_KINDS_OF_TYPES = {
    **{str: "string", int: "number", float: "number", bool: "boolean"},
    **{type(None): "null", list: "array", dict: "object"},
}
KINDS = frozenset(_KINDS_OF_TYPES.values())
# Limits on what is followed for the type of one value. Otherwise, alternatives that refer to each
# other could take any amount of time.
MAX_ALTERNATIVES = 32
_MAX_REFERENCE_CHARS = 256
# The same whitespace as between the tokens of any constrained JSON.
_BLANKS = {"whitespace_flexible": True, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,32}"}


class UnenforceableError(Exception):
    """A grammar cannot enforce the schema of a tool's parameters.

    Args:
        tool: The tool's name.
        path: The faulty part of the schema, with a dot before each step.
        text: The fault.
    """

    def __init__(self, tool: str, path: str, text: Text) -> None:
        super().__init__(text)
        self.tool = tool
        self.path = path
        self.text = text


def json_rule(schema: Mapping[str, Any]) -> str:
    """The right side of a grammar rule, on one line, for JSON that matches a schema."""
    return f"%json {json.dumps({**schema, 'x-guidance': _BLANKS})}"


def allowed_values(schema: Mapping[str, Any]) -> list[Any] | None:
    """The values that ``enum`` or ``const`` allows; None if neither restricts the value."""
    if isinstance(schema.get("enum"), list):
        return schema["enum"]
    return [schema["const"]] if "const" in schema else None


def kinds_of(schema: Any, root: Any) -> frozenset[str]:
    """The JSON types that a value may have, ``integer`` counted as ``number``.

    Args:
        schema: The value's schema. A value whose schema is invalid counts as a string, and so does
            a value with more than ``MAX_ALTERNATIVES`` schemas.
        root: The schema in which ``#/...`` references are looked up.
    """
    found: set[str] = set()
    followed: list[Any] = []
    left = [schema]
    while left:
        one = left.pop()
        # References and alternatives can form circles.
        if any(one is each for each in followed):
            continue
        if len(followed) == MAX_ALTERNATIVES:
            return frozenset((*found, "string"))
        followed.append(one)
        if not isinstance(one, dict):
            found.add("string")
        elif "$ref" in one:
            left.append(resolved(one["$ref"], root))
        elif (values := allowed_values(one)) is not None:
            found.update(_KINDS_OF_TYPES[kind] for kind in set(map(type, values)))
        elif one.get("type") is not None:
            named = one["type"] if isinstance(one["type"], list) else [one["type"]]
            names = {"number" if name == "integer" else str(name) for name in named}
            found |= names & KINDS or {"string"}
        else:
            joined = (one.get(key) for key in ("anyOf", "oneOf", "allOf"))
            members = next((each for each in joined if isinstance(each, list) and each), None)
            if members is None:
                found |= KINDS
            else:
                left += members[: MAX_ALTERNATIVES + 1]
    return frozenset(found or {"string"})


def resolved(reference: Any, root: Any) -> Any:
    """The target of a reference within a schema, or None."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    if len(reference) > _MAX_REFERENCE_CHARS:
        return None
    found = root
    for part in reference[1:].split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, dict):
            return None
        found = found.get(part)
    return found


def kind_of(value: Any) -> str:
    """The JSON type of a parsed value, without ``integer``."""
    return _KINDS_OF_TYPES[type(value)]


_JSON_HEAD = re.compile(
    r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_JSON_TAIL = re.compile(r"\s*\}")


class ObjectEnd:
    """Finds the end of a JSON object whose text arrives in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def find(self, text: str) -> int | None:
        """The offset in the next piece after the closing bracket; None if it has yet to come."""
        for place, character in enumerate(text):
            if self._in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif character == "\\":
                    self._is_escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return place + 1
        return None


class CallReader(ABC):
    """Reads one call, in one of the formats.

    Args:
        index: The call's number in the answer, from 0.
        tools: The JSON schema of the arguments of each known tool.

    Attributes:
        is_begun: Whether the call's name is known.
        is_done: Whether the call is complete.
        is_none: Whether the text turned out not to be a call. ``held`` then contains all of it.
        held: Text that has not been read yet. After a complete call, the text that follows it.
    """

    def __init__(self, index: int, tools: Mapping[str, Mapping[str, Any]]) -> None:
        self._index = index
        self._tools = tools
        self._arguments = ObjectEnd()
        self.is_begun = self.is_done = self.is_none = False
        self.held = ""

    def feed(self, text: str) -> list[AnswerPiece]:
        """Append text, and return the pieces that are now certain."""
        self.held += text
        pieces = [] if self.is_begun else self._begin()
        grown = self._grow() if self.is_begun and not self.is_done else ""
        return [*pieces, CallGrown(self._index, grown)] if grown else pieces

    def _object(self) -> tuple[str, bool]:
        """More of arguments that are already a JSON object, and whether the object has ended."""
        end = self._arguments.find(self.held)
        grown = self.held[:end]
        self.held = self.held[len(grown) :]
        return grown, end is not None

    @abstractmethod
    def _begin(self) -> list[AnswerPiece]:
        """The pieces of a call once its name is known."""

    @abstractmethod
    def _grow(self) -> str:
        """More of the arguments."""


class JsonReader(CallReader):
    """Reads a call that begins with its opening bracket."""

    def __init__(self, index: int, tools: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(index, tools)
        self._whole = ObjectEnd()
        self._num_looked_at = 0
        self._is_closing = False

    def _begin(self) -> list[AnswerPiece]:
        head = _JSON_HEAD.match(self.held)
        if head is not None:
            name = _loaded(head[1])
            if name not in self._tools:
                self.is_none = True
                return []
            self.held = self.held[head.end() :]
            self.is_begun = True
            return [CallBegun(self._index, name)]
        # The fields may be in another order. If so, read the call as a whole.
        end = self._whole.find(self.held[self._num_looked_at :])
        if end is None:
            self._num_looked_at = len(self.held)
            return []
        end += self._num_looked_at
        call = _loaded(self.held[:end])
        name = call.get("name") if isinstance(call, dict) else None
        if not isinstance(name, str) or name not in self._tools:
            self.is_none = True
            return []
        arguments = call.get("arguments", call.get("parameters", {}))
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        self.held = self.held[end:]
        self.is_begun = self.is_done = True
        return [CallBegun(self._index, name), CallGrown(self._index, arguments)]

    def _grow(self) -> str:
        grown = ""
        if not self._is_closing:
            grown, self._is_closing = self._object()
        if self._is_closing and (tail := _JSON_TAIL.match(self.held)):
            self.held = self.held[tail.end() :]
            self.is_done = True
        return grown


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


_NAMED_HEAD = re.compile(
    r"\s*([A-Za-z0-9_.-]+)\s*"
    rf"(?:{re.escape(CALL_ID)}\s*([A-Za-z0-9_-]+)\s*)?"
    rf"(?:{re.escape(ARGUMENTS)})?\s*(?=\{{)"
)
# Longer than any name with its id and marks.
_MAX_HEAD_CHARS = 256


class NamedReader(CallReader):
    """Reads a call that begins with its name."""

    def _begin(self) -> list[AnswerPiece]:
        head = _NAMED_HEAD.match(self.held)
        if head is None or head[1] not in self._tools:
            self.is_none = "{" in self.held or len(self.held) > _MAX_HEAD_CHARS
            return []
        self.held = self.held[head.end() :]
        self.is_begun = True
        return [CallBegun(self._index, head[1], head[2] or "")]

    def _grow(self) -> str:
        grown, self.is_done = self._object()
        return grown


_XML_BEGIN, _XML_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_ONLY_TEXT = frozenset({"string"})
_XML_HEAD = re.compile(rf"\s*{_XML_BEGIN}([^<>\n]{{1,64}})>")
_XML_NEXT = re.compile(rf"\s*(?:{_PARAMETER}([^<>\n]+)>(?:\n|(?=[^\n]))|{_XML_END})")


class XmlReader(CallReader):
    """Reads a call that begins with ``<function=``, and returns its arguments as JSON.

    A parameter's value is plain text between tags; the tool's schema determines its type. Strings
    are returned as they arrive, other values once they are complete.
    """

    def __init__(self, index: int, tools: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(index, tools)
        self._schema: Mapping[str, Any] = {}
        self._num_parameters = 0
        # Kinds of values that the current parameter may have; None between parameters.
        self._kinds: frozenset[str] | None = None

    def _begin(self) -> list[AnswerPiece]:
        head = _XML_HEAD.match(self.held)
        if head is None:
            begun = self.held.lstrip()
            is_open = begun.startswith(_XML_BEGIN) and len(begun) < 80 and "\n" not in begun
            self.is_none = not (_XML_BEGIN.startswith(begun) or is_open)
            return []
        if head[1] not in self._tools:
            self.is_none = True
            return []
        self.held = self.held[head.end() :]
        self.is_begun = True
        self._schema = self._tools[head[1]]
        return [CallBegun(self._index, head[1]), CallGrown(self._index, "{")]

    def _grow(self) -> str:
        grown = ""
        while not self.is_done:
            before = len(self.held), self._kinds
            grown += self._between() if self._kinds is None else self._value(self._kinds)
            if before == (len(self.held), self._kinds):
                break
        return grown

    def _between(self) -> str:
        """The JSON up to the next value, or to the end of the call."""
        found = _XML_NEXT.match(self.held)
        if found is None:
            begun = self.held.lstrip()
            marks = (_PARAMETER, _XML_END)
            if any(mark.startswith(begun) or begun.startswith(mark) for mark in marks):
                return ""
            # If neither a parameter nor the end follows, end the call here. The rest is text.
            self.is_done = True
            return "}"
        self.held = self.held[found.end() :]
        name = found[1]
        if name is None:
            self.is_done = True
            return "}"
        properties = self._schema.get("properties")
        schema = properties.get(name) if isinstance(properties, dict) else None
        self._kinds = kinds_of(schema, self._schema)
        comma = ", " if self._num_parameters else ""
        self._num_parameters += 1
        opening = '"' if self._kinds == _ONLY_TEXT else ""
        return f"{comma}{json.dumps(name, ensure_ascii=False)}: {opening}"

    def _value(self, kinds: frozenset[str]) -> str:
        value, found, rest = self.held.partition(_PARAMETER_END)
        if found:
            # The line break before the closing tag is not part of the value.
            value = value.removesuffix("\n")
            self.held, self._kinds = rest, None
        elif kinds == _ONLY_TEXT:
            ends = (f"\n{_PARAMETER_END}", _PARAMETER_END)
            size = len(value) - max(possible_start(value, end) for end in ends)
            value, self.held = value[:size], value[size:]
        else:
            return ""
        if kinds != _ONLY_TEXT:
            return json.dumps(_meant(value, kinds), ensure_ascii=False)
        return json.dumps(value, ensure_ascii=False)[1:-1] + ('"' if found else "")


def _meant(text: str, kinds: frozenset[str]) -> Any:
    """The value of a parameter's text: parsed as JSON if possible, otherwise the text itself."""
    bare = text.strip()
    lowered = bare.lower()
    if lowered in ("true", "false", "null", "none"):
        # Accept Python's spellings too.
        bare = "null" if lowered == "none" else lowered
    try:
        value = json.loads(bare)
    except (ValueError, RecursionError):
        return text
    if "string" in kinds and kind_of(value) not in kinds:
        return text
    return value


_READERS: dict[str, type[CallReader]] = {
    "json": JsonReader,
    "named": NamedReader,
    "xml": XmlReader,
}
# The text that begins a call after its mark, by syntax. A name may begin with anything.
_OPENINGS = {"json": "{", "named": "", "xml": "<"}


class Calls:
    """Splits an answer that arrives in pieces into text and tool calls.

    Text that looks like a call but is not one, or calls an unknown tool, stays text.

    Args:
        form: How the model writes calls: a key of ``FORMS``.
        tools: The JSON schema of the arguments of each known tool.
    """

    def __init__(self, form: str, tools: Mapping[str, Mapping[str, Any]]) -> None:
        self._form = FORMS[form]
        self._tools = tools
        self._held = ""
        # Text that was skipped as the beginning of a call, kept in case it is not a call.
        self._skipped = ""
        self._reader: CallReader | None = None
        # begin: start of the answer; text; call: where a call may begin or continue;
        # after: after a call, before its end mark; between: after the end mark.
        self._state = "begin" if self._form.is_bare else "text"
        self.count = 0

    def feed(self, text: str) -> list[AnswerPiece]:
        """Append text, and return the pieces that are now certain."""
        self._held += text
        pieces: list[AnswerPiece] = []
        while True:
            before = self._state, len(self._held), self._reader
            pieces += getattr(self, f"_in_{self._state}")()
            if before == (self._state, len(self._held), self._reader):
                return pieces

    def finish(self) -> list[AnswerPiece]:
        """The remaining pieces, after the answer has ended."""
        held = self._skipped
        if self._reader is not None and not self._reader.is_begun:
            held += self._reader.held
        if self._reader is None:
            # A partial end mark after a call is not part of the text.
            is_end = self._state == "after" and self._form.end.startswith(self._held.strip())
            held += "" if is_end else self._held
        self._held = self._skipped = ""
        return [Said(held)] if held else []

    def _in_begin(self) -> list[AnswerPiece]:
        begun = self._held.lstrip()
        opening = "[" if self._form.is_list else "{"
        if begun.startswith(self._form.begin):
            self._to_call(len(self._held) - len(begun) + len(self._form.begin))
        elif begun.startswith(opening) and not self._form.begin.startswith(begun):
            self._to_call(len(self._held) - len(begun))
        elif begun and not self._form.begin.startswith(begun):
            self._state = "text"
        return []

    def _in_text(self) -> list[AnswerPiece]:
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

    def _in_call(self) -> list[AnswerPiece]:
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

    def _take_back(self, read: str) -> list[AnswerPiece]:
        """Treat text that looked like a call as text of the answer."""
        said, self._skipped = self._skipped + read, ""
        self._state = "text"
        return [Said(said)] if said else []

    def _in_after(self) -> list[AnswerPiece]:
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

    def _in_between(self) -> list[AnswerPiece]:
        """Drop whitespace between calls, which is not text of the answer."""
        self._held = self._held.lstrip()
        if self._held:
            self._state = "text"
        return []
