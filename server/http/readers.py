"""Readers of answers to a conversation, which know the model's formats of calls and reasoning."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from turret.server.api.inference.inference import Inference
from turret.server.errors import InvalidRequestError
from turret.server.http.asked import Asked, ToolUse
from turret.server.http.endpoint import Exchange
from turret.server.http.tools.constrained import constrained
from turret.server.http.tools.grammar import CallsGrammar
from turret.server.http.tools.reader import AnswerReader
from turret.server.http.tools.schemas import UnenforceableError
from turret.server.words import say
from turret.v1 import inference_pb2

_Message = inference_pb2.GenerateRequest


async def make_readers(
    inference: Inference, exchange: Exchange, asked: Asked, use: ToolUse
) -> Callable[[], AnswerReader]:
    """Keep the answers to calls where they must be some; returns what makes a reader of each.

    Raises:
        InvalidRequestError: The answer cannot be kept to the tools, or to them and its constraint.
    """
    message = asked.message
    chat_format = await inference.chat_format(message.adapters)
    form: str | None = chat_format.tools
    is_free = message.WhichOneof("constraint") is None
    message.options.call_marks = chat_format.has_channels
    if use.tools and form is not None:
        message.options.call_marks = True
        grammar = CallsGrammar(
            form,
            use.tools,
            is_parallel=use.is_parallel,
            marks=chat_format.marks,
            has_call_ids=chat_format.has_call_ids,
        )
        try:
            _constrain(message, grammar, use, exchange.names)
        except UnenforceableError as error:
            place = f"{use.paths[error.tool]}{error.path}"
            raise InvalidRequestError.of(place, error.text) from None
        except RecursionError:
            # A schema sent as text may be nested as deeply as the parser allows.
            raise InvalidRequestError.of("tools", say("SCHEMA_TOO_NESTED")) from None
    return lambda: AnswerReader(
        form,
        use.tools,
        is_parallel=use.is_parallel,
        has_reasoning=is_free and not use.must_call and chat_format.has_reasoning,
        is_open=chat_format.opens_reasoning,
        has_channels=chat_format.has_channels,
    )


def _constrain(
    message: _Message, grammar: CallsGrammar, use: ToolUse, names: dict[str, str]
) -> None:
    """Constrain the answer to calls, or to what it must be without calls.

    Raises:
        UnenforceableError: A tool's parameters cannot be kept to.
        InvalidRequestError: The constraint cannot be combined with tools.
    """
    kind = message.WhichOneof("constraint")
    if not use.must_call and kind is None:
        return
    for rule, (tool, path) in grammar.places().items():
        names[f"grammar.{rule}"] = use.paths[tool] + path
    if use.must_call or kind is None:
        message.grammar = grammar.alone()
        names["grammar"] = "tools"
        return
    value = _value(message, kind)
    # Leave an unreadable constraint as it is: compiling it reports the error.
    if value is None:
        return
    name = names.get(kind) or names.get(f"{kind}.texts") or kind
    if grammar.is_object and kind in ("json_schema", "json_object"):
        # Use one schema: of two grammars that begin alike, the one with longer tokens would win.
        schema = value if kind == "json_schema" else {"type": "object"}
        message.json_schema = json.dumps(grammar.schema_beside(schema), ensure_ascii=False)
        names["json_schema"] = names["json_schema.anyOf[0]"] = name
        for number, tool in enumerate(use.tools, 1):
            place = f"json_schema.anyOf[{number}].properties.parameters"
            names[place] = use.paths[tool]
        return
    answer = constrained(kind, value)
    if answer is None:
        raise InvalidRequestError.of(name, say("GBNF_BESIDE_TOOLS"))
    message.grammar = grammar.beside(answer)
    names["grammar"] = names["grammar.answer"] = name


def _value(message: _Message, kind: str) -> Any:
    if kind == "json_schema":
        try:
            schema = json.loads(message.json_schema)
        except (ValueError, RecursionError):
            return None
        return schema if isinstance(schema, dict) else None
    if kind == "choice":
        texts = list(message.choice.texts)
        return texts if all(texts) else None
    return getattr(message, kind) or None
