"""Chat and completions over HTTP: the engine's requests, and rejections."""

from __future__ import annotations

from typing import Any

import pytest
from servers.http_harness import VALID, HttpHarness, Refused

from turret.server import errors
from turret.server.constraints.grammar import ConstraintSpec
from turret.server.engine.scheduling.request import Request, SamplingParams
from turret.server.http.refusals import STEPS
from turret.server.http.request_models import Generating
from turret.server.words import say

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}


async def asked(server: HttpHarness, path: str = COMPLETIONS, **body: Any) -> Request:
    """Send a request, which must be answered; returns the engine's request."""
    answer = await server.post(path, VALID[path] | body)
    assert answer.status_code == 200, answer.text
    return server.engine.requests[-1]


async def test_every_field_reaches_the_engine(http: HttpHarness) -> None:
    request = await asked(
        http,
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


async def test_omitted_fields_have_their_defaults(http: HttpHarness) -> None:
    request = await asked(http, temperature=None, stop=None, logit_bias=None, n=None)
    assert (request.sampling.temperature, request.sampling.seed) == (1.0, None)
    assert request.stop.max_tokens == 16
    request = await asked(http, CHAT, top_k=-1, stop="x", foo={"bar": [1]}, user="me")
    assert request.stop.max_tokens is None
    assert (request.stop.stop_strings, request.sampling.top_k) == (("x",), 0)
    request = await asked(http, CHAT, max_tokens=3, max_completion_tokens=4)
    assert request.stop.max_tokens == 4
    request = await asked(http, CHAT, logprobs=True, top_logprobs=3)
    assert (request.options.logprobs, request.options.top_n) == (True, 3)


async def test_unsupported_fields_with_neutral_values_are_accepted(http: HttpHarness) -> None:
    await asked(
        http, CHAT, tools=[], tool_choice="auto", response_format={"type": "text"},
        modalities=["text"], use_beam_search=False, guided_json=None, best_of=1,
        stream_options=None, parallel_tool_calls=True, metadata={"a": "b"}, store=True,
    )  # fmt: skip
    await asked(http, CHAT, suffix="", add_special_tokens=False, function_call="auto")
    await asked(http, suffix="", functions=[], function_call="auto")
    await asked(http, suffix="", add_special_tokens=True, length_penalty=1.0)


async def test_huge_token_limits_are_left_to_the_context_check(http: HttpHarness) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        request = await asked(http, CHAT, **{name: 10**12})
        assert request.stop.max_tokens == (1 << 32) - 1


@pytest.mark.parametrize(
    ("sent", "param"),
    [
        (b'"temperature": 1e999', "temperature"),
        (b'"guided_json": {"maximum": 1e999}', "guided_json"),
        (b'"tools": [{"function": {"parameters": {"a": 1e999}}}]', "tools[0].function.parameters"),
    ],
)
async def test_numbers_that_no_float_holds_are_refused(
    sent: bytes, param: str, http: HttpHarness
) -> None:
    body = b'{"model": "base", "messages": [{"role": "user", "content": "a"}], %b}' % sent
    refused = Refused.of(await http.client.post(CHAT, content=body, headers=JSON))
    assert refused.violations[param] == "number_too_large"


def test_the_ranges_of_fields_match_the_engine() -> None:
    """The engine accepts values just inside each bound of a field, but none just outside."""
    for name, info in Generating.model_fields.items():
        if name not in SamplingParams.__dataclass_fields__:
            continue
        for bound in info.metadata:
            limit = getattr(bound, "ge", getattr(bound, "le", getattr(bound, "gt", None)))
            if limit is None or name in ("seed", "top_k"):
                continue
            step = -0.001 if hasattr(bound, "le") else 0.001
            SamplingParams(**{name: limit + step})
            with pytest.raises(errors.InvalidRequestError):
                SamplingParams(**{name: limit - step})


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.AdapterClassifiesError.of("adapters", "a"), "adapter_classifies"),
        (errors.AdapterExistsError("is taken"), "adapter_exists"),
        (errors.MergeActiveError("is merged"), "merge_active"),
    ],
)
async def test_a_hint_names_a_path_of_this_api(
    error: errors.TurretError, code: str, http: HttpHarness
) -> None:
    http.engine.refuse = error
    refused = await http.refused("/classify", {"model": "base", "input": "a"})
    assert refused.code == code
    assert refused.message.endswith(STEPS[error.reason])


async def test_a_chat_is_rendered_from_its_turns(http: HttpHarness) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    turns = [
        {"role": "developer", "content": "s"},
        {"role": "user", "content": parts, "name": "me"},
        {"role": "assistant", "content": None},
    ]
    request = await asked(http, CHAT, messages=turns)
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
    body: dict[str, Any], spec: tuple[Any, ...] | None, http: HttpHarness
) -> None:
    expected = None if spec is None else ConstraintSpec(spec[0], spec[1:])
    for path in (CHAT, COMPLETIONS):
        request = await asked(http, path, **body)
        assert request.constraint == expected


# A value, and the path of its error; {} is the name of the field.
WRONG: tuple[tuple[Any, str], ...] = (
    ("", "{}"),
    ([1000000], "{}[0]"),
    ([[1000000]], "{}[0][0]"),
    (["a", [1, 1000000]], "{}[1][1]"),
    (["a", "b", ""], "{}[2]"),
    (["a", [1] * 9000], "{}[1]"),
    ({}, "{}"),
    ([], "{}"),
    (["a", []], "{}[1]"),
    (["a", 1], "{}[1]"),
    ([[1], ["a"]], "{}[1]"),
)
PATHS = (("/v1/completions", "prompt"), ("/v1/embeddings", "input"), ("/classify", "input"))


@pytest.mark.parametrize(("path", "field"), PATHS)
async def test_an_error_gives_the_index_of_the_prompt(
    path: str, field: str, http: HttpHarness
) -> None:
    for sent, place in WRONG:
        refused = await http.refused(path, {"model": "base", field: sent})
        assert (refused.status, refused.param) == (400, place.format(field)), sent


@pytest.mark.parametrize("options", [{"max_tokens": 0}, {"n": 2}, {"stream": True}])
async def test_the_prompt_is_named_for_every_form_of_answer(
    options: dict[str, Any], http: HttpHarness
) -> None:
    body = {"model": "base", "prompt": [[1000000], "a"], **options}
    refused = await http.refused("/v1/completions", body)
    assert (refused.status, refused.param) == (400, "prompt[0][0]")


@pytest.mark.parametrize(("path", "field"), PATHS[:2])
async def test_errors_of_the_engine_name_the_prompt_too(
    path: str, field: str, http: HttpHarness
) -> None:
    said = "prompt of 70 tokens exceeds the context of 64"
    http.engine.refuse = errors.PromptTooLongError(
        f"{said}; shorten the prompt", violations=[("input", said)]
    )
    refused = await http.refused(path, {"model": "base", field: ["a"]})
    assert refused.param == f"{field}[0]"
    assert refused.message.startswith(f"{field}[0]: ")
    assert refused.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("path", "given", "limit"),
    [
        ("/v1/completions", {"prompt": "a"}, "max_tokens"),
        ("/v1/completions", {"prompt": "a"}, "max_completion_tokens"),
        ("/v1/responses", {"input": "a"}, "max_output_tokens"),
        ("/v1/responses", {"input": "a"}, "max_tokens"),
    ],
)
async def test_a_limit_is_reported_under_the_name_that_was_sent(
    path: str, given: dict[str, Any], limit: str, http: HttpHarness
) -> None:
    refused = await http.refused(path, {"model": "base", **given, limit: 2, "min_tokens": 3})
    assert refused.message.endswith(say("EXCEEDS_FIELD", other=limit, most=2, value=3))


async def test_an_error_in_a_single_prompt_has_no_index(http: HttpHarness) -> None:
    refused = await http.refused("/v1/completions", {"model": "base", "prompt": [1] * 9000})
    assert (refused.param, refused.code) == ("prompt", "context_length_exceeded")


async def test_an_error_that_concerns_all_prompts_names_none(http: HttpHarness) -> None:
    body = {"model": "base", "prompt": ["a", "b"], "temperature": -3}
    refused = await http.refused("/v1/completions", body)
    assert refused.violations == {"temperature": "too_small"}
