"""Concurrent answers: unread parts are not taken from the engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from servers.fakes import finish
from servers.http_harness import http_harness

from turret.server.api import inference as inference_service
from turret.server.api.access import MAX_AT_A_TIME, Party, Shares
from turret.server.api.inference_answers import together
from turret.server.engine.scheduling.request import Output, Request
from turret.server.http import choices as choices_module
from turret.server.http import completions
from turret.server.http.asked import Asked
from turret.server.http.choices import Choices
from turret.v1 import inference_pb2

TURNS = [{"role": "user", "content": "hi"}]


def choices_of(inference: Any, count: int, num_choices: int) -> Choices:
    """This number of answers, with this number for each prompt."""
    call = SimpleNamespace(message_bytes=0, party=Party(Shares()))
    services = SimpleNamespace(inference=inference)
    exchange: Any = SimpleNamespace(call=call, services=services)
    message = inference_pb2.GenerateRequest()
    asked = Asked(
        model="base",
        message=message,
        num_choices=num_choices,
        is_stream=True,
        includes_usage=False,
        names_ids=False,
    )
    return Choices(exchange, asked, [message] * (count // num_choices))


async def test_a_request_has_no_more_tasks_than_answers_that_run() -> None:
    talker, count = Talker(), 500
    choices = choices_of(talker, count, 2)
    before = len(asyncio.all_tasks())
    async with contextlib.aclosing(choices.chunks()) as chunks:
        await anext(chunks)
        assert len(asyncio.all_tasks()) - before <= MAX_AT_A_TIME
    assert talker.num_open == 0
    assert len(asyncio.all_tasks()) == before


async def test_calls_with_a_list_of_prompts_have_no_more_tasks_than_run() -> None:
    before, most = len(asyncio.all_tasks()), 0

    async def call(index: int) -> int:
        nonlocal most
        most = max(most, len(asyncio.all_tasks()) - before)
        await asyncio.sleep(0)
        return index

    assert await together([call(index) for index in range(100)], 4) == list(range(100))
    assert most == 4


async def test_answers_are_counted_over_all_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, a body of ten kilobytes could request a quarter of a million answers."""
    async with http_harness() as server:
        body = {"model": "base", "prompt": ["a"] * 2048, "n": 128}
        refused = await server.refused("/v1/completions", body)
        assert (refused.status, refused.param) == (400, "n")
        assert server.engine.requests == []
        monkeypatch.setattr(completions, "MAX_ANSWERS", 4)
        for count, status in ((2, 200), (3, 400)):
            body = {"model": "base", "prompt": ["a", "b"], "n": count}
            assert (await server.post("/v1/completions", body)).status_code == status


@pytest.mark.parametrize(
    ("path", "body", "is_collected"),
    [
        ("/v1/chat/completions", {"messages": TURNS}, True),
        ("/v1/chat/completions", {"messages": TURNS, "stream": True}, False),
        ("/v1/responses", {"input": "a"}, True),
        ("/v1/responses", {"input": "a", "stream": True}, True),
        ("/v1/messages", {"messages": TURNS, "max_tokens": 9}, True),
    ],
)
async def test_collected_answers_count_towards_the_limit(
    path: str, body: dict[str, Any], is_collected: bool
) -> None:
    async with http_harness() as server:
        held: list[int] = []

        async def script(request: Request) -> AsyncIterator[Output]:
            yield Output(text="abc", token_ids=(1,))
            held.append(server.engine.memory.held)
            yield Output(text="", token_ids=(2,), finish=finish(request))

        server.engine.script = script
        assert (await server.post(path, {"model": "base", **body})).status_code == 200
        await server.settle()
        assert [num_bytes > 0 for num_bytes in held] == [is_collected]
        assert server.engine.memory.held == 0


class Talker:
    """Answers endlessly, and counts the taken chunks."""

    def __init__(self) -> None:
        self.num_taken = self.num_open = 0

    async def generate(
        self, *_: object, **__: object
    ) -> AsyncGenerator[inference_pb2.GenerateChunk, None]:
        self.num_open += 1
        try:
            while True:
                self.num_taken += 1
                yield inference_pb2.GenerateChunk(text="x")
                await asyncio.sleep(0)
        finally:
            self.num_open -= 1


async def test_answers_wait_for_a_client_that_does_not_read() -> None:
    talker, count = Talker(), 3
    choices = choices_of(talker, count, 1)
    async with contextlib.aclosing(choices.chunks()) as chunks:
        await anext(chunks)
        for _ in range(4 * choices_module._MAX_ARRIVED):
            await asyncio.sleep(0)
        # Each answer has taken one more chunk, for which there is no room.
        assert talker.num_taken == 1 + choices_module._MAX_ARRIVED + count
        # Reading a chunk makes room, so the answers continue.
        await anext(chunks)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert talker.num_taken > 1 + choices_module._MAX_ARRIVED + count
    assert talker.num_open == 0


async def test_answers_of_many_calls_begin_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise nothing else would happen until all of them have begun."""
    begun: Counter[int] = Counter()
    tick, is_over = 0, False
    original = inference_service.generate_request

    async def noted(*args: Any) -> Any:
        begun[tick] += 1
        return await original(*args)

    async def count() -> None:
        nonlocal tick
        while not is_over:
            tick += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(inference_service, "generate_request", noted)
    counting = asyncio.ensure_future(count())
    async with http_harness() as server:
        bodies = [{"model": "base", "prompt": ["a"] * 64} for _ in range(8)]
        answers = await asyncio.gather(*(server.post("/v1/completions", body) for body in bodies))
        assert {answer.status_code for answer in answers} == {200}
        is_over = True
        await counting
    assert (begun.total(), max(begun.values())) == (8 * 64, 1)
