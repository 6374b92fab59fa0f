"""Errors in a prompt name its place in the request."""

from __future__ import annotations

from typing import Any

import pytest
from servers.http_harness import http_harness

from turret.server.errors import PromptTooLongError
from turret.server.words import say

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
async def test_an_error_gives_the_index_of_the_prompt(path: str, field: str) -> None:
    async with http_harness() as server:
        for sent, place in WRONG:
            refused = await server.refused(path, {"model": "base", field: sent})
            assert (refused.status, refused.param) == (400, place.format(field)), sent


@pytest.mark.parametrize("options", [{"max_tokens": 0}, {"n": 2}, {"stream": True}])
async def test_the_prompt_is_named_for_every_form_of_answer(options: dict[str, Any]) -> None:
    async with http_harness() as server:
        body = {"model": "base", "prompt": [[1000000], "a"], **options}
        refused = await server.refused("/v1/completions", body)
        assert (refused.status, refused.param) == (400, "prompt[0][0]")


@pytest.mark.parametrize(("path", "field"), PATHS[:2])
async def test_errors_of_the_engine_name_the_prompt_too(path: str, field: str) -> None:
    said = "prompt of 70 tokens exceeds the context of 64"
    async with http_harness() as server:
        server.engine.refuse = PromptTooLongError(
            f"{said}; shorten the prompt", violations=[("input", said)]
        )
        refused = await server.refused(path, {"model": "base", field: ["a"]})
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
    path: str, given: dict[str, Any], limit: str
) -> None:
    async with http_harness() as server:
        refused = await server.refused(path, {"model": "base", **given, limit: 2, "min_tokens": 3})
        assert refused.message.endswith(say("EXCEEDS_FIELD", other=limit, most=2, value=3))


async def test_an_error_in_a_single_prompt_has_no_index() -> None:
    async with http_harness() as server:
        refused = await server.refused("/v1/completions", {"model": "base", "prompt": [1] * 9000})
        assert (refused.param, refused.code) == ("prompt", "context_length_exceeded")


async def test_an_error_that_concerns_all_prompts_names_none() -> None:
    async with http_harness() as server:
        body = {"model": "base", "prompt": ["a", "b"], "temperature": -3}
        refused = await server.refused("/v1/completions", body)
        assert refused.violations == {"temperature": "too_small"}
