"""Conversion of the bodies of requests to the messages of ``turret.v1``.

Functions that take the dictionary ``names`` add the client's names for fields of ``turret.v1`` to
it, by field path, so that errors report the fields that the client sent (see ``Exchange``).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from turret.server.api.limits import MAX_MIX_MEMBERS, MAX_NAME_CHARS, MAX_WEIGHT
from turret.server.api.violations import Violations, adapter_refs
from turret.server.basics.names import ADAPTER_NAME, BASE
from turret.server.errors import AdapterNotFoundError, InvalidRequestError
from turret.server.http.endpoint import Exchange
from turret.server.http.fields import Sent, closed, not_one_of
from turret.server.http.request_models import (
    Asking,
    ChatOnly,
    FunctionTool,
    Generating,
    InputsRequest,
    Message,
    MixMember,
    TextFormat,
    WithTools,
)
from turret.server.words import say
from turret.v1 import adapters_pb2, inference_pb2

_SHOWN_CHARS = 40
# The limit leaves room for generations, weights of 32 characters, blanks and a prefix.
_MOST_MODEL_CHARS = 2 * MAX_MIX_MEMBERS * (MAX_NAME_CHARS + 32)
_MOST_ECHOED = 200

# Adapter names contain no plus, star, colon or at sign.
_MEMBER = re.compile(
    rf"(?P<name>{ADAPTER_NAME.pattern})(?:@(?P<generation>[0-9]{{1,19}}))?(?:\*(?P<weight>.*))?",
    re.DOTALL,
)
_WEIGHT = re.compile(r"-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")

NamedMix = list[adapters_pb2.AdapterWeight]


def named_in(raw: dict[str, Any], base_name: str) -> tuple[NamedMix, list[tuple[str, str]]]:
    """The mix that a parsed request names, and the errors in it.

    The request may be invalid, because metrics also count rejected requests for the adapters that
    they name.

    Raises:
        AdapterNotFoundError: See ``read_model``.
    """
    model, typed = raw.get("model"), raw.get("adapters")
    mix, invalid = read_model(model, base_name) if isinstance(model, str) else ([], [])
    wrong: list[tuple[str, str]] = [("model", why) for why in invalid]
    if isinstance(typed, list) and typed:
        if mix:
            wrong.append(("adapters", say("NEEDS_BASE_MODEL")))
        names = (each.get("name") for each in typed[:MAX_MIX_MEMBERS] if isinstance(each, dict))
        mix = [adapters_pb2.AdapterWeight(name=name) for name in names if isinstance(name, str)]
    return mix, wrong


def mix_of(members: list[MixMember]) -> NamedMix:
    """The mix that the field ``adapters`` lists."""
    return [
        adapters_pb2.AdapterWeight(
            name=member.name, weight=member.weight, generation=member.generation
        )
        for member in members
    ]


def read_model(model: str, base_name: str) -> tuple[NamedMix, list[str]]:
    """The mix that a model name refers to, empty for the base model, and the errors in it.

    ``base`` and the base model's name mean the base. ``sql`` is an adapter, ``sql@2`` one of its
    generations, and ``sql+json*-0.5`` a mix. The prefix ``BASE:`` (``base:`` or the base model's
    name) is allowed before an adapter or a mix.

    Raises:
        AdapterNotFoundError: The name has none of these forms.
    """
    if model in (BASE, base_name):
        return [], []
    if model.lower() == base_name.lower():
        raise _no_model(model, base_name)
    if len(model) > _MOST_MODEL_CHARS:
        return [], [say("TOO_MANY_CHARACTERS", most=_MOST_MODEL_CHARS, found=len(model))]
    rest = model
    for prefix in (base_name, BASE):
        if model.startswith(f"{prefix}:"):
            rest = model[len(prefix) + 1 :]
            break
    mix: NamedMix = []
    wrong: list[str] = []
    for part in rest.split("+"):
        match = _MEMBER.fullmatch(part.strip())
        if match is None:
            raise _no_model(model, base_name)
        name, generation, weight = match["name"], match["generation"], match["weight"]
        number = None if generation is None else int(generation)
        mix.append(adapters_pb2.AdapterWeight(name=name, generation=number))
        if weight is not None and _WEIGHT.fullmatch(weight) and abs(float(weight)) <= MAX_WEIGHT:
            mix[-1].weight = float(weight)
        elif weight is not None:
            wrong.append(say("NOT_A_WEIGHT", name=name, weight=weight[:_SHOWN_CHARS]))
    violations = Violations()
    adapter_refs(mix, violations)
    return mix, [*wrong, *(why for _, why in violations.found)]


def _no_model(model: str, base_name: str) -> AdapterNotFoundError:
    """The error for a model name of no known form."""
    shown = model[:_MOST_ECHOED]
    if model.lower() == base_name.lower():
        text = say("NO_SUCH_MODEL", model=shown, closest=base_name)
    elif not set("=*+@").isdisjoint(model):
        text = say("MODEL_NOT_A_MIX", model=shown, step="sql+json*-0.5")
    else:
        text = say("NO_SUCH_MODEL", model=shown)
    return AdapterNotFoundError(text, metadata={"adapter": shown})


_Message = inference_pb2.GenerateRequest
_A = TypeVar("_A", bound=Asking)
_WithInput = TypeVar("_WithInput", inference_pb2.Input, inference_pb2.GenerateRequest)

_CHAT_INPUT_NAMES = {"inputs": "messages", "inputs[0].chat.": ""}
# OpenAI's newer name for the role that chat templates call ``system``.
_ROLES = {"developer": "system"}


def read_request(
    exchange: Exchange, kind: type[_A]
) -> tuple[inference_pb2.GetModelResponse, _A, NamedMix]:
    """The base model, the body of a request, and the adapters that it names.

    Raises:
        AdapterNotFoundError: ``model`` is neither the base model, an adapter nor a mix.
        InvalidRequestError: Lists all errors in the request.
    """
    # Take the body first, so that it is freed before a refusal is sent.
    sent: Sent[_A] = exchange.take_body()
    info = exchange.services.inference.model()
    mix, wrong = named_in(sent.raw, info.name)
    exchange.call.about(mix)
    if wrong or sent.wrong:
        # These errors already contain the client's field names, so no path must be translated.
        exchange.names.clear()
        Violations([*wrong, *sent.wrong]).raise_if_any()
    assert isinstance(sent.body, kind)
    if sent.body.timeout is not None:
        exchange.call.deadline = time.monotonic() + sent.body.timeout
    # Report errors of the mix as a whole under the field that contains the mix.
    place = "adapters" if sent.body.adapters else "model"
    exchange.names.update(name=place, adapters=place)
    return info, sent.body, mix_of(sent.body.adapters) or mix


@dataclass(slots=True, kw_only=True)
class Asked:
    """A request without its prompt.

    Attributes:
        model: The name in the request, which the answer repeats.
        message: Everything but the input.
        num_choices: The number of answers to each prompt.
        is_stream: Whether the answer is sent as events.
        includes_usage: Whether the last event contains the usage.
        names_ids: Whether log probabilities name tokens by their ids.
    """

    model: str
    message: _Message
    num_choices: int
    is_stream: bool
    includes_usage: bool
    names_ids: bool


def asked_of(body: Generating, mix: NamedMix, names: dict[str, str]) -> Asked:
    """Convert a request for an answer, and add the names of its fields to ``names``.

    Raises:
        InvalidRequestError: The request has several constraints or contradictory limits.
    """
    message = _Message(
        adapters=mix,
        cache_salt=body.cache_salt,
        sampling=_sampling(body),
        stop=_stop(body, names),
    )
    _set_constraint(body, message, names)
    includes_usage = body.stream_options.include_usage and body.stream
    message.options.running_usage = includes_usage and body.stream_options.continuous_usage_stats
    return Asked(
        model=body.model,
        message=message,
        num_choices=body.n,
        is_stream=body.stream,
        includes_usage=includes_usage,
        names_ids=body.return_tokens_as_token_ids,
    )


# Fields that have the same name and meaning in turret.v1.
_SAMPLING = (
    *("temperature", "top_p", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "logit_bias"),
)


def _sampling(body: Generating) -> inference_pb2.SamplingParams:
    return inference_pb2.SamplingParams(
        # vLLM disables top_k with -1, turret with 0.
        top_k=None if body.top_k is None else max(body.top_k, 0),
        seed=None if body.seed is None else body.seed % (1 << 64),
        **{name: getattr(body, name) for name in _SAMPLING},
    )


def _stop(body: Generating, names: dict[str, str]) -> inference_pb2.StopConditions:
    limit, name = body.max_tokens, "max_tokens"
    if body.max_completion_tokens is not None:
        limit, name = body.max_completion_tokens, "max_completion_tokens"
    if limit is not None:
        names |= dict.fromkeys(("stop.max_tokens", "max_tokens"), name)
    return inference_pb2.StopConditions(
        max_tokens=limit,
        min_tokens=body.min_tokens or None,
        ignore_eos=body.ignore_eos,
        include_stop=body.include_stop_str_in_output or body.include_stop,
        stop_strings=body.stop,
        stop_token_ids=body.stop_token_ids,
    )


# The fields of other servers' APIs for each kind of constraint. ``structured_outputs`` also has one
# field per kind.
_CONSTRAINTS = {
    "json_schema": ("guided_json", "json_schema"),
    "json_object": ("guided_json_object", "json_object"),
    "regex": ("guided_regex", "regex"),
    "grammar": ("guided_grammar", "grammar", "ebnf"),
    "choice": ("guided_choice", "choice"),
}


def _set_constraint(body: Generating, message: _Message, names: dict[str, str]) -> None:
    """Set the constraint of the answer. A request may have one, in any form that clients use."""
    outputs, form = body.structured_outputs, body.response_format
    found: dict[str, tuple[str, Any]] = {}
    for kind, fields in _CONSTRAINTS.items():
        found |= {name: (kind, getattr(body, name)) for name in fields}
        if outputs is not None:
            name = "json" if kind == "json_schema" else kind
            value = outputs.json_ if name == "json" else getattr(outputs, name)
            found[f"structured_outputs.{name}"] = kind, value
    # Some clients always send an empty grammar. Like false and null, it asks for nothing.
    if not body.grammar:
        del found["grammar"]
    if form is not None:
        found["response_format"] = "json_object", form.type == "json_object"
    if form is not None and form.type == "json_schema" and form.json_schema is not None:
        place = "response_format.json_schema.schema"
        found[place] = "json_schema", form.json_schema.schema_
    asked = {name: each for name, each in found.items() if each[1] not in (None, False)}
    # Some clients send the same constraint in several fields, which is not an error.
    if len({repr(each) for each in asked.values()}) > 1:
        text = say("SEVERAL_CONSTRAINTS", names=", ".join(asked))
        raise InvalidRequestError.of(list(asked)[1], text)
    for name, (kind, value) in asked.items():
        if kind == "choice":
            # The choices are a plain list here, but a message with ``texts`` in turret.v1.
            message.choice.texts[:] = value
            names["choice.texts"] = name
        else:
            setattr(message, kind, value)
            names[kind] = name


def set_text_format(
    form: TextFormat | None, message: _Message, names: dict[str, str], place: str
) -> None:
    """Set the constraint in ``place.format``, which is a flat form of ``response_format``."""
    if form is None or form.type == "text":
        return
    if message.WhichOneof("constraint") is not None:
        why = say("SEVERAL_CONSTRAINTS", names=f"{place}.format")
        raise InvalidRequestError.of(f"{place}.format.type", why)
    if form.type == "json_object":
        message.json_object = True
        names["json_object"] = f"{place}.format"
    else:
        message.json_schema = json.dumps(closed(form.schema_), ensure_ascii=False)
        names["json_schema"] = f"{place}.format.schema"


def set_rendering(body: ChatOnly, chat: inference_pb2.Chat) -> None:
    """Set how a conversation is rendered.

    Template variables in the request take precedence over those that follow from its effort.
    """
    variables = dict(body.chat_template_kwargs)
    if body.effort is not None:
        variables.setdefault("reasoning_effort", body.effort)
        variables.setdefault("enable_thinking", body.effort != "none")
    if variables:
        chat.chat_template_kwargs = json.dumps(variables, ensure_ascii=False)
    if body.add_generation_prompt is not None:
        chat.add_generation_prompt = body.add_generation_prompt
    chat.continue_final_message = body.continue_final_message
    chat.chat_template = body.chat_template


def chat_of(messages: list[Message], body: ChatOnly) -> inference_pb2.Chat:
    """A conversation with these messages and the rendering options of ``body``."""
    chat = inference_pb2.Chat()
    set_rendering(body, chat)
    for each in messages:
        turn = chat.messages.add(
            role=_ROLES.get(each.role, each.role),
            content=each.content or "",
            tool_call_id=each.tool_call_id,
        )
        for call in each.tool_calls:
            function = call.function
            turn.tool_calls.add(id=call.id, name=function.name, arguments=function.arguments)
    return chat


def inputs_of(body: InputsRequest, names: dict[str, str]) -> list[inference_pb2.Input]:
    """The entries of ``input``, or the single conversation in vLLM's field ``messages``."""
    if body.messages is not None:
        names.update(_CHAT_INPUT_NAMES)
        return [inference_pb2.Input(chat=chat_of(body.messages, body))]
    inputs = []
    for index, (place, value) in enumerate((body.input or {}).items()):
        names.update(
            {f"inputs[{index}]{within}": f"input{place}" for within in ("", ".token_ids.ids")}
        )
        inputs.append(with_input(inference_pb2.Input(), value))
    return inputs


def with_input(message: _WithInput, value: str | list[int]) -> _WithInput:
    """The message with a text or token ids as its input."""
    if isinstance(value, str):
        message.prompt = value
    else:
        message.token_ids.ids.extend(value)
    return message


# Tools and the tool choice.


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How tools may appear in the answer.

    Attributes:
        tools: The JSON schemas of the arguments of callable tools, by name. An empty schema allows
            no arguments; the dict is empty if no tool may be called.
        must_call: Whether the answer must consist of calls.
        is_parallel: Whether the answer may have several calls.
        paths: Where the request contains the schema of a tool's arguments, by the tool's name.
    """

    tools: Mapping[str, Mapping[str, Any]]
    must_call: bool
    is_parallel: bool
    paths: Mapping[str, str]


def tools_of(
    tools: Sequence[FunctionTool],
    choice: Any,
    is_parallel: bool | None,
    chat: inference_pb2.Chat,
    place: str = "parameters",
) -> ToolUse:
    """How a request uses its tools; adds those that the model may see to ``chat``.

    Args:
        tools: The functions in ``tools`` of the request.
        choice: See ``ToolChoice``.
        is_parallel: Whether the answer may have several calls; None if the request leaves it open.
        chat: The conversation that receives the tools.
        place: The path, within an entry of ``tools``, of the schema of its arguments.

    Raises:
        InvalidRequestError: ``tool_choice`` is invalid, or requires a tool that is not there.
    """
    functions: dict[str, FunctionTool] = {}
    paths: dict[str, str] = {}
    for index, function in enumerate(tools):
        paths[function.name] = f"tools[{index}].{place}"
        functions[function.name] = function
        schema = json.dumps(function.parameters, ensure_ascii=False) if function.parameters else ""
        chat.tools.add(name=function.name, description=function.description, parameters=schema)
    names, must_call = _chosen(choice, tuple(functions))
    if not must_call:
        # Hide tools that the model may not call. Required calls are enforced by the grammar.
        shown = [tool for tool in chat.tools if tool.name in set(names)]
        del chat.tools[:]
        chat.tools.extend(shown)
    if is_parallel is None:
        # Clients that force a call read only the first one.
        is_parallel = not must_call
    return ToolUse(
        {name: functions[name].parameters for name in names}, must_call, is_parallel, paths
    )


def tools_in(body: WithTools, chat: inference_pb2.Chat) -> ToolUse:
    """How a request in the form of chat completions uses its tools; see ``tools_of``."""
    functions = [tool.function for tool in body.tools]
    choice, is_parallel = body.tool_choice, body.parallel_tool_calls
    return tools_of(functions, choice, is_parallel, chat, "function.parameters")


def _chosen(choice: Any, names: tuple[str, ...]) -> tuple[tuple[str, ...], bool]:
    """The tools that may be called, and whether the answer must consist of calls."""
    if choice == "none":
        return (), False
    if choice == "auto":
        return names, False
    if choice == "required":
        if not names:
            raise InvalidRequestError.of("tool_choice", say("NEEDS_FIELD", other="tools"))
        return names, True
    if choice.get("type") == "allowed_tools":
        is_flat = not isinstance(choice.get("allowed_tools"), dict)
        place = "tool_choice" if is_flat else "tool_choice.allowed_tools"
        return _allowed(choice if is_flat else choice["allowed_tools"], names, place)
    name = _function_name(choice)
    if choice.get("type") != "function" or name not in names:
        raise InvalidRequestError.of("tool_choice", say("UNKNOWN_TOOL"))
    return (name,), True


def _allowed(
    allowed: dict[str, Any], names: tuple[str, ...], place: str
) -> tuple[tuple[str, ...], bool]:
    mode, tools = allowed.get("mode"), allowed.get("tools")
    if mode not in ("auto", "required"):
        why = not_one_of(mode, "auto, required")
        raise InvalidRequestError.of(f"{place}.mode", why)
    found = {_function_name(each) for each in tools} if isinstance(tools, list) else set()
    if not found or not found <= set(names):
        raise InvalidRequestError.of(f"{place}.tools", say("UNKNOWN_TOOL"))
    return tuple(name for name in names if name in found), mode == "required"


def _function_name(value: Any) -> str:
    """The name in a tool or a tool choice, at its top level or in ``function``; "" if missing."""
    function = value.get("function", value) if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""
