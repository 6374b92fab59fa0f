"""What reads the answers to a conversation: tools and reasoning as the model has them."""

from __future__ import annotations

from collections.abc import Callable

from turret.server.api.inference import Inference
from turret.server.http.bodies.fields import Fields
from turret.server.http.bodies.generation import Asked
from turret.server.http.bodies.tool_fields import ToolUse
from turret.server.http.exchange.endpoint import Exchange
from turret.server.http.tools.grammar import calls_grammar
from turret.server.http.tools.reader import AnswerReader


def make_readers(
    inference: Inference, exchange: Exchange, fields: Fields, asked: Asked, use: ToolUse
) -> Callable[[], AnswerReader]:
    """Have the answers be calls where they must; returns what makes a reader for each of them."""
    chat_format = inference.chat_format()
    form: str | None = chat_format.tools
    if use.tools and asked.message.WhichOneof("constraint") is not None:
        fields.refuse("tools", "an answer has one constraint: send tool_choice none with it")
    elif use.must_call and use.tools and form is not None:
        asked.message.grammar = calls_grammar(form, use.tools, is_parallel=use.is_parallel)
        exchange.names["grammar"] = "tools"
    is_free = asked.message.WhichOneof("constraint") is None
    return lambda: AnswerReader(
        form,
        use.tools,
        is_parallel=use.is_parallel,
        has_reasoning=is_free and chat_format.has_reasoning,
        is_open=chat_format.opens_reasoning,
    )
