"""What is wrong with a prompt says where in the request that lies."""

from __future__ import annotations

from typing import Any

import pytest
from servers.http_harness import http_harness

from turret.server.errors import PromptTooLongError

NO_TOKENS = "the prompt has no tokens"
NO_ID = "1000000 is not in [0, 256)"
LONG = "prompt of 9000 tokens exceeds the 64 that there may be"
# What is sent, where what is wrong with it lies, and what that is; {} is the field's name.
WRONG: tuple[tuple[Any, str, str], ...] = (
    ("", "{}", NO_TOKENS),
    ([1000000], "{}[0]", NO_ID),
    ([[1000000]], "{}[0][0]", NO_ID),
    (["a", [1, 1000000]], "{}[1][1]", NO_ID),
    (["a", "b", ""], "{}[2]", NO_TOKENS),
    (["a", [1] * 9000], "{}[1]", LONG),
)
PATHS = (("/v1/completions", "prompt"), ("/v1/embeddings", "input"), ("/classify", "input"))


@pytest.mark.parametrize(("path", "field"), PATHS)
async def test_what_is_wrong_with_a_prompt_says_which_it_is(path: str, field: str) -> None:
    async with http_harness() as server:
        for sent, place, why in WRONG:
            refused = await server.refused(path, {"model": "base", field: sent})
            assert (refused.status, refused.param) == (400, place.format(field)), sent
            assert refused.message == f"{place.format(field)}: {why}"


@pytest.mark.parametrize("options", [{"max_tokens": 0}, {"n": 2}, {"stream": True}])
async def test_which_prompt_it_is_however_it_is_answered(options: dict[str, Any]) -> None:
    async with http_harness() as server:
        body = {"model": "base", "prompt": [[1000000], "a"], **options}
        refused = await server.refused("/v1/completions", body)
        assert (refused.param, refused.message) == ("prompt[0][0]", f"prompt[0][0]: {NO_ID}")


@pytest.mark.parametrize(("path", "field"), PATHS[:2])
async def test_the_engine_s_own_words_name_the_prompt_too(path: str, field: str) -> None:
    said = "prompt of 70 tokens exceeds the context of 64"
    async with http_harness() as server:
        server.engine.refuse = PromptTooLongError(
            f"{said}; shorten the prompt", violations=[("input", said)]
        )
        refused = await server.refused(path, {"model": "base", field: ["a"]})
        assert refused.param == f"{field}[0]"
        assert refused.message == f"{field}[0]: {said}; shorten the prompt"
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
async def test_a_limit_is_called_as_it_was_sent(
    path: str, given: dict[str, Any], limit: str
) -> None:
    said = "prompt of 7 tokens + {0} 99 exceeds the context of 64; {0} can be 57"
    async with http_harness() as server:
        engine_s = said.format("max_tokens")
        server.engine.refuse = PromptTooLongError(
            engine_s, violations=[("input", engine_s.partition(";")[0])]
        )
        refused = await server.refused(path, {"model": "base", **given, limit: 99})
        assert refused.message == said.format(limit)


async def test_a_prompt_alone_is_not_told_from_others() -> None:
    async with http_harness() as server:
        refused = await server.refused("/v1/completions", {"model": "base", "prompt": [1] * 9000})
        assert (refused.param, refused.message) == ("prompt", LONG)


async def test_what_is_wrong_with_all_prompts_names_none() -> None:
    async with http_harness() as server:
        body = {"model": "base", "prompt": ["a", "b"], "temperature": -3}
        refused = await server.refused("/v1/completions", body)
        assert refused.message == "temperature: must be in [0, 100]; 0 is greedy"
