"""Chat and completions over HTTP: the engine's requests, and rejections."""

from __future__ import annotations

import json
from typing import Any

import pytest
from servers.http_harness import HttpHarness, Refused, http_harness

from turret.server.constraints.grammar import ConstraintSpec
from turret.server.engine.scheduling.request import Request, SamplingParams
from turret.server.errors import (
    AdapterClassifiesError,
    AdapterExistsError,
    InvalidRequestError,
    MergeActiveError,
    TurretError,
)
from turret.server.http.refusals import STEPS
from turret.server.http.schemas.requests import Generating

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}
TURNS = [{"role": "user", "content": "hi"}]


async def asked(server: HttpHarness, path: str = COMPLETIONS, **body: Any) -> Request:
    """The engine's request for an answered request."""
    given = {"messages": TURNS} if path == CHAT else {"prompt": "a"}
    answer = await server.post(path, {"model": "base", **given, **body})
    assert answer.status_code == 200, answer.text
    return server.engine.requests[-1]


async def test_every_field_reaches_the_engine() -> None:
    async with http_harness() as server:
        request = await asked(
            server,
            temperature=0.5,
            top_p=0.25,
            top_k=7,
            min_p=0.125,
            seed=-1,
            presence_penalty=-1,
            frequency_penalty=1.5,
            repetition_penalty=2,
            logit_bias={"5": -100, "7": 1.5},
            max_tokens=9,
            min_tokens=3,
            stop=["x", "y"],
            stop_token_ids=[3],
            ignore_eos=True,
            include_stop_str_in_output=True,
            logprobs=2,
            echo=True,
        )
        sampling, stop, options = request.sampling, request.stop, request.options
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.25, 7)
        assert (sampling.min_p, sampling.seed) == (0.125, (1 << 64) - 1)
        assert (sampling.presence_penalty, sampling.frequency_penalty) == (-1, 1.5)
        assert (sampling.repetition_penalty, sampling.logit_bias) == (2, {5: -100, 7: 1.5})
        assert (stop.max_tokens, stop.min_tokens, stop.stop_strings) == (9, 3, ("x", "y"))
        assert (stop.stop_token_ids, stop.ignore_eos, stop.include_stop) == ({3}, True, True)
        assert (options.logprobs, options.top_n, options.echo) == (True, 2, True)


async def test_omitted_fields_have_their_defaults() -> None:
    async with http_harness() as server:
        request = await asked(server, temperature=None, stop=None, logit_bias=None, n=None)
        assert (request.sampling.temperature, request.sampling.seed) == (1.0, None)
        assert request.stop.max_tokens == 16
        request = await asked(server, CHAT, top_k=-1, stop="x", foo={"bar": [1]}, user="me")
        assert request.stop.max_tokens is None
        assert (request.stop.stop_strings, request.sampling.top_k) == (("x",), 0)
        request = await asked(server, CHAT, max_tokens=3, max_completion_tokens=4)
        assert request.stop.max_tokens == 4
        request = await asked(server, CHAT, logprobs=True, top_logprobs=3)
        assert (request.options.logprobs, request.options.top_n) == (True, 3)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": "json_object"}, "response_format"),
        ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"json": 3}}, "structured_outputs.json"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
        ({"guided_choice": ["x" * 40000] * 2}, "guided_choice"),
        ({"grammar": {"type": "regex", "value": "a"}}, "grammar"),
        ({"choice": "a"}, "choice"),
        ({"guided_grammar": "x" * 70000}, "guided_grammar"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
        ({"structural_tag": {}}, "structural_tag"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"stream": 1}, "stream"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 1e300}, "temperature"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"seed": 1 << 64}, "seed"),
        ({"stop": 3}, "stop"),
        ({"stop": ["a", 3]}, "stop[1]"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 10**400}}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "function", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "contents": "hi"}]}, "messages[0].contents"),
        ({"messages": [{"role": "system", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "tool_call_id": "a"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
        ),
    ],
)
async def test_unsupported_values_are_rejected(body: dict[str, Any], param: str) -> None:
    async with http_harness() as server:
        sent = {"model": "base", "messages": TURNS, **body}
        answer = await server.client.post(CHAT, content=json.dumps(sent), headers=JSON)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param), error
        assert server.engine.requests == []


@pytest.mark.parametrize("name", ["suffix", "prompt_embeds", "functions", "function_call"])
async def test_chat_and_completions_refuse_the_same_values(name: str) -> None:
    async with http_harness() as server:
        for path, sent in ((CHAT, {"messages": TURNS}), (COMPLETIONS, {"prompt": "a"})):
            refused = await server.refused(path, {"model": "base", name: "x", **sent})
            assert (refused.status, refused.param) == (400, name), path
            assert refused.code in ("not_supported", "not_supported_use")


async def test_unsupported_fields_with_neutral_values_are_accepted() -> None:
    async with http_harness() as server:
        await asked(
            server, CHAT, tools=[], tool_choice="auto", response_format={"type": "text"},
            modalities=["text"], use_beam_search=False, guided_json=None, best_of=1,
            stream_options=None, parallel_tool_calls=True, metadata={"a": "b"}, store=True,
        )  # fmt: skip
        await asked(server, CHAT, suffix="", add_special_tokens=False, function_call="auto")
        await asked(server, suffix="", functions=[], function_call="auto")
        await asked(server, suffix="", add_special_tokens=True, length_penalty=1.0)


async def test_huge_token_limits_are_left_to_the_context_check() -> None:
    async with http_harness() as server:
        for name in ("max_tokens", "max_completion_tokens"):
            request = await asked(server, CHAT, **{name: 10**12})
            assert request.stop.max_tokens == (1 << 32) - 1
        refused = await server.refused(CHAT, {"messages": TURNS, "model": "base", "max_tokens": -2})
        assert (refused.param, refused.code) == ("max_tokens", "too_small")


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        (CHAT, {"max_tokens": 0}, "max_tokens", "too_small"),
        (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens", "too_small"),
        ("/v1/responses", {"max_tokens": 0}, "max_tokens", "too_small"),
        (COMPLETIONS, {"max_tokens": -1}, "max_tokens", "too_small"),
        (COMPLETIONS, {"min_tokens": 17}, "min_tokens", "exceeds_field"),
        (CHAT, {"min_tokens": 3, "max_tokens": 2}, "min_tokens", "exceeds_field"),
        (CHAT, {"min_tokens": 3, "max_completion_tokens": 2}, "min_tokens", "exceeds_field"),
        ("/v1/responses", {"min_tokens": 3, "max_output_tokens": 2}, "min_tokens", "exceeds_field"),
        (CHAT, {"min_tokens": -1}, "min_tokens", "too_small"),
        (CHAT, {"top_k": -2}, "top_k", "too_small"),
        (COMPLETIONS, {"logprobs": -1}, "logprobs", "too_small"),
        (COMPLETIONS, {"logprobs": 21}, "logprobs", "too_large"),
        (CHAT, {"logprobs": True, "top_logprobs": -1}, "top_logprobs", "too_small"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "too_large"),
        ("/v1/responses", {"top_logprobs": 21}, "top_logprobs", "too_large"),
        (CHAT, {"top_p": 0}, "top_p", "not_above"),
        (CHAT, {"response_format": "json_object"}, "response_format", "wrong_type"),
        (CHAT, {"messages": None, "prompt": "a"}, "messages", "required"),
        (COMPLETIONS, {"prompt": None, "messages": TURNS}, "prompt", "required"),
        ("/v1/responses", {"input": None, "messages": TURNS}, "input", "required"),
        (CHAT, {"guided_json": {}, "regex": "a"}, "regex", "several_constraints"),
        (CHAT, {"stop": ["a"] * 17}, "stop", "too_many_entries"),
        (CHAT, {"stop": "a" * 257}, "stop[0]", "too_many_characters"),
        (CHAT, {"cache_salt": "a" * 257}, "cache_salt", "too_many_characters"),
    ],
)
async def test_each_fault_has_one_field_and_one_reason(
    path: str, body: dict[str, Any], param: str, code: str
) -> None:
    given = {CHAT: {"messages": TURNS}, COMPLETIONS: {"prompt": "a"}}.get(path, {"input": "a"})
    async with http_harness() as server:
        refused = await server.refused(path, {"model": "base", **given, **body})
        assert (refused.status, refused.param, refused.code) == (400, param, code)
        assert refused.violations == {param: code}


@pytest.mark.parametrize(
    ("sent", "param"),
    [
        (b'"temperature": 1e999', "temperature"),
        (b'"guided_json": {"maximum": 1e999}', "guided_json"),
        (b'"tools": [{"function": {"parameters": {"a": 1e999}}}]', "tools[0].function.parameters"),
    ],
)
async def test_numbers_that_no_float_holds_are_refused(sent: bytes, param: str) -> None:
    body = b'{"model": "base", "messages": [{"role": "user", "content": "a"}], %b}' % sent
    async with http_harness() as server:
        refused = Refused.of(await server.client.post(CHAT, content=body, headers=JSON))
        assert refused.violations[param] == "number_too_large"


def test_the_ranges_of_fields_match_the_engine() -> None:
    """Both accept each bound, and neither accepts a value beyond it."""
    for name, info in Generating.model_fields.items():
        if name not in SamplingParams.__dataclass_fields__:
            continue
        for bound in info.metadata:
            limit = getattr(bound, "ge", getattr(bound, "le", getattr(bound, "gt", None)))
            if limit is None or name in ("seed", "top_k"):
                continue
            step = -0.001 if hasattr(bound, "le") else 0.001
            SamplingParams(**{name: limit + step})
            with pytest.raises(InvalidRequestError):
                SamplingParams(**{name: limit - step})


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (AdapterClassifiesError.of("adapters", "a"), "adapter_classifies"),
        (AdapterExistsError("is taken"), "adapter_exists"),
        (MergeActiveError("is merged"), "merge_active"),
    ],
)
async def test_a_hint_names_a_path_of_this_api(error: TurretError, code: str) -> None:
    async with http_harness() as server:
        server.engine.refuse = error
        refused = await server.refused("/classify", {"model": "base", "input": "a"})
        assert refused.code == code
        assert refused.message.endswith(STEPS[error.reason])


async def test_a_chat_is_rendered_from_its_turns() -> None:
    async with http_harness() as server:
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        turns = [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": parts, "name": "me"},
            {"role": "assistant", "content": None},
        ]
        request = await asked(server, CHAT, messages=turns)
        assert bytes(request.prompt_token_ids) == b"system:s;user:ab;assistant:;"


@pytest.mark.parametrize(
    ("body", "spec"),
    [
        ({"response_format": {"type": "json_object"}}, ("json_object",)),
        (
            {"response_format": {"type": "json_schema", "json_schema": {
                "name": "x", "strict": True, "schema": {"type": "string", "pattern": "\u00e9"}
            }}},
            ("json_schema", '{"type": "string", "pattern": "\u00e9"}'),
        ),
        ({"structured_outputs": {"json": {"type": "null"}}}, ("json_schema", '{"type": "null"}')),
        ({"structured_outputs": {"json": "{}"}}, ("json_schema", "{}")),
        ({"structured_outputs": {"json_object": True}}, ("json_object",)),
        ({"structured_outputs": {"regex": "a+", "disable_any_whitespace": False}}, ("regex", "a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, ("choice", "a", "b")),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, ("grammar", 'start: "a"')),
        ({"guided_json": {"type": "null"}}, ("json_schema", '{"type": "null"}')),
        ({"guided_regex": "a", "guided_choice": None}, ("regex", "a")),
        ({"regex": "a", "response_format": {"type": "text"}}, ("regex", "a")),
        ({"guided_choice": ["a"]}, ("choice", "a")),
        ({"guided_grammar": "x"}, ("grammar", "x")),
        ({"json_schema": "{}"}, ("json_schema", "{}")),
        ({"regex": "b"}, ("regex", "b")),
        ({"ebnf": "root ::= b"}, ("grammar", "root ::= b")),
        ({"grammar": "root ::= b"}, ("grammar", "root ::= b")),
        ({"choice": ["a", "b"]}, ("choice", "a", "b")),
        ({"json_object": True}, ("json_object",)),
        ({"structured_outputs": {"json_object": False}}, None),
        ({"structured_outputs": {}, "response_format": None}, None),
    ],
)  # fmt: skip
async def test_constraints_in_every_form(
    body: dict[str, Any], spec: tuple[Any, ...] | None
) -> None:
    expected = None if spec is None else ConstraintSpec(spec[0], spec[1:])
    async with http_harness() as server:
        for path, prompt in ((CHAT, {"messages": TURNS}), (COMPLETIONS, {"prompt": "a"})):
            request = await asked(server, path, **prompt, **body)
            assert request.constraint == expected
