"""Requests from plain Python values."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict

from google.protobuf.descriptor import FieldDescriptor

from turret.clients.messages.mix import AdaptersLike, to_mix
from turret.v1 import inference_pb2

# {"role": "user", "content": "hi"}, ("user", "hi"), or the message itself. A mapping may have
# tool_calls and tool_call_id in OpenAI's form.
MessageLike = Mapping[str, Any] | tuple[str, str] | inference_pb2.ChatMessage
# Text, token ids, or the turns of a conversation.
Prompt = str | Sequence[int] | Sequence[MessageLike]


class GenerateOptions(TypedDict, total=False):
    """Everything that a generation takes beside its prompt.

    Unset, or None, leaves the server's default, which is named in brackets.

    Attributes:
        adapters: The mix: names, ``("name", weight)``, ``AdapterWeight`` or ``{"name": weight}``
            [none: the base model].
        temperature: Divides the logits, 0 to 100; 0 is greedy [1].
        top_k: Keeps this many likeliest tokens; 0 is off [0].
        top_p: Keeps the likeliest tokens whose probabilities reach this sum, over 0 to 1 [1].
        min_p: Drops tokens less likely than this share of the likeliest one, 0 to 1 [0].
        repetition_penalty: Makes tokens of the prompt and the answer less likely, 0.01 to 100 [1].
        presence_penalty: Taken from the logits of tokens in the answer, -2 to 2 [0].
        frequency_penalty: Taken once per occurrence in the answer, -2 to 2 [0].
        seed: Makes the answer repeatable, whatever else the server runs [a random one].
        logit_bias: Token id → what is added to its logit, -100 to 100; at most 1024 [none].
        max_tokens: Most tokens to generate, at least 1 [up to the model's context].
        min_tokens: No stop condition applies before this many tokens [0].
        stop: Texts that end the answer: at most 16, each of 1 to 256 characters [none].
        stop_token_ids: Tokens that end the answer, at most 1024 [none].
        ignore_eos: Whether to generate past the model's own end tokens [False].
        include_stop: Whether what stopped the answer stays in it [False].
        logprobs: Whether the result has the tokens' log probabilities [False].
        top_n: Likeliest alternatives told for each token, 0 to 20; implies ``logprobs`` [0].
        echo: Whether the result begins with the prompt [False].
        token_ids: Whether the result has the tokens [False].
        request_id: Names the request in the server's log [made by the server].
        json_schema: The answer is JSON that this schema describes: a mapping, or its text. One
            constraint at most: this or one of the next four [none].
        json_object: The answer is any JSON object [False].
        regex: The answer matches this as a whole, in the syntax of Rust's ``regex`` [none].
        grammar: The answer is what a context-free grammar makes: Lark's form, or GBNF [none].
        choice: The answer is one of these texts [none].
        tools: What the model may ask to have called, in OpenAI's form; conversations only [none].
    """

    adapters: AdaptersLike
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    logit_bias: Mapping[int, float] | None
    max_tokens: int | None
    min_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    include_stop: bool | None
    logprobs: bool | None
    top_n: int | None
    echo: bool | None
    token_ids: bool | None
    request_id: str | None
    json_schema: Mapping[str, Any] | str | None
    json_object: bool | None
    regex: str | None
    grammar: str | None
    choice: Sequence[str] | None
    tools: Sequence[Mapping[str, Any]] | None


_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)
_STOP = ("max_tokens", "min_tokens", "ignore_eos", "include_stop")
_CONSTRAINTS = ("json_schema", "json_object", "regex", "grammar", "choice")
POOLINGS = {
    "last": inference_pb2.EmbedRequest.LAST,
    "mean": inference_pb2.EmbedRequest.MEAN,
}
_PROMPTS = "text, token ids or the turns of a conversation"
_TURN_FIELDS = {"content", "tool_calls", "tool_call_id"}
_RESPONSE = ("logprobs", "top_n", "echo", "token_ids")


def generate_request(prompt: Prompt, options: GenerateOptions) -> inference_pb2.GenerateRequest:
    """Build the request of ``Generate`` and ``GenerateStream``.

    Raises:
        TypeError: An option is unknown, or a value has the wrong type.
        ValueError: A value does not fit its field, such as a negative count.
    """
    unknown = options.keys() - GenerateOptions.__annotations__.keys()
    if unknown:
        known = list(GenerateOptions.__annotations__)
        close = difflib.get_close_matches(min(unknown), known, n=1, cutoff=0.7)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        if unknown == {"model"}:
            meant = "; a client has one model, and adapters=[...] names what answers on it"
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}{meant}")
    values: dict[str, Any] = {k: v for k, v in options.items() if v is not None}
    request = inference_pb2.GenerateRequest(adapters=to_mix(values.get("adapters", ())))
    fill(request, ("request_id",), values)
    set_input(request, prompt)
    fill(request.sampling, _SAMPLING, values)
    _set_bias(request.sampling, values.get("logit_bias", {}))
    fill(request.stop, _STOP, values)
    stop = values.get("stop", ())
    stops = [stop] if isinstance(stop, str) else _several("stop", stop, "a text or a list of texts")
    _extend("stop", request.stop.stop_strings, stops)
    ids = _several("stop_token_ids", values.get("stop_token_ids", ()), "a list of token ids")
    _extend("stop_token_ids", request.stop.stop_token_ids, ids)
    if values.get("top_n"):
        values.setdefault("logprobs", True)
    fill(request.options, _RESPONSE, values)
    _set_constraint(request, values)
    for tool in _several("tools", values.get("tools", ()), "a list of tools"):
        if request.WhichOneof("input") != "chat":
            raise TypeError("tools: only a conversation has tools")
        request.chat.tools.append(_to_tool(tool))
    return request


def _set_bias(sampling: inference_pb2.SamplingParams, bias: Any) -> None:
    wanted = "token ids with numbers, such as {5: -1.0}"
    if not isinstance(bias, Mapping):
        raise TypeError(f"logit_bias: {wanted}, not {bias!r}")
    for token_id, number in bias.items():
        try:
            sampling.logit_bias[token_id] = number
        except (TypeError, ValueError) as error:
            raise type(error)(f"logit_bias: {wanted}, not {{{token_id!r}: {number!r}}}") from None


def _set_constraint(request: inference_pb2.GenerateRequest, values: Mapping[str, Any]) -> None:
    given = [name for name in _CONSTRAINTS if name in values]
    if len(given) > 1:
        raise ValueError(f"an answer has one constraint, not several: {', '.join(given)}")
    schema = values.get("json_schema")
    if isinstance(schema, Mapping):
        values = {**values, "json_schema": _json("json_schema", schema)}
    elif not isinstance(schema, str | None):
        raise TypeError(f"json_schema: a mapping, or its JSON as a text, not {schema!r}")
    fill(request, _CONSTRAINTS[:-1], values)
    choice = values.get("choice")
    if isinstance(choice, str):
        raise TypeError("choice: several texts, not one")
    if choice is not None:
        request.choice.SetInParent()
        _extend("choice", request.choice.texts, _several("choice", choice, "a list of texts"))


def score_request(
    prompt: Prompt, *, adapters: AdaptersLike, top_n: int, request_id: str
) -> inference_pb2.ScoreRequest:
    """Build the request of ``Score``; errors as in :func:`generate_request`."""
    request = inference_pb2.ScoreRequest(adapters=to_mix(adapters))
    set_input(request, prompt)
    fill(request, ("top_n", "request_id"), {"top_n": top_n, "request_id": request_id})
    return request


def embed_request(
    inputs: str | Sequence[Prompt],
    *,
    adapters: AdaptersLike,
    pooling: str | None,
    normalize: bool | None,
    dimensions: int | None,
    request_id: str,
) -> inference_pb2.EmbedRequest:
    """Build the request of ``Embed``; errors as in :func:`generate_request`."""
    request = inference_pb2.EmbedRequest(adapters=to_mix(adapters))
    fill_inputs(request.inputs, inputs)
    if pooling is not None:
        if not isinstance(pooling, str) or pooling not in POOLINGS:
            kind = ValueError if isinstance(pooling, str) else TypeError
            raise kind(f"pooling: one of {', '.join(POOLINGS)}, not {pooling!r}")
        request.pooling = POOLINGS[pooling]
    values = {"normalize": normalize, "dimensions": dimensions, "request_id": request_id}
    fill(request, tuple(values), {k: v for k, v in values.items() if v is not None})
    return request


def classify_request(
    inputs: str | Sequence[Prompt],
    *,
    adapters: AdaptersLike,
    request_id: str,
) -> inference_pb2.ClassifyRequest:
    """Build the request of ``Classify``; errors as in :func:`generate_request`."""
    request = inference_pb2.ClassifyRequest(adapters=to_mix(adapters))
    fill_inputs(request.inputs, inputs)
    fill(request, ("request_id",), {"request_id": request_id})
    return request


def fill_inputs(field: Any, inputs: str | Sequence[Prompt]) -> None:
    """Add an ``Input`` for each prompt; a plain text is the only one.

    Raises:
        TypeError: They are token ids or turns, of which a list is wanted.
    """
    for prompt in [inputs] if isinstance(inputs, str) else _items("inputs", inputs):
        if isinstance(prompt, int | Mapping):
            raise TypeError("inputs: a list of prompts; put a single one into a list")
        set_input(field.add(), prompt)


def tokenize_request(prompt: Prompt, adapters: AdaptersLike) -> inference_pb2.TokenizeRequest:
    """Build the request of ``Tokenize``; errors as in :func:`generate_request`."""
    request = inference_pb2.TokenizeRequest(adapters=to_mix(adapters))
    set_input(request, prompt)
    return request


def chat_messages(chat: str | Iterable[MessageLike]) -> list[inference_pb2.ChatMessage]:
    """Convert a conversation; a plain text is the user's only turn.

    Raises:
        TypeError: A turn has none of the accepted forms.
        ValueError: There is none.
    """
    if isinstance(chat, str):
        return [_said("user", chat)]
    turns = [_to_message(message) for message in _items("messages", chat)]
    if not turns:
        # An empty list is sent as token ids, of which the caller has said nothing.
        raise ValueError("messages: at least one turn")
    return turns


def set_input(
    request: (
        inference_pb2.GenerateRequest
        | inference_pb2.ScoreRequest
        | inference_pb2.TokenizeRequest
        | inference_pb2.Input
    ),
    prompt: Prompt,
) -> None:
    """Set the request's ``input`` by the prompt's type; an empty sequence counts as token ids.

    Raises:
        TypeError: The prompt is neither text nor token ids nor a conversation.
        ValueError: A token id is negative or too large, or a text is not UTF-8.
    """
    if isinstance(prompt, str):
        fill(request, ("prompt",), {"prompt": prompt})
        return
    items = _items("prompt", prompt)
    if any(isinstance(item, str | bool) for item in items):
        raise TypeError(f"prompt: {_PROMPTS}, not {prompt!r}")
    if all(isinstance(item, int) for item in items):
        request.token_ids.SetInParent()
        _extend("prompt", request.token_ids.ids, items)
    else:
        request.chat.messages.extend(_to_message(item) for item in items)


def _items(name: str, value: Any) -> list[Any]:
    if isinstance(value, Iterable) and not isinstance(value, bytes | Mapping):
        return list(value)
    raise TypeError(f"{name}: {_PROMPTS}, not {value!r}")


def _several(name: str, value: Any, wanted: str) -> Iterable[Any]:
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
        return value
    raise TypeError(f"{name}: {wanted}, not {value!r}")


def _json(name: str, value: object) -> str:
    """The value as JSON.

    Raises:
        TypeError, ValueError: It is none; names the argument.
    """
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def _said(role: str, content: str) -> inference_pb2.ChatMessage:
    turn = inference_pb2.ChatMessage()
    fill(turn, ("role", "content"), {"role": role, "content": content})
    return turn


def _to_message(message: object) -> inference_pb2.ChatMessage:
    match message:
        case inference_pb2.ChatMessage():
            return message
        case {"role": str() as role, **rest} if _is_turn(rest):
            turn = _said(role, rest.get("content") or "")
            turn.tool_calls.extend(_to_call(call) for call in rest.get("tool_calls") or ())
            turn.tool_call_id = rest.get("tool_call_id") or ""
            return turn
        case (str() as role, str() as content):
            return _said(role, content)
    raise TypeError(f"messages: a message is a role and a content, not {message!r}")


def _is_turn(rest: Mapping[str, Any]) -> bool:
    """Whether a message beside its role says something, and nothing that is not known."""
    return rest.keys() <= _TURN_FIELDS and bool(rest.keys() & {"content", "tool_calls"})


def _to_call(call: object) -> inference_pb2.ToolCall:
    match call:
        case {"function": {"name": str() as name, "arguments": str() as arguments}, **rest}:
            return inference_pb2.ToolCall(id=rest.get("id"), name=name, arguments=arguments)
    raise TypeError(f"tool_calls: a call has a function with name and arguments, not {call!r}")


def _to_tool(tool: object) -> inference_pb2.Tool:
    match tool:
        case {"function": {"name": str() as name, **function}}:
            parameters = function.get("parameters")
            made = inference_pb2.Tool(
                name=name, parameters=_json("tools", parameters) if parameters else ""
            )
            if function.get("description") is not None:
                fill(made, ("description",), function)
            return made
    raise TypeError(f"tools: a tool has a function with a name, not {tool!r}")


def fill(message: Any, names: Iterable[str], values: Mapping[str, Any]) -> None:
    """Set the named fields; protobuf's own errors do not say which field they mean."""
    for name in names:
        if name in values:
            # A bool is an int to Python and to protobuf, which takes either for the other.
            is_bool = message.DESCRIPTOR.fields_by_name[name].type == FieldDescriptor.TYPE_BOOL
            if isinstance(values[name], bool) and not is_bool:
                raise TypeError(f"{name}: not a bool, such as {values[name]}")
            if is_bool and not isinstance(values[name], bool):
                raise TypeError(f"{name}: True or False, not {values[name]!r}")
            _each(name, lambda value, name=name: setattr(message, name, value), values[name])


def _extend(name: str, field: Any, items: Iterable[Any]) -> None:
    """Add all of them to a repeated field; of one that does not fit, it alone is told."""
    given = list(items)
    try:
        field.extend(given)
    except (TypeError, ValueError):
        for item in given:
            _each(name, field.append, item)
        raise


def _each(name: str, store: Callable[[Any], None], value: Any) -> None:
    """Call ``store(value)``, with the field's name in front of any complaint."""
    try:
        store(value)
    except (TypeError, ValueError) as error:
        said = str(error)
        if said.startswith("bad argument type"):  # protobuf's, of what is no text
            said = f"a text, not {value!r}"
        elif "cannot be interpreted as an integer" in said:
            said = f"a whole number, not {value!r}"
        elif said.startswith("must be real number"):
            said = f"a number, not {value!r}"
        elif isinstance(error, UnicodeEncodeError):
            said = "a text that is not UTF-8"
        elif said.startswith("Value out of range") and isinstance(value, int):
            said = f"{value} is too large" if value > 0 else f"must not be negative, is {value}"
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name}: {said}") from None
