"""Splits a growing answer into reasoning, text and tool calls, according to the model's format.

Each parser is a generator. It takes text from the front of a :class:`Source`, yields the pieces
that are certain, and yields None where it needs more text.
"""

from __future__ import annotations

import dataclasses
import json
import re
import uuid
from collections.abc import Callable, Container, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from turret.server.basics.codes import CHANNEL, ENDS, FUNCTIONS, MARKS, MESSAGE, Header
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

    ``call_id`` is empty unless the model wrote an id; ``AnswerReader`` then creates one.
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
# Limits on the schemas that are followed to find the type of one value. Without limits,
# alternatives that refer to each other could take any amount of time.
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
        # References and alternatives can form cycles.
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


_T = TypeVar("_T")
Parser = Generator[AnswerPiece | None, None, _T]
Tools = Mapping[str, Mapping[str, Any]]


def possible_start(text: str, mark: str) -> int:
    """The number of characters at the end of ``text`` that may begin ``mark``."""
    for size in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:size]):
            return size
    return 0


class Source:
    """The text of an answer that has arrived and is not parsed yet.

    Attributes:
        text: The text.
        is_over: Whether no more text follows.
    """

    def __init__(self) -> None:
        self.text = ""
        self.is_over = False

    def take(self, size: int) -> str:
        """Remove characters from the front, and return them."""
        taken, self.text = self.text[:size], self.text[size:]
        return taken

    def more(self) -> Parser[bool]:
        """Wait for more text and return True; return False at once if none follows."""
        if self.is_over:
            return False
        yield None
        return True

    def rest(self) -> Parser[str]:
        """The text without blanks at its front, once there is any; "" if none follows."""
        while not (rest := self.text.lstrip()) and (yield from self.more()):
            pass
        return rest

    def until(self, mark: str, kind: Callable[[str], AnswerPiece]) -> Parser[bool]:
        """Yield the text before a mark, and take the mark; returns whether it was found."""
        while True:
            said, found, rest = self.text.partition(mark)
            if found:
                self.text = rest
            else:
                said = self.take(len(said) - (0 if self.is_over else possible_start(said, mark)))
            if said:
                yield kind(said)
            if found or not (yield from self.more()):
                return bool(found)


def _plain(source: Source) -> Parser[None]:
    """An answer, or the rest of one, that is only text."""
    while True:
        if source.text:
            yield Said(source.take(len(source.text)))
        if not (yield from source.more()):
            return


# Reasoning before the answer.

_BEGIN, _END = "<think>", "</think>"


def _reasoning(source: Source, is_open: bool) -> Parser[None]:
    """The block of reasoning at the front, if there is one, and the blanks after it.

    Args:
        source: The answer.
        is_open: Whether the prompt has already begun the block.
    """
    while not is_open:
        begun = source.text.lstrip()
        if begun.startswith(_BEGIN):
            source.text = begun.removeprefix(_BEGIN)
            break
        if not _BEGIN.startswith(begun) or not (yield from source.more()):
            return
    if (yield from source.until(_END, Thought)):
        source.text = yield from source.rest()


# Messages in channels; see ``server/basics/codes.py``.

# Longer than any mark together with the names of a channel and a tool.
_MAX_HEADER_CHARS = 256
_RECIPIENT = "to="


def _channels(source: Source, names: Container[str]) -> Parser[None]:
    """The messages of an answer.

    An answer that does not begin with a message is text, and so is a call of an unknown tool.

    Args:
        source: The answer.
        names: The names of the tools that may be called.
    """
    starts = (*MARKS, _RECIPIENT)
    while not (begun := source.text.lstrip()).startswith(starts):
        may_begin = any(start.startswith(begun) for start in starts)
        if not may_begin or not (yield from source.more()):
            yield from _plain(source)
            return
    index = 0
    while True:
        while MESSAGE not in source.text:
            if len(source.text) > _MAX_HEADER_CHARS:
                # The model no longer follows the format: treat everything as text.
                yield from _plain(source)
                return
            if not (yield from source.more()):
                # Drop a header without a message.
                return
        text, _, source.text = source.text.partition(MESSAGE)
        # Leave out the mark that ended the previous message.
        header = Header.parse(re.split("|".join(map(re.escape, ENDS)), text)[-1])
        name = header.recipient.removeprefix(FUNCTIONS)
        if header.recipient.startswith(FUNCTIONS) and name in names:
            yield CallBegun(index, name)
            source.text = yield from source.rest()
            size = yield from _message(source, lambda grown, at=index: CallGrown(at, grown))
            if not size:
                yield CallGrown(index, "{}")
            index += 1
            continue
        if not (header.is_thought or header.is_for_user):
            yield Said(text + MESSAGE)
        yield from _message(source, Thought if header.is_thought else Said)


_MESSAGE_END = re.compile("|".join(map(re.escape, (*ENDS, CHANNEL))))


def _message(source: Source, kind: Callable[[str], AnswerPiece]) -> Parser[int]:
    """The text of a message up to the mark that begins the next header; returns its length."""
    length = 0
    while True:
        found = _MESSAGE_END.search(source.text)
        size = found.start() if found else len(source.text)
        if not (found or source.is_over):
            size -= max(possible_start(source.text, mark) for mark in MARKS)
        if size:
            yield kind(source.take(size))
        length += size
        if found or not (yield from source.more()):
            return length


# Tool calls. A parser of one call returns False, and takes no text, if there is no call of a known
# tool. If the answer is cut in a call, the parser returns True.

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
        """The offset after the closing bracket in ``text``, the next piece; None if not there."""
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


def _object(source: Source, index: int) -> Parser[None]:
    """Arguments that are already a JSON object."""
    end = ObjectEnd()
    while True:
        size = end.find(source.text)
        if grown := source.take(len(source.text) if size is None else size):
            yield CallGrown(index, grown)
        if size is not None or not (yield from source.more()):
            return


def _json_call(source: Source, index: int, tools: Tools) -> Parser[bool]:
    """A call that begins with its opening bracket."""
    whole, num_looked_at = ObjectEnd(), 0
    while (head := _JSON_HEAD.match(source.text)) is None:
        # The fields may be in another order. If so, read the call as a whole.
        end = whole.find(source.text[num_looked_at:])
        if end is not None:
            return (yield from _whole_call(source, num_looked_at + end, index, tools))
        num_looked_at = len(source.text)
        if not (yield from source.more()):
            return False
    name = _loaded(head[1])
    if name not in tools:
        return False
    source.take(head.end())
    yield CallBegun(index, name)
    yield from _object(source, index)
    while (tail := _JSON_TAIL.match(source.text)) is None:
        if not (yield from source.more()):
            return True
    source.take(tail.end())
    return True


def _whole_call(source: Source, size: int, index: int, tools: Tools) -> Parser[bool]:
    """A call that has arrived completely."""
    call = _loaded(source.text[:size])
    name = call.get("name") if isinstance(call, dict) else None
    if not isinstance(name, str) or name not in tools:
        return False
    arguments = call.get("arguments", call.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    source.take(size)
    yield CallBegun(index, name)
    yield CallGrown(index, arguments)
    return True


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


def _named_call(source: Source, index: int, tools: Tools) -> Parser[bool]:
    """A call that begins with its name."""
    while (head := _NAMED_HEAD.match(source.text)) is None:
        is_none = "{" in source.text or len(source.text) > _MAX_HEAD_CHARS
        if is_none or not (yield from source.more()):
            return False
    if head[1] not in tools:
        return False
    source.take(head.end())
    yield CallBegun(index, head[1], head[2] or "")
    yield from _object(source, index)
    return True


_XML_BEGIN, _XML_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_ONLY_TEXT = frozenset({"string"})
_XML_HEAD = re.compile(rf"\s*{_XML_BEGIN}([^<>\n]{{1,64}})>")
_XML_NEXT = re.compile(rf"\s*(?:{_PARAMETER}([^<>\n]+)>(?:\n|(?=[^\n]))|{_XML_END})")


def _xml_call(source: Source, index: int, tools: Tools) -> Parser[bool]:
    """A call that begins with ``<function=``; its arguments become JSON.

    A parameter's value is plain text between tags; the tool's schema determines its type. Strings
    are yielded as they arrive, other values once they are complete.
    """
    while (head := _XML_HEAD.match(source.text)) is None:
        begun = source.text.lstrip()
        is_open = begun.startswith(_XML_BEGIN) and len(begun) < 80 and "\n" not in begun
        is_none = not (_XML_BEGIN.startswith(begun) or is_open)
        if is_none or not (yield from source.more()):
            return False
    if head[1] not in tools:
        return False
    source.take(head.end())
    yield CallBegun(index, head[1])
    yield CallGrown(index, "{")
    schema, comma = tools[head[1]], ""
    properties = schema.get("properties")
    while (name := (yield from _parameter_name(source))) is not None:
        if not name:
            yield CallGrown(index, "}")
            break
        yield CallGrown(index, f"{comma}{json.dumps(name, ensure_ascii=False)}: ")
        comma = ", "
        value = properties.get(name) if isinstance(properties, dict) else None
        if not (yield from _xml_value(source, index, kinds_of(value, schema))):
            break
    return True


def _parameter_name(source: Source) -> Parser[str | None]:
    """The name of the next parameter; "" at the end of the call; None if the answer is cut."""
    while (found := _XML_NEXT.match(source.text)) is None:
        begun = source.text.lstrip()
        marks = (_PARAMETER, _XML_END)
        if not any(mark.startswith(begun) or begun.startswith(mark) for mark in marks):
            # If neither a parameter nor the end follows, end the call here. The rest is text.
            return ""
        if not (yield from source.more()):
            return None
    source.take(found.end())
    return found[1] or ""


def _xml_value(source: Source, index: int, kinds: frozenset[str]) -> Parser[bool]:
    """A parameter's value; returns False if the answer is cut in it."""
    is_text, opening = kinds == _ONLY_TEXT, '"'
    while True:
        value, found, rest = source.text.partition(_PARAMETER_END)
        grown = ""
        if found:
            # The line break before the closing tag is not part of the value.
            value, source.text = value.removesuffix("\n"), rest
        elif is_text:
            ends = (f"\n{_PARAMETER_END}", _PARAMETER_END)
            value = source.take(len(value) - max(possible_start(value, end) for end in ends))
        if is_text:
            closing = '"' if found else ""
            grown = f"{opening}{json.dumps(value, ensure_ascii=False)[1:-1]}{closing}"
            opening = ""
        elif found:
            grown = json.dumps(_meant(value, kinds), ensure_ascii=False)
        if grown:
            yield CallGrown(index, grown)
        if found or not (yield from source.more()):
            return bool(found)


def _meant(text: str, kinds: frozenset[str]) -> Any:
    """The value that a parameter's text stands for.

    Text that is JSON is parsed, unless the parameter may be a string but not a value of that type.
    Other text is the value itself.
    """
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


# The text that begins a call after its mark, and the parser of the call, by syntax. A ``named``
# call begins with its name, so any text may begin it.
_CALLS: Mapping[str, tuple[str, Callable[[Source, int, Tools], Parser[bool]]]] = {
    "json": ("{", _json_call),
    "named": ("", _named_call),
    "xml": ("<", _xml_call),
}


def _calls(source: Source, form: Form, tools: Tools) -> Parser[None]:
    """Text and tool calls.

    Text that looks like a call but is not one, or calls an unknown tool, stays text.
    """
    index = 0
    # The argument ``taken`` of ``_call``; None outside of a call.
    taken = (yield from _opening(source, form)) if form.is_bare else None
    while True:
        if taken is None:
            if not (yield from source.until(form.begin, Said)):
                return
            taken = form.begin
        if (yield from _call(source, form, tools, index, taken)):
            index += 1
            taken = "" if (yield from _is_followed(source, form)) else None
        else:
            taken = None


def _opening(source: Source, form: Form) -> Parser[str | None]:
    """Take and return the blanks and the mark before a first call; None if no call is there."""
    while True:
        begun = source.text.lstrip()
        num_blanks = len(source.text) - len(begun)
        if begun.startswith(form.begin):
            return source.take(num_blanks + len(form.begin))
        if not form.begin.startswith(begun):
            is_call = begun.startswith("[" if form.is_list else "{")
            return source.take(num_blanks) if is_call else None
        if not (yield from source.more()):
            return None


def _call(source: Source, form: Form, tools: Tools, index: int, taken: str) -> Parser[bool]:
    """One call; returns whether there is one.

    ``taken`` is the text that was taken as the beginning of the call. If there is no call, it stays
    text. It is empty if the call follows another one without a mark.
    """
    opening, parse = _CALLS[form.syntax]
    begins_list = form.is_list and not index
    for bracket in ("[", opening) if begins_list else (opening,):
        rest = yield from source.rest()
        if not rest or not rest.startswith(bracket):
            break
        is_of_list = begins_list and bracket == "["
        taken += source.take(len(source.text) - len(rest) + is_of_list)
    else:
        if (yield from parse(source, index, tools)):
            if source.is_over:
                # The call is cut.
                source.text = ""
            return True
    if taken:
        yield Said(taken)
    return False


def _is_followed(source: Source, form: Form) -> Parser[bool]:
    """Take the end of a call; returns whether another one follows at once, without a mark."""
    while form.syntax != "named":
        rest = source.text.lstrip()
        if form.end and rest.startswith(form.end):
            source.text = rest.removeprefix(form.end)
            break
        if rest.startswith("]") and form.is_list:
            source.text = rest[1:]
            break
        if rest and rest[0] in form.separators:
            source.text = rest[1:]
            return True
        if rest.startswith("{") and form.syntax == "json" and not (form.is_list or form.end):
            return True
        if rest and not form.end.startswith(rest):
            return False
        if not (yield from source.more()):
            # A partial end mark is not part of the text.
            source.text = ""
            return False
    # Blanks between calls are not text either.
    source.text = yield from source.rest()
    return False


_PART_CHARS = 8 << 10


class AnswerReader:
    """Reads one answer.

    Args:
        form: The format of the model's tool calls; None if it cannot call tools.
        tools: The callable tools, with the JSON schemas of their arguments; empty if none.
        is_parallel: Whether calls after the first are returned.
        has_reasoning: Whether the answer may begin with a block of reasoning.
        is_open: Whether the prompt has begun that block.
        has_channels: Whether the answer consists of messages in channels, with their marks.
        is_forced: Whether the answer consists only of calls. The beginning of a call that is cut
            off then does not count as text.

    Attributes:
        num_calls: The number of tool calls returned so far.
    """

    def __init__(
        self,
        form: str | None,
        tools: Tools,
        *,
        is_parallel: bool = True,
        has_reasoning: bool = False,
        is_open: bool = False,
        has_channels: bool = False,
        is_forced: bool = False,
    ) -> None:
        self._source = Source()
        self._is_forced = is_forced and (has_channels or bool(form and tools))
        self._is_parallel = is_parallel
        # Mistral's templates accept only ids of nine characters; others accept any.
        self._has_short_ids = form in ("mistral", "mistral11")
        self.num_calls = 0

        def parse(source: Source) -> Parser[None]:
            if has_channels:
                yield from _channels(source, tools)
                return
            if has_reasoning:
                yield from _reasoning(source, is_open)
            yield from (
                _plain(source) if not (form and tools) else _calls(source, FORMS[form], tools)
            )

        self._parser = parse(self._source)

    def feed(self, text: str) -> list[AnswerPiece]:
        """Append text, and return the pieces that are now certain; every call has an id."""
        pieces: list[AnswerPiece] = []
        # Each step of a parser copies the text that is not parsed yet, so feed long texts in parts.
        for start in range(0, len(text) or 1, _PART_CHARS):
            self._source.text += text[start : start + _PART_CHARS]
            for piece in self._parser:
                if piece is None:
                    break
                if isinstance(piece, Said):
                    is_wanted = not self._is_forced
                else:
                    is_wanted = isinstance(piece, Thought) or self._is_parallel or not piece.index
                if is_wanted:
                    pieces.append(self._with_id(piece) if isinstance(piece, CallBegun) else piece)
        return pieces

    def finish(self) -> list[AnswerPiece]:
        """The last pieces, after the answer has ended."""
        self._source.is_over = True
        return self.feed("")

    def _with_id(self, call: CallBegun) -> CallBegun:
        self.num_calls += 1
        digits = uuid.uuid4().hex
        made = digits[:9] if self._has_short_ids else f"call_{digits[:24]}"
        return call if call.call_id else dataclasses.replace(call, call_id=made)


def delta_of(piece: AnswerPiece) -> dict[str, Any]:
    """The delta of a stream's event for a piece."""
    if isinstance(piece, Said):
        return {"content": piece.text}
    if isinstance(piece, Thought):
        return {"reasoning_content": piece.text}
    call: dict[str, Any] = {"index": piece.index}
    if isinstance(piece, CallBegun):
        function = {"name": piece.name, "arguments": ""}
        call |= {"id": piece.call_id, "type": "function", "function": function}
    else:
        call["function"] = {"arguments": piece.text}
    return {"tool_calls": [call]}


def message_of(reader: AnswerReader, text: str) -> dict[str, Any]:
    """A whole answer as an assistant's message."""
    message: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
    for piece in (*reader.feed(text), *reader.finish()):
        delta = delta_of(piece)
        if isinstance(piece, CallBegun):
            (call,) = delta["tool_calls"]
            del call["index"]
            message.setdefault("tool_calls", []).append(call)
        elif isinstance(piece, CallGrown):
            message["tool_calls"][-1]["function"]["arguments"] += piece.text
        else:
            ((name, grown),) = delta.items()
            message[name] = message.get(name, "") + grown
    if "tool_calls" in message:
        message["content"] = message["content"] or None
    return message
