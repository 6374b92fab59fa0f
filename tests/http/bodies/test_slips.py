"""Misspelt fields are rejected by name, and one answer names all errors."""

from __future__ import annotations

from typing import Any

import pytest
from servers.http_harness import http_harness

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TURNS = [{"role": "user", "content": "hi"}]
# Fields of other servers and newer clients, and names similar to a field without being
# misspellings.
OTHERS = (
    *(
        "user",
        "store",
        "metadata",
        "service_tier",
        "verbosity",
        "prompt_cache_key",
        "top_a",
        "top_n",
    ),
    *("typical_p", "min_length", "rid", "k", "stop_token", "mirostat", "num_ctx"),
    *("samplers", "n_probs", "stop_regex", "separate_reasoning", "provider"),
)
BODIES = {
    CHAT: {"messages": TURNS},
    COMPLETIONS: {"prompt": "a"},
    "/v1/responses": {"input": "a"},
    "/v1/embeddings": {"input": "a"},
    "/classify": {"input": "a"},
    "/tokenize": {"prompt": "a"},
}


@pytest.mark.parametrize(
    ("path", "sent", "meant"),
    [
        (CHAT, "max_token", "max_tokens"),
        (CHAT, "temprature", "temperature"),
        (CHAT, "steam", "stream"),
        (CHAT, "maxTokens", "max_tokens"),
        (CHAT, "topP", "top_p"),
        (CHAT, "tool", "tools"),
        (CHAT, "adapter", "adapters"),
        (COMPLETIONS, "stops", "stop"),
        (CHAT, "max_new_tokens", "max_tokens"),
        # Short names: swapped letters are a misspelling, another letter is not.
        (COMPLETIONS, "sede", "seed"),
        (COMPLETIONS, "stpo", "stop"),
        (COMPLETIONS, "echoo", "echo"),
        (COMPLETIONS, "respone_format", "response_format"),
        ("/v1/responses", "instruction", "instructions"),
        ("/v1/embeddings", "dimension", "dimensions"),
        ("/classify", "time_out", "timeout"),
        ("/tokenize", "return_tokens_strs", "return_token_strs"),
    ],
)
async def test_a_misspelt_field_is_refused(path: str, sent: str, meant: str) -> None:
    async with http_harness() as server:
        refused = await server.refused(path, {"model": "base", **BODIES[path], sent: 0})
        assert (refused.status, refused.param) == (400, sent)
        assert refused.violations == {sent: "unknown_field"}
        assert meant in refused.message


async def test_a_misspelt_required_field_is_the_only_error() -> None:
    async with http_harness() as server:
        for path, sent, meant in (
            (CHAT, "message", "messages"),
            (COMPLETIONS, "promt", "prompt"),
            ("/v1/embeddings", "inputs", "input"),
            (CHAT, "modle", "model"),
        ):
            body: dict[str, Any] = {"model": "base", **BODIES[path]}
            body[sent] = body.pop(meant)
            refused = await server.refused(path, body)
            assert refused.violations == {sent: "unknown_field"}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_fields_of_other_servers_are_ignored(path: str) -> None:
    async with http_harness() as server:
        body = {"model": "base", **BODIES[path], **dict.fromkeys(OTHERS, 0.5)}
        answer = await server.post(path, body)
        assert answer.status_code == 200, answer.text
        answer = await server.post(path, body | {"grammar": "", "json_object": False})
        assert answer.status_code == 200, answer.text
        assert server.engine.requests[-1].constraint is None
        # Both fields were sent, so the unknown one is not a misspelling.
        answer = await server.post(path, body | {"temprature": 2, "temperature": 1, "models": []})
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("path", "body", "sent", "meant"),
    [
        (CHAT, {"structured_outputs": {"jsn": {}}}, "structured_outputs.jsn", "json"),
        (
            COMPLETIONS,
            {"stream_options": {"include_usag": True}},
            "stream_options.include_usag",
            "include_usage",
        ),
        (
            CHAT,
            {"response_format": {"type": "json_schema", "json_schema": {"schma": {}}}},
            "response_format.json_schema.schma",
            "schema",
        ),
        (
            CHAT,
            {"response_format": {"type": "json_schema", "json_shema": {"schema": {}}}},
            "response_format.json_shema",
            "json_schema",
        ),
        (CHAT, {"messages": [{"role": "user", "contnt": "a"}]}, "messages[0].contnt", "content"),
        (
            CHAT,
            {"tools": [{"type": "function", "functon": {"name": "a"}}]},
            "tools[0].functon",
            "function",
        ),
        (
            "/v1/responses",
            {"text": {"format": {"type": "json_schema", "name": "a", "shema": {}}}},
            "text.format.shema",
            "schema",
        ),
        ("/v1/responses", {"input": [{"rol": "user", "content": "a"}]}, "input[0].rol", "role"),
    ],
)
async def test_a_misspelt_field_of_a_nested_object_is_refused(
    path: str, body: dict[str, Any], sent: str, meant: str
) -> None:
    async with http_harness() as server:
        refused = await server.refused(path, {"model": "base", **BODIES[path], **body})
        assert (refused.status, refused.param) == (400, sent)
        assert refused.violations[sent] == "unknown_field"
        assert meant in refused.message


async def test_a_field_with_an_empty_name_is_ignored() -> None:
    async with http_harness() as server:
        for name in ("", "_"):
            answer = await server.post(CHAT, {"model": "base", "messages": TURNS, name: 1})
            assert answer.status_code == 200, answer.text


async def test_fields_of_other_servers_in_nested_objects_are_ignored() -> None:
    turn = {"role": "assistant", "content": "a", "refusal": None, "annotations": [], "name": "b"}
    body = {
        "messages": [{"role": "user", "content": "a", "contnt": 1}, turn | {"audio": None}],
        "structured_outputs": {"regex": "a+", "disable_fallback": True},
        "response_format": {"type": "text", "strict": True},
        "max_new_tokens": None,
        "max_tokens": 2,
    }
    async with http_harness() as server:
        answer = await server.post(CHAT, {"model": "base", **body})
        assert answer.status_code == 200, answer.text
        # Both fields were sent, so the unknown one is not a misspelling.
        answer = await server.post(CHAT, {"model": "base", **body, "max_new_tokens": 1})
        assert answer.status_code == 200, answer.text


async def test_structured_outputs_without_a_constraint_are_refused() -> None:
    body = {"messages": TURNS, "structured_outputs": {"schema": {}}}
    async with http_harness() as server:
        refused = await server.refused(CHAT, {"model": "base", **body})
        assert (refused.status, refused.param) == (400, "structured_outputs.schema")
        assert refused.code == "unknown_field"


async def test_one_answer_reports_every_error() -> None:
    wrong = {"temperature": 3000, "max_tokens": -3, "top_p": 7, "min_token": 1, "stop": 5}
    async with http_harness() as server:
        refused = await server.refused(CHAT, {"model": "base", "messages": TURNS, **wrong})
        assert (refused.status, refused.param) == (400, "min_token")
        assert refused.violations.keys() == wrong.keys()
        for field in wrong:
            assert refused.message.count(f"{field}: ") == 1, field


async def test_an_unknown_response_format_is_refused() -> None:
    async with http_harness() as server:
        for path, body in (
            (CHAT, {"response_format": {"type": "xml"}}),
            ("/v1/responses", {"text": {"format": {"type": "xml"}}}),
        ):
            refused = await server.refused(path, {"model": "base", **BODIES[path], **body})
            assert (refused.status, refused.code) == (400, "not_one_of")
