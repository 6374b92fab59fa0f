"""Chat and completions over HTTP: the client's answers, and how many are computed at a time."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from servers.fakes import FakeEngine, endless, failing, finish, saying
from servers.http_harness import TURNS, HttpHarness, posted

from turret.server.api import inference as inference_service
from turret.server.api.access import MAX_AT_A_TIME, Party, Shares
from turret.server.api.inference import together
from turret.server.engine.scheduling.request import (
    FinishReason,
    Output,
    Request,
    TokenLogprob,
    TopLogprob,
)
from turret.server.errors import AdapterNotFoundError, QueueFullError
from turret.server.http import choices as choices_module
from turret.server.http import completions, endpoint
from turret.server.http.asked import Asked
from turret.server.http.choices import Choices
from turret.v1 import inference_pb2

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


async def test_a_whole_chat_answer(http: HttpHarness) -> None:
    body = {"model": "sql", "messages": TURNS, "logprobs": True}
    answer = (await http.post(CHAT, body)).json()
    assert (answer["object"], answer["model"]) == ("chat.completion", "sql")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hi", "refusal": None}
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
    tokens = choice["logprobs"]["content"]
    assert [(t["token"], t["logprob"], t["bytes"]) for t in tokens] == [
        ("H", -0.5, [72]),
        ("i", -0.25, [105]),
    ]
    assert answer["usage"] == {
        "prompt_tokens": 8,
        "completion_tokens": 2,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert [use["name"] for use in answer["adapters_used"]] == ["sql"]
    assert await http.sample("turret_requests_total", adapter="other", code="OK") == 1
    assert await http.sample("turret_prompt_tokens_total", adapter="other") == 8


async def test_a_streamed_chat(http: HttpHarness) -> None:
    body = {"model": "base", "messages": TURNS}
    *events, done = await http.events(CHAT, body)
    assert done == "[DONE]"
    deltas = [(e["choices"][0]["delta"], e["choices"][0]["finish_reason"]) for e in events]
    assert deltas == [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "H"}, None),
        ({"content": "i"}, None),
        ({}, "stop"),
    ]
    assert all(e["object"] == "chat.completion.chunk" for e in events)
    assert len({e["id"] for e in events}) == 1
    assert not any("usage" in e for e in events)
    options = {"stream_options": {"include_usage": True}, "n": 2}
    *events, last, done = await http.events(CHAT, body | options)
    assert done == "[DONE]"
    assert all(e["usage"] is None for e in events)
    assert (last["choices"], last["usage"]["prompt_tokens"]) == ([], 8)
    assert last["usage"]["completion_tokens"] == 4
    assert {e["choices"][0]["index"] for e in events} == {0, 1}
    options["stream_options"]["continuous_usage_stats"] = True
    counted = [(CHAT, body, [1, 1, 2, 2]), (COMPLETIONS, {**body, "prompt": "ab"}, [1, 2])]
    for path, body, counts in counted:
        *events, last, _ = await http.events(path, body | options)
        for index in (0, 1):
            used = [e["usage"] for e in events if e["choices"][0]["index"] == index]
            assert [each["completion_tokens"] for each in used] == counts
        assert {e["usage"]["prompt_tokens"] for e in events} == {last["usage"]["prompt_tokens"]}


async def test_completions_take_four_kinds_of_prompts(http: HttpHarness) -> None:
    for prompt, expected in (
        ("ab", [b"ab"]),
        (["ab", "c"], [b"ab", b"c"]),
        ([97, 98], [b"ab"]),
        ([[97], [98, 99]], [b"a", b"bc"]),
    ):
        http.engine.requests.clear()
        answer = await http.post(COMPLETIONS, {"model": "base", "prompt": prompt})
        assert [bytes(r.prompt_token_ids) for r in http.engine.requests] == expected
        choices = answer.json()["choices"]
        assert [c["index"] for c in choices] == list(range(len(expected)))
        assert [c["text"] for c in choices] == ["Hi"] * len(expected)
    for bad in (None, 3, [], [[]], [True], [1.5], [[-1]], ["a", 3], [{"a": 1}], ["a"] * 2049):
        refused = await http.refused(COMPLETIONS, {"model": "base", "prompt": bad})
        assert refused.status == 400
        assert (refused.param or "").startswith("prompt"), bad


async def test_the_first_of_n_answers_runs_first_and_each_has_its_own_seed(
    http: HttpHarness,
) -> None:
    waiting = asyncio.Event()

    async def script(request: Request) -> AsyncIterator[Output]:
        if request.sampling.seed == 5:
            await waiting.wait()
        yield Output(text=str(request.sampling.seed), token_ids=(1,), finish=finish(request))

    http.engine.script = script
    body = {"model": "base", "prompt": ["a", "b"], "n": 3, "seed": 5}
    asking = asyncio.ensure_future(http.post(COMPLETIONS, body))
    await asyncio.wait_for(http.engine.submitted.wait(), 10)
    for _ in range(50):
        await asyncio.sleep(0)
    assert [r.sampling.seed for r in http.engine.requests] == [5, 5]
    waiting.set()
    answer = (await asking).json()
    assert [c["text"] for c in answer["choices"]] == ["5", "6", "7", "5", "6", "7"]
    assert answer["usage"]["prompt_tokens"] == 2
    assert answer["usage"]["completion_tokens"] == 12
    assert await http.sample("turret_requests_total", adapter="base", code="OK") == 1
    assert await http.sample("turret_prompt_tokens_total", adapter="base") == 6


async def test_a_list_of_prompts_does_not_fill_the_queue(http: HttpHarness) -> None:
    running, most = 0, 0
    is_full = asyncio.Event()

    async def script(request: Request) -> AsyncIterator[Output]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        # The answers begin one after the other.
        if running == MAX_AT_A_TIME:
            is_full.set()
        await is_full.wait()
        running -= 1
        yield Output(text="x", token_ids=(1,), finish=finish(request))

    http.engine.script = script
    body = {"model": "base", "prompt": ["a"] * (MAX_AT_A_TIME * 3)}
    answer = (await http.post(COMPLETIONS, body)).json()
    assert len(answer["choices"]) == MAX_AT_A_TIME * 3
    assert most == MAX_AT_A_TIME


async def test_echo_and_logprobs_of_a_prompt(http: HttpHarness) -> None:
    body = {"model": "base", "prompt": "ab", "echo": True, "logprobs": 0, "max_tokens": 2}
    (choice,) = (await http.post(COMPLETIONS, body)).json()["choices"]
    assert choice["text"] == "abHi"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "H", "i"]
    assert logprobs["token_logprobs"] == [None, -1.0, -0.5, -0.25]
    assert logprobs["top_logprobs"] == [None, {"b": -1.0}, {"H": -0.5}, {"i": -0.25}]
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    *events, _ = await http.events(COMPLETIONS, body)
    assert "".join(e["choices"][0]["text"] for e in events) == "abHi"
    offsets = [o for e in events for o in e["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == [0, 1, 2, 3]


async def test_a_request_for_no_tokens_scores_the_prompt(http: HttpHarness) -> None:
    body = {"model": "sql", "prompt": ["ab", "c"], "echo": True, "logprobs": 1, "max_tokens": 0}
    answer = (await http.post(COMPLETIONS, body)).json()
    assert [r.score for r in http.engine.requests] == [True, True]
    assert [c["text"] for c in answer["choices"]] == ["ab", "c"]
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [None, -1.0]
    assert answer["choices"][0]["finish_reason"] == "length"
    http.engine.refuse = QueueFullError("full")
    assert (await http.refused(COMPLETIONS, body)).status == 429


async def test_a_large_answer_is_built_in_pieces_outside_the_event_loop(
    monkeypatch: pytest.MonkeyPatch,
    http: HttpHarness,
) -> None:
    """The encoder holds the GIL, so it must not get thousands of answers at once."""
    encoded: list[tuple[str, int]] = []
    original = endpoint.dumps

    def dumps(value: Any) -> bytes:
        data = original(value)
        encoded.append((threading.current_thread().name, len(data)))
        return data

    monkeypatch.setattr(endpoint, "dumps", dumps)
    body = {"model": "base", "prompt": ["a b"] * 100, "max_tokens": 0, "echo": True}
    answer = await http.post("/v1/completions", body | {"logprobs": 1})
    assert len(answer.json()["choices"]) == 100
    whole = len(answer.content)
    assert max(size for _, size in encoded) < whole / 50
    assert threading.main_thread().name not in {name for name, _ in encoded}


async def test_tokens_are_named_by_their_ids_on_request(http: HttpHarness) -> None:
    """Two tokens with the same text, such as parts of characters, stay distinct."""
    top = (TopLogprob(7, "\ufffd", -1.0),)
    both = (TokenLogprob(token_id=5, text="\ufffd", logprob=-2.0, top=top),) * 2
    http.engine.script = saying(Output(text="", token_ids=(5, 5), logprobs=both))
    asked = {"model": "base", "return_tokens_as_token_ids": True}
    body = asked | {"messages": TURNS, "logprobs": True, "top_logprobs": 1}
    (choice,) = (await http.post(CHAT, body)).json()["choices"]
    token, _ = choice["logprobs"]["content"]
    assert (token["token"], token["top_logprobs"][0]["token"]) == ("token_id:5", "token_id:7")
    # Bytes and offsets are those of the text, not of the names.
    assert token["bytes"] is None
    body = asked | {"prompt": "ab", "logprobs": 1}
    (choice,) = (await http.post(COMPLETIONS, body)).json()["choices"]
    assert choice["logprobs"]["tokens"] == ["token_id:5"] * 2
    assert choice["logprobs"]["text_offset"] == [0, 1]
    top = {"token_id:7": -1.0, "token_id:5": -2.0}
    assert choice["logprobs"]["top_logprobs"] == [top, top]


async def test_an_infinite_logprob_is_a_valid_json_number(http: HttpHarness) -> None:
    top = (TopLogprob(1, "\ufffd", float("-inf")),)
    token = TokenLogprob(token_id=1, text="\ufffd", logprob=float("-inf"), top=top)
    http.engine.script = saying(Output(text="", token_ids=(1,), logprobs=(token,)))
    body = {"model": "base", "messages": TURNS, "logprobs": True, "top_logprobs": 1}
    (choice,) = (await http.post(CHAT, body)).json()["choices"]
    (token,) = choice["logprobs"]["content"]
    assert (token["logprob"], token["bytes"]) == (-9999.0, None)
    assert token["top_logprobs"] == [{"token": "\ufffd", "logprob": -9999.0, "bytes": None}]


async def test_the_finish_reason_is_reported(http: HttpHarness) -> None:
    for reason, stop, expected in (
        (FinishReason.LENGTH, None, ("length", None)),
        (FinishReason.STOP, "x", ("stop", "x")),
        (FinishReason.STOP, 3, ("stop", 3)),
    ):
        http.engine.script = saying("t", reason=reason, stop=stop)
        for path in (CHAT, COMPLETIONS):
            body = {"model": "base", "messages": TURNS, "prompt": "a", "stop_token_ids": [3]}
            (choice,) = (await http.post(path, body)).json()["choices"]
            assert (choice["finish_reason"], choice["stop_reason"]) == expected
            events = await http.events(path, body)
            assert events[-2]["choices"][0]["finish_reason"] == expected[0]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_an_error_after_the_first_event_is_sent_as_an_event(
    path: str, http: HttpHarness
) -> None:
    body = {"model": "base", "messages": TURNS, "prompt": "a", "stream": True}
    http.engine.refuse = AdapterNotFoundError("no adapter")
    refused = await http.refused(path, body)
    assert (refused.status, refused.param) == (404, "model")
    http.engine.refuse = None
    http.engine.script = failing(QueueFullError("later"))
    *_, last = await http.events(path, body)
    assert last["error"]["code"] == "rate_limit_exceeded"
    for reason, status, code in (
        (FinishReason.DEADLINE, 504, "deadline_exceeded"),
        (FinishReason.CANCELLED, 503, "unavailable"),
    ):
        http.engine.script = saying("t", "t", reason=reason)
        refused = await http.refused(path, body | {"stream": False})
        assert (refused.status, refused.code) == (status, code)
        *_, last = await http.events(path, body)
        assert last["error"]["code"] == code


async def test_one_answer_that_fails_ends_the_others(http: HttpHarness) -> None:

    async def script(request: Request) -> AsyncIterator[Output]:
        if bytes(request.prompt_token_ids) == b"bad":
            raise QueueFullError("full")
        async for output in endless(request):
            yield output

    http.engine.script = script
    body = {"model": "base", "prompt": ["a", "bad", "c"], "n": 2}
    assert (await http.refused(COMPLETIONS, body)).status == 429
    await http.settle()
    assert all(stream.cancelled.is_set() for stream in http.engine.streams)


def _left(engine: FakeEngine) -> int:
    return sum(not stream.cancelled.is_set() for stream in engine.streams)


async def test_a_client_that_disconnects_leaves_nothing_behind(http: HttpHarness) -> None:
    """Fifty streams and whole answers are dropped before, during and after their first event."""
    source = random.Random(7)
    http.engine.script = endless

    async def drop(index: int) -> None:
        body = {"model": "base", "prompt": "a", "n": source.choice((1, 1, 4))}
        body |= {"stream": source.choice((True, False)), "messages": TURNS}
        data = posted(source.choice((CHAT, COMPLETIONS)), body)
        cut = source.choice((len(data), len(data), len(data) - 5))
        reader, writer = await http.opened()
        writer.write(data[:cut])
        await writer.drain()
        if cut == len(data) and body["stream"]:
            await reader.readuntil(b"data: ")
        for _ in range(source.randint(0, 20)):
            await asyncio.sleep(0)
        writer.transport.abort()

    await asyncio.wait_for(asyncio.gather(*map(drop, range(50))), 30)
    await asyncio.wait_for(http.settle(), 10)
    assert len(http.engine.streams) >= 25
    assert _left(http.engine) == 0
    assert await http.sample("turret_calls_total", protocol="http", code="CANCELLED") == 50
    assert await http.sample("turret_calls_total", protocol="http", code="OK") is None
    running = [t for t in asyncio.all_tasks() if "turret" in repr(t.get_coro())]
    assert not [t for t in running if "_answer" in repr(t) or "generate" in repr(t)]


def choices_of(inference: Any, count: int, num_choices: int) -> Choices:
    """``count`` answers, ``num_choices`` of them to each prompt."""
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


async def test_answers_are_counted_over_all_prompts(
    monkeypatch: pytest.MonkeyPatch, http: HttpHarness
) -> None:
    """Otherwise, a body of ten kilobytes could request a quarter of a million answers."""
    body = {"model": "base", "prompt": ["a"] * 2048, "n": 128}
    refused = await http.refused("/v1/completions", body)
    assert (refused.status, refused.param) == (400, "n")
    assert http.engine.requests == []
    monkeypatch.setattr(completions, "MAX_ANSWERS", 4)
    for count, status in ((2, 200), (3, 400)):
        body = {"model": "base", "prompt": ["a", "b"], "n": count}
        assert (await http.post("/v1/completions", body)).status_code == status


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
    path: str, body: dict[str, Any], is_collected: bool, http: HttpHarness
) -> None:
    held: list[int] = []

    async def script(request: Request) -> AsyncIterator[Output]:
        yield Output(text="abc", token_ids=(1,))
        held.append(http.engine.memory.held)
        yield Output(text="", token_ids=(2,), finish=finish(request))

    http.engine.script = script
    assert (await http.post(path, {"model": "base", **body})).status_code == 200
    await http.settle()
    assert [num_bytes > 0 for num_bytes in held] == [is_collected]
    assert http.engine.memory.held == 0


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
    http: HttpHarness,
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
    bodies = [{"model": "base", "prompt": ["a"] * 64} for _ in range(8)]
    answers = await asyncio.gather(*(http.post("/v1/completions", body) for body in bodies))
    assert {answer.status_code for answer in answers} == {200}
    is_over = True
    await counting
    assert (begun.total(), max(begun.values())) == (8 * 64, 1)
