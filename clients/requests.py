"""Requests of all calls, from plain Python values."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, SupportsIndex, TypedDict, TypeVar

from turret.clients.fields import (
    ArgumentTypeError,
    ArgumentValueError,
    as_json,
    check_text,
    extend,
    fill,
    given,
    named,
    not_of_type,
    several,
)
from turret.clients.words import say
from turret.closest import closest
from turret.v1 import adapters_pb2, inference_pb2, training_pb2

# Separators of members and weights in a model name over HTTP. Adapter names contain neither.
_OF_HTTP = frozenset("+*")


@dataclass(frozen=True, slots=True)
class AdapterWeight:
    """One member of a mix.

    The argument ``adapters`` of calls (``AdaptersLike``) is one member or several: ``"sql"``,
    ``("json", -0.5)``, an ``AdapterWeight``, a list of these, or a mapping of names to weights such
    as ``{"sql": 0.5, "json": -0.5}``.

    Attributes:
        name: A registered name.
        weight: Factor of the adapter's update, in [-100, 100].
        generation: The required generation; None means the current one.
    """

    name: str
    weight: float = 1.0
    generation: int | None = None

    @classmethod
    def parse(cls, text: str) -> AdapterWeight:
        """Read ``NAME[@GENERATION][=WEIGHT]``.

        Raises:
            TypeError: The value is not text.
            ValueError: The text has another form, such as HTTP's form of a mix.
        """
        check_text("text", text)
        head, equals, weight = text.partition("=")
        name, at, generation = head.partition("@")
        try:
            if not name or not _OF_HTTP.isdisjoint(name):
                raise ValueError
            return cls(name, float(weight) if equals else 1.0, int(generation) if at else None)
        except ValueError:
            raise ValueError(say("NOT_A_MIX_MEMBER", value=text)) from None

    def __str__(self) -> str:
        generation = "" if self.generation is None else f"@{self.generation}"
        return f"{self.name}{generation}" + ("" if self.weight == 1.0 else f"={self.weight:g}")


_FORMS = '"name", ("name", weight), {"name": weight} or an AdapterWeight'
# "sql", ("json", -0.5), AdapterWeight("json", generation=2), or the message itself.
AdapterLike = str | tuple[str, float] | AdapterWeight | adapters_pb2.AdapterWeight
# An adapter, several adapters, or a mapping from adapters to weights: {"sql": 0.5, "json": -0.5}.
AdaptersLike = AdapterLike | Sequence[AdapterLike] | Mapping[str, float]


def to_mix(adapters: AdaptersLike) -> list[adapters_pb2.AdapterWeight]:
    """Convert the adapters of a request; a single one needs no list.

    Raises:
        TypeError: A member has none of the accepted forms.
        ValueError: A name contains a separator of names, weights and generations, or a number is
            out of range.
    """
    match adapters:
        case str() | AdapterWeight() | adapters_pb2.AdapterWeight() | (str(), int() | float()):
            return [_to_proto(adapters)]
        case Mapping():
            return [_to_proto(member) for member in adapters.items()]
    if not isinstance(adapters, Iterable):
        raise not_of_type("adapters", f"{_FORMS}, or a list of these", adapters)
    return [_to_proto(adapter) for adapter in adapters]


def _to_proto(adapter: object) -> adapters_pb2.AdapterWeight:
    match adapter:
        case adapters_pb2.AdapterWeight():
            return adapter
        case str():
            return adapters_pb2.AdapterWeight(name=_plain_name(adapter))
        case AdapterWeight():
            member = adapter
        case (name, weight):
            member = AdapterWeight(name, weight)
        case _:
            raise not_of_type("adapters", _FORMS, adapter)
    made = adapters_pb2.AdapterWeight(name=_plain_name(member.name))
    with named("adapters", adapter):
        made.weight = member.weight
        if member.generation is not None:
            made.generation = member.generation
    return made


def _plain_name(name: str) -> str:
    """The name; raises ``ValueError`` if it contains a separator, such as that of a weight."""
    check_text("adapters", name)
    if (_OF_HTTP | {"=", "@"}).isdisjoint(name):
        return name
    raise ArgumentValueError("adapters", say("NOT_A_PLAIN_NAME", value=name))


# {"role": "user", "content": "hi"}, ("user", "hi"), or the message itself. A mapping has the
# format of OpenAI's messages and may contain tool_calls and tool_call_id.
MessageLike = Mapping[str, Any] | tuple[str, str] | inference_pb2.ChatMessage

_TURN_FIELDS = ("content", "tool_calls", "tool_call_id")
# Keys that answers in OpenAI's format may contain, but chat templates do not read.
_IGNORED = ("name", "reasoning_content")


def chat_messages(chat: str | Iterable[MessageLike]) -> list[inference_pb2.ChatMessage]:
    """Convert a conversation; a plain text is the user's only turn.

    Raises:
        TypeError: A turn has none of the accepted forms.
        ValueError: The conversation is empty.
    """
    if isinstance(chat, str):
        check_text("messages", chat)
        return [inference_pb2.ChatMessage(role="user", content=chat)]
    check_is_no_turn("messages", chat)
    wanted = "a string or a list of messages"
    turns = to_messages("messages", several("messages", chat, wanted))
    if not turns:
        # Without this, an empty list would be sent as token ids, which the caller did not mention.
        raise ArgumentValueError("messages", say("EMPTY"))
    return turns


def to_messages(name: str, turns: Iterable[Any]) -> list[inference_pb2.ChatMessage]:
    """Convert turns.

    Args:
        name: The name of the list in errors.
        turns: The turns, in any of the accepted forms.

    Raises:
        TypeError: A turn has none of the accepted forms.
        ValueError: A text is not UTF-8.
    """
    return [_to_message(f"{name}[{index}]", turn) for index, turn in enumerate(turns)]


def is_like_a_turn(value: object) -> bool:
    """Whether a value has the type of a turn, regardless of its content."""
    return isinstance(value, Mapping | tuple | list | inference_pb2.ChatMessage)


def check_is_no_turn(name: str, value: object) -> None:
    """Reject a single turn in place of a list of turns; ``name`` is the name of the list in errors.

    Raises:
        TypeError: The value is a single turn.
    """
    is_pair = isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], str)
    if is_pair or isinstance(value, Mapping | inference_pb2.ChatMessage):
        raise ArgumentTypeError(name, say("SINGLE_MESSAGE"))


def _to_message(place: str, turn: object) -> inference_pb2.ChatMessage:
    match turn:
        case inference_pb2.ChatMessage():
            return turn
        case {"role": role, **rest} if rest.keys() & {"content", "tool_calls"}:
            return _of_mapping(place, role, rest)
        case (str() as role, str() as content):
            return _said(place, role, content)
    raise not_of_type(place, "a message with role and content", turn)


def _of_mapping(place: str, role: Any, rest: Mapping[str, Any]) -> inference_pb2.ChatMessage:
    # Libraries fill unused fields with None or an empty list, so leave both out.
    values = {key: value for key, value in rest.items() if value is not None and value != []}
    unknown = values.keys() - {*_TURN_FIELDS, *_IGNORED}
    if unknown:
        known = ", ".join(("role", *_TURN_FIELDS))
        key = min(map(str, unknown))
        raise ArgumentTypeError(place, say("UNKNOWN_MESSAGE_KEY", value=key, choices=known))
    # Answers that consist only of calls or reasoning have no content, and callers pass them back
    # like that.
    content = rest.get("content")
    content = "" if content is None and role == "assistant" else content
    made = _said(place, role, _content(f"{place}.content", content))
    fill(made, given(tool_call_id=values.get("tool_call_id")), within=f"{place}.")
    calls = several(f"{place}.tool_calls", values.get("tool_calls", ()), "a list of tool calls")
    made.tool_calls.extend(
        _to_call(f"{place}.tool_calls[{index}]", call) for index, call in enumerate(calls)
    )
    return made


def _said(place: str, role: Any, content: Any) -> inference_pb2.ChatMessage:
    turn = inference_pb2.ChatMessage()
    fill(turn, {"role": role, "content": content}, within=f"{place}.")
    return turn


def _content(place: str, content: Any) -> Any:
    """A turn's text; parts of type ``text`` are joined."""
    if not isinstance(content, list | tuple):
        return content
    texts = []
    for index, part in enumerate(content):
        match part:
            case {"type": "text", "text": str() as text}:
                texts.append(text)
            case _:
                wanted = '{"type": "text", "text": ...}'
                raise not_of_type(f"{place}[{index}]", wanted, part)
    return "".join(texts)


def _to_call(place: str, call: object) -> inference_pb2.ToolCall:
    match call:
        case inference_pb2.ToolCall():
            return call
        case {"function": {"name": name, "arguments": arguments}, **rest}:
            made = inference_pb2.ToolCall()
            fill(made, {"name": name, "arguments": arguments}, within=f"{place}.function.")
            fill(made, given(id=rest.get("id")), within=f"{place}.")
            return made
    raise not_of_type(place, "a call with a function, its name and its arguments", call)


def to_tool(place: str, tool: object) -> inference_pb2.Tool:
    """Convert a tool; ``place`` is its name in errors.

    Raises:
        TypeError: The value does not have the accepted form.
        ValueError: A text is not UTF-8.
    """
    match tool:
        case inference_pb2.Tool():
            return tool
        case {"function": {"name": name, **function}}:
            made, within = inference_pb2.Tool(), f"{place}.function."
            parameters = function.get("parameters")
            schema = as_json(f"{within}parameters", parameters) if parameters else None
            optional = given(description=function.get("description"), parameters=schema)
            fill(made, {"name": name, **optional}, within=within)
            return made
    raise not_of_type(place, "a tool with a function and its name", tool)


# Text, token ids (an array of them, too), or the turns of a conversation.
Prompt = str | Iterable[SupportsIndex] | Iterable[MessageLike]


class GenerateOptions(TypedDict, total=False):
    """The options of a generation.

    An option that is unset or None has the server's default, shown in brackets.

    Attributes:
        adapters: The mix: names, ``("name", weight)``, ``AdapterWeight`` or ``{"name": weight}``
            [none: the base model].
        temperature: Divides the logits, 0 to 100; 0 is greedy [1].
        top_k: Keeps this many likeliest tokens; 0 is off [0].
        top_p: Keeps the likeliest tokens whose probabilities reach this sum, over 0 to 1 [1].
        min_p: Drops tokens less likely than this share of the likeliest one, 0 to 1 [0].
        repetition_penalty: Makes tokens of the prompt and the answer less likely, 0.01 to 100 [1].
        presence_penalty: Subtracted from the logits of tokens in the answer, -2 to 2 [0].
        frequency_penalty: Subtracted once per occurrence in the answer, -2 to 2 [0].
        seed: Makes the answer repeatable, whatever else the server runs [a random one].
        logit_bias: Token id → number to add to its logit, -100 to 100; at most 1024 [none].
        max_tokens: Maximum number of tokens to generate, at least 1 [up to the model's context].
        min_tokens: No stop condition applies before this many tokens [0].
        stop: Texts that end the answer: at most 16, each of 1 to 256 characters [none].
        stop_token_ids: Tokens that end the answer, at most 1024 [none].
        ignore_eos: Whether to generate past the model's own end tokens [False].
        include_stop: Whether the stop string or stop token stays in the answer [False].
        logprobs: Whether the result contains the tokens' log probabilities [False].
        top_n: How many of the likeliest tokens are reported for each position, 0 to 20; implies
            ``logprobs`` [0].
        echo: Whether the result begins with the prompt [False].
        token_ids: Whether the result contains the token ids [False].
        request_id: Identifies the request in the server's log [the server creates an id].
        json_schema: The answer is JSON that matches this schema, a mapping or its text. At most one
            of this and the next four options may be set [none].
        json_object: The answer is any JSON object [False].
        regex: The answer matches this as a whole, in the syntax of Rust's ``regex`` [none].
        grammar: The answer matches a context-free grammar, in Lark's syntax or GBNF [none].
        choice: The answer is one of these texts [none].
        tools: The tools that the model may call, in OpenAI's format. This and the next four options
            are for conversations only [none].
        chat_template_kwargs: More variables for the chat template, such as ``enable_thinking``: a
            mapping, or its JSON [none].
        add_generation_prompt: Whether the prompt ends with the beginning of the assistant's turn
            [True, unless ``continue_final_message``].
        continue_final_message: Whether the answer continues the last message [False].
        chat_template: A chat template to use instead, if the server allows it [none].
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
    chat_template_kwargs: Mapping[str, Any] | str | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    chat_template: str | None


# Options of conversations only.
_OF_CHATS = (
    *("tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"),
    "chat_template",
)
_CONSTRAINTS = ("json_schema", "json_object", "regex", "grammar", "choice")
_PROMPTS = "text, token ids or messages"
_Request = TypeVar("_Request")


def filled(request: _Request, **values: Any) -> _Request:
    """The request of a call, with its fields set from the arguments of that call.

    Args:
        request: An empty message.
        **values: The values by the names of the request's fields, or of the fields of a message in
            it. None leaves an optional field unset; ``prompt`` and ``inputs`` take any form of a
            prompt.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value does not fit its field, such as a negative count.
    """
    for name, value in values.items():
        if convert := _CONVERSIONS.get(name):
            convert(request, value)
        elif value is not None or name == "name":
            fill(_part_with(request, name), {name: value})
    return request


def _part_with(request: Any, name: str) -> Any:
    """The message that has a field: the request, or one of the messages in it."""
    for field in request.DESCRIPTOR.fields:
        part = None if field.is_repeated else field.message_type
        if part is not None and name in part.fields_by_name:
            return getattr(request, field.name)
    return request


def generate_request(prompt: Prompt, options: GenerateOptions) -> inference_pb2.GenerateRequest:
    """The request of ``Generate`` and ``GenerateStream``; errors as in :func:`filled`."""
    known = GenerateOptions.__annotations__
    if unknown := options.keys() - known.keys():
        name = min(unknown)
        raise TypeError(say("UNKNOWN_OPTION", name=name, closest=closest(name, list(known))))
    values = given(**options)
    constraints = [name for name in _CONSTRAINTS if name in values]
    if len(constraints) > 1:
        raise ValueError(say("SEVERAL_CONSTRAINTS", names=", ".join(constraints)))
    if values.get("top_n"):
        values.setdefault("logprobs", True)
    request = inference_pb2.GenerateRequest()
    set_input(request, prompt)
    for name in _OF_CHATS:
        if values.get(name) not in (None, []) and request.WhichOneof("input") != "chat":
            raise ArgumentTypeError(name, say("NEEDS_FIELD", other="messages"))
    return filled(request, **values)


def _set_bias(request: Any, bias: Any) -> None:
    with named("logit_bias", bias):
        request.sampling.logit_bias.update(bias)


def _set_choice(request: Any, choice: Any) -> None:
    request.choice.SetInParent()
    extend("choice", request.choice.texts, choice, is_text=True)


def _set_tools(request: Any, tools: Any) -> None:
    for index, tool in enumerate(several("tools", tools, "a list of tools")):
        request.chat.tools.append(to_tool(f"tools[{index}]", tool))


def _set_json(name: str, request: Any, value: Any) -> None:
    fill(_part_with(request, name), {name: _json(name, value)})


def _json(name: str, value: Any) -> str:
    """The JSON of an argument: a mapping, or the text itself."""
    if isinstance(value, str):
        return value
    if not isinstance(value, Mapping):
        raise not_of_type(name, "a mapping or JSON", value)
    return as_json(name, value)


def set_inputs(request: Any, inputs: str | Sequence[Prompt]) -> None:
    """Add an ``Input`` for each prompt; a plain text is a single prompt."""
    prompts = [inputs] if isinstance(inputs, str) else _items("inputs", inputs)
    for index, prompt in enumerate(prompts):
        set_input(
            request.inputs.add(), prompt, "inputs" if prompt is inputs else f"inputs[{index}]"
        )


def set_input(request: Any, prompt: Prompt, place: str = "") -> None:
    """Set the request's ``input`` by the prompt's type; an empty sequence counts as token ids.

    Args:
        request: The request that gets the input.
        prompt: Text, token ids or turns.
        place: The name of the prompt in errors, if it is one of several.

    Raises:
        TypeError: The prompt is neither text nor token ids nor a conversation.
        ValueError: A token id is negative or too large, or a text is not UTF-8.
    """
    name = place or "prompt"
    if isinstance(prompt, str):
        check_text(name, prompt)
        request.prompt = prompt
        return
    check_is_no_turn(name, prompt)
    items = _items(name, prompt)
    if any(map(is_like_a_turn, items)):
        request.chat.messages.extend(to_messages(place or "messages", items))
    else:
        request.token_ids.SetInParent()
        extend(name, request.token_ids.ids, items)


def _items(name: str, value: Any) -> list[Any]:
    """The items of a value. Rejects numpy's scalars, which look iterable but are not."""
    try:
        return list(several(name, value, _PROMPTS))
    except TypeError:
        raise not_of_type(name, _PROMPTS, value) from None


def _set_path(request: Any, path: Any) -> None:
    with named("path", path):
        request.path = os.fspath(path)


def _set_drain(request: Any, seconds: float | None) -> None:
    if seconds is not None:
        with named("drain_seconds", seconds):
            request.timeout.FromNanoseconds(round(seconds * 1e9))


# Arguments that are not simply the value of a scalar field of the same name.
_CONVERSIONS: dict[str, Callable[[Any, Any], None]] = {
    "adapters": lambda request, adapters: request.adapters.extend(to_mix(adapters)),
    "prompt": set_input,
    "inputs": set_inputs,
    "path": _set_path,
    "drain_seconds": _set_drain,
    "stop": lambda request, stop: extend(
        "stop", request.stop.stop_strings, [stop] if isinstance(stop, str) else stop, is_text=True
    ),
    "stop_token_ids": lambda request, ids: extend(
        "stop_token_ids", request.stop.stop_token_ids, ids
    ),
    "targets": lambda request, targets: extend(
        "targets", request.config.targets, targets, "a list of modules", is_text=True
    ),
    "logit_bias": _set_bias,
    "choice": _set_choice,
    "tools": _set_tools,
    **{name: partial(_set_json, name) for name in ("json_schema", "chat_template_kwargs")},
}


# Maximum number of tokens in one request of a pass. A request with more could take longer than the
# default deadline on a busy server.
_MOST_TOKENS = 4096
# The server's limit on the sequences of a request.
_MOST_DATA = 1024


@dataclass(frozen=True, slots=True)
class TrainingDatum:
    """A sequence with the inputs of its loss, one number for each token.

    Attributes:
        token_ids: The tokens that the model reads.
        target_ids: The token whose log probability is computed at each position, usually the next
            one.
        weights: For ``cross_entropy``: the weight of each target; empty for 1.
        logprobs: For other losses: the log probability with which each target was sampled.
        advantages: For other losses: the advantage of each target.
    """

    token_ids: Sequence[int]
    target_ids: Sequence[int]
    weights: Sequence[float] = ()
    logprobs: Sequence[float] = ()
    advantages: Sequence[float] = ()


def pass_requests(
    model_id: str,
    data: Sequence[TrainingDatum],
    loss: str,
    loss_config: Mapping[str, float] | None,
    forward_only: bool,
) -> Iterator[training_pb2.ForwardBackwardRequest]:
    """The requests of a pass, each with as many sequences as fit.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value does not fit its field.
    """
    head = training_pb2.ForwardBackwardRequest()
    filled(head, model_id=model_id, loss=loss, forward_only=forward_only)
    for name, value in (loss_config or {}).items():
        with named(f"loss_config.{name}", value):
            head.loss_config[name] = value
    request, count = _copy(head), 0
    for index, datum in enumerate(several("data", data, "a list of sequences")):
        if not isinstance(datum, TrainingDatum):
            raise not_of_type(f"data[{index}]", "a TrainingDatum", datum)
        if request.data and (
            count + len(datum.token_ids) > _MOST_TOKENS or len(request.data) == _MOST_DATA
        ):
            yield request
            request, count = _copy(head), 0
        _add(request.data.add(), datum, f"data[{index}]")
        count += len(datum.token_ids)
    yield request


def _copy(head: training_pb2.ForwardBackwardRequest) -> training_pb2.ForwardBackwardRequest:
    request = training_pb2.ForwardBackwardRequest()
    request.CopyFrom(head)
    return request


def _add(message: training_pb2.TrainingDatum, datum: TrainingDatum, path: str) -> None:
    for name in ("token_ids", "target_ids", "weights", "logprobs", "advantages"):
        extend(f"{path}.{name}", getattr(message, name), getattr(datum, name))
