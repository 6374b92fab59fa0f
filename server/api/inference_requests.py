"""Converts inference requests from proto to domain, and reports all invalid fields at once."""

from __future__ import annotations

import functools
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic_core import from_json

from turret.server.api.access import salt_of
from turret.server.api.call import Call, is_request_id
from turret.server.api.limits import (
    MAX_CACHE_SALT_CHARS,
    MAX_CHAT_MESSAGES,
    MAX_CHAT_TOOL_CALLS,
    MAX_LOGIT_BIASES,
    MAX_REQUEST_ID_CHARS,
    MAX_ROLE_CHARS,
    MAX_STOP_TOKEN_IDS,
    MAX_TOOL_CALLS,
    MAX_TOOL_NAME_CHARS,
    MAX_TOOLS,
    InputLimits,
)
from turret.server.api.violations import Violations, adapter_refs
from turret.server.basics.turns import FairPool
from turret.server.constraints.grammar import MAX_CHOICES, MAX_CONSTRAINT_CHARS, ConstraintSpec
from turret.server.engine.scheduling.request import (
    MAX_STOP_STRINGS,
    Request,
    ResponseOptions,
    SamplingParams,
    StopConditions,
)
from turret.server.errors import PromptTooLongError
from turret.server.models.chat_template import Rendering
from turret.server.words import say
from turret.v1 import inference_pb2

if TYPE_CHECKING:
    from turret.server.api.vocabularies import Vocabulary
    from turret.server.models.chat_template import ChatFormat
    from turret.server.models.tokenizer import RenderedChat, Tokenizer

# Conversations, from proto to the chat template's form: turns, tools and tool calls.


TOOL_NAME = re.compile(rf"[A-Za-z0-9_.-]{{1,{MAX_TOOL_NAME_CHARS}}}")
# Cost of every turn, call and tool, in characters, in addition to its text.
_TURN_CHARS = 32
# Variables of a chat template that have fields of their own in the message.
_FIELDS = ("messages", "tools", "add_generation_prompt")


def check_chat(chat: inference_pb2.Chat, limits: InputLimits, violations: Violations) -> None:
    """Check everything in a conversation that can be checked before it is tokenised.

    Raises:
        PromptTooLongError: The input exceeds the limit however it is tokenised.
    """
    turns = chat.messages
    violations.check(len(turns) > 0, "chat.messages", "EMPTY")
    if not violations.check_count(len(turns), MAX_CHAT_MESSAGES, "chat.messages"):
        return
    # Check the length of every list before reading any of them.
    is_counted = violations.check_count(len(chat.tools), MAX_TOOLS, "chat.tools")
    num_calls = 0
    for index, turn in enumerate(turns):
        path = f"chat.messages[{index}].tool_calls"
        is_counted &= violations.check_count(len(turn.tool_calls), MAX_TOOL_CALLS, path)
        num_calls += len(turn.tool_calls)
    path = "chat.messages.tool_calls"
    is_counted &= violations.check_count(num_calls, MAX_CHAT_TOOL_CALLS, path)
    if not is_counted:
        return
    check_length(_num_chars(chat), limits.max_chars, "characters")
    for index, turn in enumerate(turns):
        path = f"chat.messages[{index}]"
        violations.check(turn.role != "", f"{path}.role", "REQUIRED")
        violations.check_chars(turn.role, MAX_ROLE_CHARS, f"{path}.role")
        violations.check_chars(turn.tool_call_id, MAX_TOOL_NAME_CHARS, f"{path}.tool_call_id")
        for number, call in enumerate(turn.tool_calls):
            _check_call(call, violations, f"{path}.tool_calls[{number}]")
    for index, tool in enumerate(chat.tools):
        _check_tool(tool, violations, f"chat.tools[{index}]")
    _check_rendering(chat, violations)
    names = Counter(tool.name for tool in chat.tools)
    for name, count in names.most_common(1):
        violations.check(count == 1, "chat.tools", "DUPLICATE", value=name)


def _check_rendering(chat: inference_pb2.Chat, violations: Violations) -> None:
    path, text = "chat.chat_template_kwargs", chat.chat_template_kwargs
    violations.check_chars(text, MAX_CONSTRAINT_CHARS, path)
    variables = _json(text)
    violations.check(isinstance(variables, dict), path, "NOT_A_JSON_OBJECT")
    for name in _FIELDS if isinstance(variables, dict) else ():
        violations.check(name not in variables, f"{path}.{name}", "CONFLICTS_WITH", other=name)
    violations.check(
        not (chat.continue_final_message and chat.add_generation_prompt),
        "chat.continue_final_message",
        "CONFLICTS_WITH",
        other="add_generation_prompt",
    )


def _check_call(call: inference_pb2.ToolCall, violations: Violations, path: str) -> None:
    violations.check_chars(call.id, MAX_TOOL_NAME_CHARS, f"{path}.id")
    _check_name(call.name, violations, f"{path}.name")
    _check_object(call.arguments, violations, f"{path}.arguments")


def _check_tool(tool: inference_pb2.Tool, violations: Violations, path: str) -> None:
    _check_name(tool.name, violations, f"{path}.name")
    violations.check_chars(tool.parameters, MAX_CONSTRAINT_CHARS, f"{path}.parameters")
    _check_object(tool.parameters, violations, f"{path}.parameters")


def _check_name(name: str, violations: Violations, path: str) -> None:
    is_name = TOOL_NAME.fullmatch(name) is not None
    violations.check(is_name, path, "NOT_MATCHING", pattern=TOOL_NAME.pattern, value=name[:80])


def _check_object(text: str, violations: Violations, path: str) -> None:
    violations.check(isinstance(_json(text), dict), path, "NOT_A_JSON_OBJECT")


def _json(text: str) -> Any:
    """The value of a JSON text: an empty object if it is empty, and None if it is not JSON."""
    try:
        # Unlike ``json.loads``, this rejects halves of surrogate pairs, as tokenizers do.
        return from_json(text, allow_inf_nan=False) if text else {}
    except ValueError:
        return None


def _num_chars(chat: inference_pb2.Chat) -> int:
    said = sum(len(turn.content) for turn in chat.messages)
    called = sum(len(call.arguments) for turn in chat.messages for call in turn.tool_calls)
    described = sum(len(tool.description) + len(tool.parameters) for tool in chat.tools)
    return said + called + described + len(chat.chat_template_kwargs)


def chat_size(chat: inference_pb2.Chat) -> int:
    """The approximate number of characters that the template makes of a conversation."""
    num_calls = sum(len(turn.tool_calls) for turn in chat.messages)
    return _num_chars(chat) + _TURN_CHARS * (len(chat.messages) + num_calls + len(chat.tools))


def check_length(length: int, limit: int, unit: str) -> None:
    """Reject input that is longer than the model can read.

    Raises:
        PromptTooLongError: The prompt is too long.
    """
    if length > limit:
        said = say("PROMPT_TOO_LONG", length=length, limit=limit, unit=unit)
        raise PromptTooLongError(said, violations=[("input", said)])


def render_chat(chat: inference_pb2.Chat, tokenizer: Tokenizer, is_short: bool) -> RenderedChat:
    """The text of a checked conversation; errors are those of ``Tokenizer.render_chat``."""
    turns = [_turn(message) for message in chat.messages]
    tools = [_tool(tool) for tool in chat.tools]
    continues = chat.continue_final_message
    has_begin = chat.HasField("add_generation_prompt")
    begins = chat.add_generation_prompt if has_begin else not continues
    how = Rendering(_object(chat.chat_template_kwargs), begins, continues)
    return tokenizer.render_chat(
        turns, tools, special=chat.special_tokens, is_short=is_short, how=how
    )


def _turn(message: inference_pb2.ChatMessage) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _object(call.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _tool(tool: inference_pb2.Tool) -> dict[str, Any]:
    """A tool in OpenAI's form, which chat templates expect."""
    parameters = _object(tool.parameters) or {"type": "object", "properties": {}}
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def _object(text: str) -> dict[str, Any]:
    return json.loads(text) if text else {}


# Tokenising more text than this takes more than about a millisecond, so it runs off the event
# loop.
_INLINE_CHARS = 4096
_encoding = FairPool(ThreadPoolExecutor(os.cpu_count() or 1, "turret-encoding"))

_SAMPLING_SCALARS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)
_STOP_SCALARS = ("max_tokens", "min_tokens", "ignore_eos", "include_stop")

_T = TypeVar("_T")
# The messages that run on adapters.
Running = (
    inference_pb2.GenerateRequest
    | inference_pb2.ScoreRequest
    | inference_pb2.EmbedRequest
    | inference_pb2.ClassifyRequest
)
# The messages with an ``input``: prompt, chat or token_ids.
InputMessage = (
    inference_pb2.GenerateRequest
    | inference_pb2.ScoreRequest
    | inference_pb2.TokenizeRequest
    | inference_pb2.Input
)


def _check_ids(ids: Sequence[int], vocab_size: int, violations: Violations, path: str) -> None:
    # Most messages contain no invalid id, and max() finds that out in one pass in C.
    if not ids or max(ids) < vocab_size:
        return
    for index, token_id in enumerate(ids):
        if token_id >= vocab_size:
            violations.add(f"{path}[{index}]", say("NOT_A_TOKEN", value=token_id, size=vocab_size))
            if violations.is_full:
                return


def sampling_params(
    message: inference_pb2.SamplingParams, vocab_size: int, violations: Violations
) -> SamplingParams:
    """Sampling parameters of a message; unset scalars keep the domain's defaults."""
    values = {name: getattr(message, name) for name in _SAMPLING_SCALARS if message.HasField(name)}
    path = "sampling.logit_bias"
    if violations.check_count(len(message.logit_bias), MAX_LOGIT_BIASES, path):
        values["logit_bias"] = dict(message.logit_bias)
        for token_id in message.logit_bias:
            if token_id >= vocab_size:
                violations.add(path, say("NOT_A_TOKEN", value=token_id, size=vocab_size))
    return violations.build(SamplingParams, values, "sampling")


def stop_conditions(
    message: inference_pb2.StopConditions, vocab_size: int, violations: Violations
) -> StopConditions:
    """Stop conditions of a message; unset scalars keep the domain's defaults."""
    values = {name: getattr(message, name) for name in _STOP_SCALARS if message.HasField(name)}
    if violations.check_count(len(message.stop_strings), MAX_STOP_STRINGS, "stop.stop_strings"):
        values["stop_strings"] = tuple(message.stop_strings)
    path = "stop.stop_token_ids"
    if violations.check_count(len(message.stop_token_ids), MAX_STOP_TOKEN_IDS, path):
        values["stop_token_ids"] = frozenset(message.stop_token_ids)
        _check_ids(message.stop_token_ids, vocab_size, violations, path)
    return violations.build(StopConditions, values, "stop")


def constraint_spec(
    message: inference_pb2.GenerateRequest, violations: Violations
) -> ConstraintSpec | None:
    """The constraint on the answer, not yet compiled; None without one."""
    kind = message.WhichOneof("constraint")
    if kind is None or (kind == "json_object" and not message.json_object):
        return None
    if kind == "json_object":
        return ConstraintSpec(kind)
    if kind == "choice":
        path = "choice.texts"
        if not violations.check_count(len(message.choice.texts), MAX_CHOICES, path):
            return None
        texts = tuple(message.choice.texts)
        violations.check(len(texts) > 0, path, "EMPTY")
        violations.check(all(texts), path, "HOLDS_EMPTY_STRING")
    else:
        texts, path = (getattr(message, kind),), kind
    spec = ConstraintSpec(kind, texts)
    size, most = spec.num_chars, MAX_CONSTRAINT_CHARS
    violations.check(size <= most, path, "TOO_MANY_CHARACTERS", most=most, found=size)
    return spec


def check_input(message: InputMessage, limits: InputLimits, violations: Violations) -> None:
    """Check a message's ``input`` oneof (prompt, chat or token_ids) before it is tokenised.

    Raises:
        PromptTooLongError: The input exceeds the limit however it is tokenised.
    """
    which = message.WhichOneof("input")
    if which is None:
        violations.add("input", say("ONE_REQUIRED", choices="prompt, chat, token_ids"))
    elif which == "chat":
        check_chat(message.chat, limits, violations)
    elif which == "token_ids":
        ids = message.token_ids.ids
        violations.check(len(ids) > 0, "token_ids.ids", "EMPTY")
        check_length(len(ids), limits.max_tokens, "tokens")
        _check_ids(ids, limits.vocab_size, violations, "token_ids.ids")
    else:
        check_length(len(message.prompt), limits.max_chars, "characters")


def shared_fields(message: Running, call: Call, violations: Violations) -> dict[str, Any]:
    """The fields of a ``Request`` that all kinds of messages set in the same way."""
    refs = adapter_refs(message.adapters, violations, call.draw)
    request_id, salt = message.request_id, message.cache_salt
    is_usable = request_id == "" or is_request_id(request_id)
    most = MAX_REQUEST_ID_CHARS
    violations.check(is_usable, "request_id", "NOT_PRINTABLE_ASCII", most=most)
    violations.check_chars(salt, MAX_CACHE_SALT_CHARS, "cache_salt")
    return {
        "request_id": request_id or call.request_id,
        "adapters": refs,
        "deadline": call.deadline,
        "message_bytes": call.message_bytes,
        "salt": salt_of(call.tenant, salt[:MAX_CACHE_SALT_CHARS]),
        "party": call.turn,
        "tenant": call.tenant,
    }


async def rendered_chat(
    chat: inference_pb2.Chat, tokenizer: Tokenizer, tenant: bytes
) -> RenderedChat:
    """The text of a checked conversation; errors are those of ``Tokenizer.render_chat``."""
    is_short = chat_size(chat) <= _INLINE_CHARS
    render = functools.partial(render_chat, chat, tokenizer, is_short)
    return await tokenizer.chat_pool(is_short).run(tenant, render)


async def format_of(
    chat: inference_pb2.Chat, tokenizer: Tokenizer, limits: InputLimits, tenant: bytes
) -> ChatFormat:
    """The format of answers to a conversation.

    Fields of the conversation may decide whether an answer begins with reasoning. Invalid fields
    are not reported here, because the request for the answer reports them.

    Raises:
        InvalidRequestError, UnavailableError: See ``Tokenizer.render_chat``.
        PromptTooLongError: The input exceeds the limit however it is tokenised.
    """
    found = tokenizer.chat_format
    is_usual = not (chat.chat_template_kwargs or chat.HasField("add_generation_prompt"))
    is_known = is_usual and not chat.continue_final_message and found.opens_reasoning is not None
    if not found.has_reasoning or is_known:
        return found
    violations = Violations()
    check_chat(chat, limits, violations)
    if violations.found:
        return found
    if chat.continue_final_message:
        begun = chat.messages[-1].content
        opens = begun.rfind("<think>") > begun.rfind("</think>")
    else:
        opens = (await rendered_chat(chat, tokenizer, tenant)).opens_reasoning
    return replace(found, opens_reasoning=opens)


async def input_token_ids(
    message: InputMessage,
    tokenizer: Tokenizer,
    limits: InputLimits,
    tenant: bytes,
    *,
    adds_special: bool = True,
) -> list[int]:
    """The tokens of a checked ``input``; long texts are tokenised off the event loop.

    Args:
        message: The message with the input.
        tokenizer: The tokenizer.
        limits: The limits that the model sets.
        tenant: The party that the work is for.
        adds_special: Whether a prompt gets the tokenizer's special tokens.

    Raises:
        InvalidRequestError, UnavailableError: See ``Tokenizer.render_chat``.
        PromptTooLongError: The rendered conversation exceeds the limit, however it is tokenised.
    """
    which = message.WhichOneof("input")
    if which == "token_ids":
        return list(message.token_ids.ids)
    if which == "chat":
        chat = await rendered_chat(message.chat, tokenizer, tenant)
        size = chat.num_chars
        check_length(size, limits.max_chars, "characters")
        encode = functools.partial(tokenizer.encode_rendered, chat)
    else:
        size = len(message.prompt)
        encode = functools.partial(tokenizer.encode, message.prompt, adds_special=adds_special)
    is_short = size <= _INLINE_CHARS and tokenizer.encodes_at_once
    return encode() if is_short else await _encoding.run(tenant, encode)


async def generate_request(
    message: inference_pb2.GenerateRequest, vocabulary: Vocabulary, limits: InputLimits, call: Call
) -> Request:
    """The domain request for a message.

    Args:
        message: The message from the client.
        vocabulary: Turns a prompt or chat into tokens, and compiles what the answer must match.
        limits: The limits that the model sets.
        call: The call on whose behalf the request runs. Its id is used if the message has none.

    Raises:
        InvalidRequestError: Lists every offending field.
        QueueFullError, BudgetExceededError: See ``ConstraintCompiler.compile``.
    """
    violations = Violations()
    check_input(message, limits, violations)
    spec = constraint_spec(message, violations)
    shared = shared_fields(message, call, violations)
    sampling = sampling_params(message.sampling, limits.vocab_size, violations)
    stop = stop_conditions(message.stop, limits.vocab_size, violations)
    asked = message.options
    options = violations.build(
        ResponseOptions,
        {
            "logprobs": asked.logprobs,
            "top_n": asked.top_n,
            "echo": asked.echo,
            "token_ids": asked.token_ids,
            "call_marks": asked.call_marks,
            # Only a conversation has a turn of the model that can be divided into channels.
            "user_text_only": message.WhichOneof("input") == "chat" and not asked.call_marks,
        },
        "options",
    )
    so_far = message.answer_so_far
    if violations.check_count(len(so_far), limits.max_tokens, "answer_so_far"):
        _check_ids(so_far, limits.vocab_size, violations, "answer_so_far")
    violations.raise_if_any()
    constraint = None if spec is None else await vocabulary.constraints.compile(spec, call.tenant)
    return Request(
        prompt_token_ids=tuple(
            await input_token_ids(message, vocabulary.tokenizer, limits, call.tenant)
        ),
        sampling=sampling,
        stop=stop,
        options=options,
        answer_so_far=tuple(message.answer_so_far),
        constraint=constraint,
        own_tokenizer=vocabulary.own,
        **shared,
    )


async def score_request(
    message: inference_pb2.ScoreRequest, vocabulary: Vocabulary, limits: InputLimits, call: Call
) -> Request:
    """Like ``generate_request``, but only for the log probabilities of the prompt."""
    violations = Violations()
    check_input(message, limits, violations)
    shared = shared_fields(message, call, violations)
    values = {"logprobs": True, "top_n": message.top_n}
    options = violations.build(ResponseOptions, values, "")
    violations.raise_if_any()
    return Request(
        prompt_token_ids=tuple(
            await input_token_ids(message, vocabulary.tokenizer, limits, call.tenant)
        ),
        own_tokenizer=vocabulary.own,
        options=options,
        score=True,
        **shared,
    )
