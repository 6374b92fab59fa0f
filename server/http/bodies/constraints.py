"""The constraint on an answer, in the several forms that clients of this API use for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from turret.server.api.limits import MAX_CONSTRAINT_CHARS
from turret.server.basics.closest import did_you_mean
from turret.server.http.bodies.fields import Fields, is_longer, json_text, why_no_text
from turret.v1 import inference_pb2

_Message = inference_pb2.GenerateRequest
_Set = Callable[[_Message, Any], str | None]


@dataclass(frozen=True, slots=True)
class _Form:
    """How a field asks for a constraint.

    Attributes:
        path: The field, from the body on; its last name holds the value.
        kind: The field of the message.
        read: Puts the value into the message; returns what is wrong with it.
    """

    path: tuple[str, ...]
    kind: str
    read: _Set


def _schema(message: _Message, value: Any) -> str | None:
    if isinstance(value, dict):
        if is_longer(value, MAX_CONSTRAINT_CHARS):
            return f"at most {MAX_CONSTRAINT_CHARS} characters"
        value, why = json_text(value)
    else:
        why = why_no_text(value)
    if why is None:
        message.json_schema = value
        return None
    return "must be an object" if why == "must be a string" else why


def _any_object(message: _Message, value: Any) -> str | None:
    if not isinstance(value, bool):
        return "must be true or false"
    message.json_object = value
    return None


def _text(kind: str) -> _Set:
    def read(message: _Message, value: Any) -> str | None:
        why = why_no_text(value)
        if why is None:
            setattr(message, kind, value)
        return why

    return read


def _choice(message: _Message, value: Any) -> str | None:
    if not isinstance(value, list) or not value:
        return "must be a list of strings, at least one"
    for text in value:
        why = why_no_text(text)
        if why is not None:
            return why
    message.choice.texts.extend(value)
    return None


_BY_NAME: dict[str, tuple[str, _Set]] = {
    "json": ("json_schema", _schema),
    "json_object": ("json_object", _any_object),
    "regex": ("regex", _text("regex")),
    "grammar": ("grammar", _text("grammar")),
    "choice": ("choice", _choice),
}
_FORMS = (
    # vLLM's newer form, its older one, and the names that other servers accept.
    *(_Form(("structured_outputs", name), *how) for name, how in _BY_NAME.items()),
    *(_Form((f"guided_{name}",), *how) for name, how in _BY_NAME.items()),
    *(_Form((name,), *how) for name, how in _BY_NAME.items() if name != "json"),
    _Form(("json_schema",), *_BY_NAME["json"]),
    _Form(("ebnf",), *_BY_NAME["grammar"]),
)
# These options are rejected because they would change what the constraint allows.
_REFUSED = (
    *("structural_tag", "whitespace_pattern", "disable_any_whitespace"),
    "disable_additional_properties",
)
_SHOWN_CHARS = 40
_FORMATS = ("text", "json_object", "json_schema")


def read_constraint(fields: Fields, message: _Message) -> dict[str, str]:
    """Read the only constraint that a request may have; errors are noted.

    Returns:
        The client's name of the constraint's field, by that of the message.
    """
    found: list[tuple[str, str]] = []
    for form in _FORMS:
        *outer, name = form.path
        inside = fields.inner(outer[0]) if outer else fields
        value = inside.get(name)
        # Some clients always send an empty grammar. Like false and null, it asks for nothing.
        if value is None or value is False or (value == "" and form.path == ("grammar",)):
            continue
        found.append((form.kind, ".".join(form.path)))
        why = form.read(message, value)
        if why is not None:
            inside.refuse(name, why)
    outputs = fields.inner("structured_outputs")
    for name in _REFUSED:
        if outputs.get(name) not in (None, False):
            outputs.refuse(name, "is not supported; leave it out")
    unread = [name for name in outputs.sent if name not in outputs.read]
    unread = next((name for name in unread if not outputs.is_null(name)), None)
    if not found and unread is not None:
        # The client asked for a constraint: do not answer without one.
        outputs.refuse(unread[:_SHOWN_CHARS], f"is no constraint; there are {', '.join(_BY_NAME)}")
    found += _read_response_format(fields, message)
    if len(found) > 1:
        names = ", ".join(name for _, name in found)
        fields.refuse(found[1][1], f"an answer has one constraint, not several: {names}")
    # ``choice`` is a plain list here, but a message with ``texts`` in turret.v1.
    return {(f"{kind}.texts" if kind == "choice" else kind): name for kind, name in found[:1]}


def read_text_format(form: Fields, message: _Message) -> dict[str, str]:
    """Read ``text.format`` of /v1/responses, the same as ``response_format`` without a level.

    Returns:
        As ``read_constraint``.
    """
    kind = form.text("type")
    if kind is None or kind == "text":
        return {}
    if kind not in ("json_object", "json_schema"):
        form.refuse("type", _no_format(kind))
        return {}
    if message.WhichOneof("constraint") is not None:
        form.refuse("type", "an answer has one constraint, not several")
        return {}
    if kind == "json_object":
        message.json_object = True
        return {kind: "text.format"}
    schema = form.get("schema")
    why = "must be set" if schema is None else _schema(message, schema)
    if why is not None:
        form.refuse("schema", why)
    return {kind: "text.format.schema"}


def _read_response_format(fields: Fields, message: _Message) -> list[tuple[str, str]]:
    sent = fields.get("response_format")
    if sent is not None and not isinstance(sent, dict):
        fields.refuse("response_format", 'must be an object, such as {"type": "json_object"}')
        return []
    asked = fields.inner("response_format")
    kind = asked.text("type")
    if kind == "json_object":
        message.json_object = True
        return [("json_object", "response_format")]
    if kind == "json_schema":
        inner = asked.inner("json_schema")
        schema = inner.get("schema")
        why = "must be set" if schema is None else _schema(message, schema)
        # If ``json_schema`` is no object, that violation is enough.
        if why is not None and isinstance(asked.get("json_schema"), dict | None):
            inner.refuse("schema", why)
        return [("json_schema", "response_format.json_schema.schema")]
    is_told = kind is None and not asked.is_null("type")
    if kind != "text" and sent is not None and not is_told:
        asked.refuse("type", _no_format(kind))
    return []


def _no_format(kind: str | None) -> str:
    meant = did_you_mean(kind or "", _FORMATS)
    if not meant and (kind or "").lower().startswith("js"):
        meant = "; did you mean 'json_object', any object, or 'json_schema', with a schema?"
    return f"must be text, json_object or json_schema{meant}"
